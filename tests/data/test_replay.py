"""Replay: background rows in each global batch, the same on any ranks, from any position."""

import itertools
import json

import pytest
import torch

from tests.streams.test_streams import SEQ_LEN, fact
from titan_smf.config import sections
from titan_smf.data.loader import TokenLoader, WeightedShards
from titan_smf.data.replay import Replay
from titan_smf.data.token_shards import TokenShards, write_shards
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import CheckpointError
from titan_smf.streams.loader import StreamLoader

GLOBAL = 8
Row = tuple[list[int], list[int], list[bool]]


@pytest.fixture(scope="module")
def background(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    folder = str(tmp_path_factory.mktemp("background"))
    write_shards(folder, tokenizer, [f"background {number}" for number in range(40)])
    return TokenShards(folder, tokenizer.fingerprint)


def plain(shards: TokenShards, ranks: int = 1, rank: int = 0, batch: int = 1) -> TokenLoader:
    return TokenLoader([WeightedShards("text", shards)], SEQ_LEN, batch, rank, ranks, seed=3)


def loaders(
    tokenizer: Tokenizer, shards: TokenShards, ranks: int = 1, batch: int = GLOBAL, rows: int = 3
) -> list[StreamLoader]:
    facts = [fact(f"f{n}", n) for n in (2, 7, 20)]
    return [
        StreamLoader(
            facts,
            tokenizer,
            SEQ_LEN,
            batch,
            GLOBAL,
            rank,
            ranks,
            epochs=2,
            replay=Replay(plain(shards, ranks, rank, batch), rows, GLOBAL) if rows else None,
        )
        for rank in range(ranks)
    ]


def rows_of(ranks: list[StreamLoader], batches: int | None = None) -> list[Row]:
    """The rows of the next micro-batches in global order: tokens, labels, which are new."""
    return [
        row
        for parts in itertools.islice(zip(*ranks, strict=True), batches)
        for inputs, labels in parts
        for row in zip(
            inputs["input"].tolist(), labels.tolist(), inputs["new"].tolist(), strict=True
        )
    ]


def test_rows_are_spread_and_neither_texts_nor_samples_are_lost(
    tokenizer: Tokenizer, background: TokenShards
) -> None:
    rows = rows_of(loaders(tokenizer, background))
    assert len(rows) == 6 * GLOBAL
    replayed = [not any(new) for _, _, new in rows]
    assert replayed == [False, False, True, False, False, True, False, True] * 6
    samples = itertools.islice(plain(background), 6 * 3)
    expected = [(inputs["input"][0].tolist(), labels[0].tolist()) for inputs, labels in samples]
    assert [row[:2] for row, is_replay in zip(rows, replayed, strict=True) if is_replay] == expected
    texts = [row for row, is_replay in zip(rows, replayed, strict=True) if not is_replay]
    assert all(new == [label != -100 for label in labels] for _, labels, new in texts)
    # The last fact has 20 statements, of which each epoch reads the next five.
    last = [
        tokenizer.decode([t for t in labels if t != -100][:-1])
        for _, labels, _ in texts[10:15] + texts[25:30]
    ]
    assert last == list(fact("f20", 20).statements[:10])


@pytest.mark.parametrize(("ranks", "batch"), [(1, 2), (2, 2), (4, 1), (4, 2)])
def test_the_global_batch_does_not_depend_on_ranks(
    tokenizer: Tokenizer, background: TokenShards, ranks: int, batch: int
) -> None:
    whole = rows_of(loaders(tokenizer, background))
    assert rows_of(loaders(tokenizer, background, ranks, batch)) == whole


def test_a_position_is_resumed_on_other_ranks(
    tokenizer: Tokenizer, background: TokenShards
) -> None:
    whole = rows_of(loaders(tokenizer, background))
    first = loaders(tokenizer, background, 2, 2)
    assert rows_of(first, 2 * 2) == whole[: 2 * GLOBAL]
    states = [json.loads(json.dumps(loader.state_dict())) for loader in first]
    assert states[0] == states[1]
    later = loaders(tokenizer, background, 4, 1)
    for loader in later:
        loader.load_state_dict(states[0])
    assert rows_of(later) == whole[2 * GLOBAL :]
    amid = loaders(tokenizer, background, 1, 2)
    rows_of(amid, 5)  # of four micro-batches a step
    assert amid[0].state_dict()["replay"]["sources"][0]["samples_drawn"] == 3


@pytest.mark.parametrize("rows", [0, 2])
def test_another_share_does_not_resume(
    tokenizer: Tokenizer, background: TokenShards, rows: int
) -> None:
    (saved,) = loaders(tokenizer, background)
    (other,) = loaders(tokenizer, background, rows=rows)
    with pytest.raises(CheckpointError, match=r"replay_rows is .* here and 3 in the checkpoint"):
        other.load_state_dict(saved.state_dict())


def test_shares_are_rounded_to_rows() -> None:
    assert [sections.Replay(share).num_rows(64) for share in (0, 0.1, 0.25, 0.5)] == [0, 6, 16, 32]


def test_without_replay_batches_are_as_they_were(
    tokenizer: Tokenizer, background: TokenShards
) -> None:
    (loader,) = loaders(tokenizer, background, rows=0)
    inputs, labels = next(iter(loader))
    assert list(inputs) == ["input"]
    assert torch.equal((labels != -100).any(1), torch.ones(GLOBAL, dtype=torch.bool))
