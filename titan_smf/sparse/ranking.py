"""Which slots a step may update: the t best of all slots that its global batch accessed.

    N slots, U slots touched here, t slots to select, W ranks of a shard group

    owner: touched slots -> float32 scores -> 64-bit keys -> its own t best
    all:   gather W * t keys and counts -> the t best of all, the same on every rank

A key orders slots by score, and by lower id where scores are equal; no two are equal. All costs are
those of the touched slots, none depends on N. Counts are integers, so that neither the number of
ranks nor the order of accesses changes a score.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from titan_smf.sparse.accesses import OwnedSlots, TouchedSlots, all_gather, all_reduce
from titan_smf.sparse.document_frequency import Background

Ranking = Literal["tfidf", "tf", "kl", "random", "all"]

LAST_ID = 0x7FFFFFFF
"""Ids count down from here inside a key."""

NO_SLOT = -(2**63)
"""Below every key."""


@dataclass(frozen=True)
class Selection:
    """The slots that one step may update; bit for bit the same on every rank."""

    ids: Tensor
    """(t',) int64, best first."""
    scores: Tensor
    """(t',) float32."""
    counts: Tensor
    """(t',) int64: accesses of the step to these slots."""
    total: int
    """Accesses of the step to all slots."""
    num_touched: int
    """Distinct slots that the step accessed."""


def tfidf(counts: Tensor, total: int, df: Tensor, num_documents: int) -> Tensor:
    """Return `c(i) / sum_j c(j) * log((|B| + 1) / (df(i) + 1))` in float64.

    Continual Learning via Sparse Memory Finetuning (arXiv 2510.15103). Never negative.
    """
    return tf(counts, total) * torch.log(_divide(num_documents + 1, df + 1))


def tf(counts: Tensor, total: int) -> Tensor:
    """Return `c(i) / sum_j c(j)` in float64: the ablation of arXiv 2510.15103 without idf."""
    return _divide(counts, total)


def kl(counts: Tensor, total: int, background_counts: Tensor, background_total: int) -> Tensor:
    """Return `p(i) log(p(i) / p_bg(i))` in float64: slot i's part of KL(step || background).

    `p = c / sum c`, and `p_bg = (c_bg + 1) / (sum c_bg + 1)`: as with idf, a slot that the
    background never read stays finite. Negative where the step reads a slot less often than the
    background does. From work after arXiv 2510.15103, which ranks by `tfidf`.
    """
    p = _divide(counts, total)
    return p * torch.log(p / _divide(background_counts + 1, background_total + 1))


def random_scores(ids: Tensor, step: int, seed: int) -> Tensor:
    """Return numbers in [0, 1) that depend on (seed, step, id) alone; float64, 24 bits each."""
    state = _mix(ids.new_tensor(seed))
    state = _mix(state + step)
    return _shift_right(_mix(state + ids), 40).double() / 2**24


@dataclass(frozen=True)
class SelectionRule:
    """How the slots of every step are scored, and how many of them are selected."""

    ranking: Ranking
    top_t: int
    """Slots per step at most; `all` selects every touched slot whatever this is."""
    seed: int = 0
    """For `random`."""
    background: Background | None = None
    """For `tfidf` and `kl`."""

    def scores(self, touched: TouchedSlots, total: int, step: int) -> Tensor:
        """Return the scores of touched slots, (U,) float64, in a step with `total` accesses."""
        if self.ranking == "random":
            return random_scores(touched.ids, step, self.seed)
        if self.ranking in ("tf", "all"):
            return tf(touched.counts, total)
        background = self.background
        assert background is not None, f"{self.ranking} needs the counts of background data"
        here = background.owned.positions(touched.ids)
        if self.ranking == "tfidf":
            return tfidf(touched.counts, total, background.df[here], background.documents)
        assert self.ranking == "kl", "all rankings"
        return kl(touched.counts, total, background.counts[here], background.accesses)


def select(
    touched: TouchedSlots,
    rule: SelectionRule,
    step: int,
    shard_group: dist.ProcessGroup | None = None,
) -> Selection:
    """Select the `top_t` best touched slots of all ranks, or all if there are fewer.

    All ranks of the shard group call it together and get the same result; so do replicas, if
    `touched` was summed over them. Receives `selection_bytes`.

    Args:
        touched: of the whole step, on their owner.
        shard_group: the ranks that own the other slots; None if all are here.
    """
    # 1. Agree on the number of accesses, and on how many keys each rank sends.
    mine = torch.stack([touched.counts.sum(), touched.counts.new_tensor(len(touched.ids))])
    totals, sizes = all_gather(mine, shard_group).T.tolist()
    total, num_touched = sum(totals), sum(sizes)
    limit = num_touched if rule.ranking == "all" else rule.top_t
    sent = min(limit, max(sizes))

    # 2. As an owner: the best slots here; shorter lists are filled up.
    keys = make_keys(rule.scores(touched, total, step), touched.ids)
    keys, best = keys.topk(min(sent, len(keys)), sorted=False)
    candidates = touched.ids.new_full((sent, 2), NO_SLOT)
    candidates[: len(best), 0] = keys
    candidates[: len(best), 1] = touched.counts[best]

    # 3. The best of all.
    keys, counts = all_gather(candidates, shard_group).view(-1, 2).unbind(1)
    keys, best = keys.topk(min(limit, num_touched))
    scores, ids = split_keys(keys)
    return Selection(ids, scores, counts[best], total, num_touched)


def selection_bytes(world_size: int, num_candidates: int) -> int:
    """Return the bytes one of W ranks receives in `select`: 16 for the sizes of each other rank,
    and 16 for each of its candidates, `min(top_t, max U)` of them."""
    return (world_size - 1) * 16 * (1 + num_candidates)


def make_keys(scores: Tensor, ids: Tensor) -> Tensor:
    """Return int64 keys that are greater for higher float32 scores, then for lower ids."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0
    return (_to_ordered_integers(bits).long() << 32) | (LAST_ID - ids)


def split_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float32 scores and the ids of which `make_keys` made the keys."""
    scores = _to_ordered_integers((keys >> 32).to(torch.int32)).view(torch.float32)
    return scores, LAST_ID - (keys & 0xFFFFFFFF)


def verify_selection(
    selection: Selection,
    accesses: Sequence[Tensor],
    owned: OwnedSlots,
    rule: SelectionRule,
    step: int,
    shard_group: dist.ProcessGroup | None = None,
    replicate_group: dist.ProcessGroup | None = None,
) -> None:
    """Select again from dense counts of all N slots on every rank, and compare.

    For `selection.verify`: needs tensors of N numbers. All ranks call it together.

    Args:
        selection: what `select` returned for `rule`, `step` and `shard_group`.
        accesses: slot ids of this rank, as for `touched_slots`: of its own shard group alone.
        replicate_group: the ranks that own the same slots; None if no other does.

    Raises:
        RuntimeError: on a rank whose selection differs; it names the first place that does.
    """
    rows = torch.cat([owned.positions(ids.flatten().long()) for ids in accesses])
    counts = _dense(torch.bincount(rows, minlength=len(owned)), owned, shard_group, replicate_group)
    if (known := rule.background) is not None:
        everything = OwnedSlots(owned.num_slots, 0, owned.num_slots, owned.num_tables)
        df, of_background = (_dense(x, owned, shard_group) for x in (known.df, known.counts))
        known = replace(known, owned=everything, df=df, counts=of_background)
        rule = replace(rule, background=known)
    ids = counts.nonzero().squeeze(1)
    total = int(counts.sum())
    scores = rule.scores(TouchedSlots(ids, counts[ids]), total, step)
    scores, order = scores.float().sort(descending=True, stable=True)  # ids ascend: lower first
    limit = len(ids) if rule.ranking == "all" else rule.top_t
    best = ids[order[:limit]]
    expected = Selection(best, scores[:limit], counts[best], total, len(ids))
    if difference := _describe_difference(selection, expected):
        raise RuntimeError(
            f"step {step}, ranking {rule.ranking}: the selection differs from the one made of "
            f"dense counts: {difference}"
        )


def _dense(local: Tensor, owned: OwnedSlots, *groups: dist.ProcessGroup | None) -> Tensor:
    """Return an array over all slots, summed over groups, from one over this rank's slots."""
    whole = local.new_zeros(owned.num_tables, owned.num_slots)
    whole[:, owned.start : owned.stop] = local.view(owned.num_tables, -1)
    for group in groups:
        whole = all_reduce(whole, group)
    return whole.flatten()


def _describe_difference(selection: Selection, expected: Selection) -> str:
    """Return the first place at which two selections differ, in words; "" if they are equal."""
    for name in ("total", "num_touched"):
        got, want = getattr(selection, name), getattr(expected, name)
        if got != want:
            return f"{name} is {got}, not {want}"
    if len(selection.ids) != len(expected.ids):
        return f"{len(selection.ids)} slots are selected, not {len(expected.ids)}"
    got_rows, want_rows = (
        torch.stack([s.ids, s.scores.view(torch.int32).long(), s.counts], dim=1)  # bits of scores
        for s in (selection, expected)
    )
    for place in (got_rows != want_rows).any(1).nonzero()[:1].flatten().tolist():
        got, want = (
            f"slot {s.ids[place]} (score {s.scores[place]:.9g}, count {s.counts[place]})"
            for s in (selection, expected)
        )
        return f"at rank {place} of the order there is {got}, not {want}"
    return ""


def selected_access_share(selection: Selection) -> float:
    """Return the share of the step's accesses that fell on selected slots; 0 without any."""
    return int(selection.counts.sum()) / max(selection.total, 1)


def overlap(ids: Tensor, previous: Tensor) -> float:
    """Return the share of the selected slots that the previous step had selected too."""
    return int(torch.isin(ids, previous).sum()) / max(len(ids), 1)


def _divide(a: Tensor | int, b: Tensor | int) -> Tensor:
    """Return a / b of integers in float64, rounded once, as numpy does.

    With a Python number as one operand torch multiplies by a rounded reciprocal:
    (|B| + 1) / (df + 1) would miss 1.
    """
    device = a.device if isinstance(a, Tensor) else torch.as_tensor(b).device
    as_double = [torch.as_tensor(x, dtype=torch.float64, device=device) for x in (a, b)]
    return as_double[0] / as_double[1]


def _to_ordered_integers(bits: Tensor) -> Tensor:
    """Map the int32 bits of floats to integers in the order of the floats; its own inverse."""
    return torch.where(bits < 0, bits ^ LAST_ID, bits)


def _mix(state: Tensor) -> Tensor:
    """Return a step of SplitMix64 (Steele, Lea, Flood 2014), modulo 2**64, in signed integers."""
    state = state - 0x61C8864680B583EB
    state = (state ^ _shift_right(state, 30)) * -0x40A7B892E31B1A47
    state = (state ^ _shift_right(state, 27)) * -0x6B2FB644ECCEEE15
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """Shift to the right, bringing in zeros."""
    return (state >> bits) & (2 ** (64 - bits) - 1)
