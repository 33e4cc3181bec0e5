"""The section about slots: how the selections of sparse runs spread over the memory.

Reads `selections.jsonl` of a run (`selection.log`), and the background's document frequencies if
its `selection.idf_path` can be found.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from titan_smf import storage
from titan_smf.errors import UserError
from titan_smf.report.document import EXPLANATIONS, Picture, Section, Table, Text
from titan_smf.report.methods import Comparison
from titan_smf.report.pictures import legend, plain_axes, png, styles
from titan_smf.report.runs import Run, read_lines
from titan_smf.report.tables import NOTHING, percent

SELECTIONS = "selections.jsonl"
QUANTILES = (0.1, 0.5, 0.9, 0.99)
LINEAR_DF = 0.01
"""Share of the documents: below it the axis of df is linear, above it logarithmic."""

Integers = npt.NDArray[np.int64]
Frequencies = npt.NDArray[np.float64]
"""(N slots,) share of the background's documents in which each slot occurs."""


@dataclass(frozen=True)
class Selections:
    """The slots that a run selected."""

    sets: Sequence[Integers]
    """(t,) slot ids of each step, no id twice in one."""

    @property
    def times(self) -> tuple[Integers, Integers]:
        """Ids of the slots selected at least once, and in how many steps each was."""
        slots, times = np.unique(np.concatenate(self.sets), return_counts=True)
        return slots, times.astype(np.int64)

    @property
    def slots_per_step(self) -> float:
        return sum(map(len, self.sets)) / len(self.sets)

    @property
    def overlap_of_neighbours(self) -> float | None:
        """Share of a step's slots that the step before had selected, averaged; None of one step."""
        shares = [
            len(np.intersect1d(now, before, assume_unique=True)) / len(now)
            for before, now in zip(self.sets, self.sets[1:], strict=False)
            if len(now)
        ]
        return sum(shares) / len(shares) if shares else None

    @property
    def overlap_of_pairs(self) -> float | None:
        """Slots that two steps have in common, over all pairs of steps, by the slots of a step.

        A slot selected n times is in common to n (n - 1) / 2 pairs.
        """
        steps = len(self.sets)
        if steps < 2 or not self.slots_per_step:
            return None
        times = self.times[1]
        in_common = float((times * (times - 1) // 2).sum()) / (steps * (steps - 1) / 2)
        return in_common / self.slots_per_step

    def frequencies(self, background: Frequencies) -> Frequencies:
        """Return the document frequency of each selection."""
        return np.repeat(background[self.times[0]], self.times[1])


def slot_usage(comparison: Comparison) -> Section | None:
    """Return how often slots were selected, how much steps share, how common the slots are.

    One run a method: that of the lowest seed, at the rate that the pictures show. None if no run
    logged its selections.
    """
    selections: dict[str, Selections] = {}
    backgrounds: dict[str, Frequencies] = {}
    for method in comparison.methods:
        runs = sorted(method.shown(comparison.target).runs, key=lambda run: run.seed or 0)
        run = next((run for run in runs if (run.folder / SELECTIONS).is_file()), None)
        if run is None or (selected := _read_selections(run, comparison.notes)) is None:
            continue
        selections[method.name] = selected
        background = _read_frequencies(run, int(selected.times[0][-1]), comparison.notes)
        if background is not None:
            backgrounds[method.name] = background
    if not selections:
        return None
    rows = [[name, *_cells(s, backgrounds.get(name))] for name, s in selections.items()]
    columns = ["method", "steps", "slots per step", "different slots", "selected once"]
    columns += ["shared with the step before", "shared by two steps"]
    columns += [f"df, {quantile:.0%} of selections below" for quantile in QUANTILES]
    caption = "Slots selected, one run a method; df in % of the background's documents"
    explained = EXPLANATIONS["slot_usage"]
    background = next(iter(backgrounds.values()), None)
    if background is not None and (background > 0).any():
        used = background[background > 0]
        explained += EXPLANATIONS["slots_of_background"].format(
            used=len(used), slots=len(background), quantiles=", ".join(_quantiles(used))
        )
    drawn = _picture(comparison, selections, backgrounds)
    return Section("Slot usage", [drawn, Table(caption, columns, rows), Text(explained)])


def _read_selections(run: Run, notes: list[str]) -> Selections | None:
    """What a run selected; None, and a note, if it cannot be read."""
    path = run.folder / SELECTIONS
    try:
        sets = [np.array(line["slots"], np.int64) for line in read_lines(path, notes)]
        if not sum(map(len, sets)):
            raise ValueError("no slot was selected")
    except (KeyError, ValueError, TypeError) as error:
        notes.append(f"{path}: not used: {type(error).__name__}: {error}")
        return None
    return Selections(sets)


def _read_frequencies(run: Run, last_slot: int, notes: list[str]) -> Frequencies | None:
    """The frequencies that a run's configuration names; None, and a note, if there are none for
    slots up to the last one that it selected.

    A relative path is looked for here, then beside the run's folder and those above it. Read
    without `sparse.idf_file`, which imports torch.
    """
    named = run.idf_path
    if not named:
        return None
    places = [named]
    if storage.is_local(named) and not Path(named).is_absolute():
        places += [str(folder / named) for folder in run.folder.resolve().parents]
    try:
        path = next((place for place in places if storage.exists(place)), None)
        if path is None:
            raise storage.missing(named)
        content = storage.read_bytes(path)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        ranges = json.loads(header["__metadata__"]["idf"])["ranges"]
        documents = sum(stop - start for start, stop in ranges)
        df = safetensors.numpy.load(content)["df"]
        if documents < 1 or len(df) <= last_slot:
            raise ValueError(
                f"{documents} documents, {len(df)} slots, and slot {last_slot} selected"
            )
        return df / documents
    except (UserError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        notes.append(f"{run.folder}: document frequencies not used: {named}: {error}")
        return None


def _cells(selections: Selections, background: Frequencies | None) -> list[str]:
    """A row of the table; the last cells are quantiles over selections, each counted."""
    times = selections.times[1]
    shares = (selections.overlap_of_neighbours, selections.overlap_of_pairs)
    return [
        f"{len(selections.sets):,}",
        f"{selections.slots_per_step:,.0f}",
        f"{len(times):,}",
        percent(float((times == 1).mean())),
        *(percent(share) or NOTHING for share in shares),
        *(
            [NOTHING] * len(QUANTILES)
            if background is None
            else _quantiles(selections.frequencies(background))
        ),
    ]


def _quantiles(frequencies: Frequencies) -> list[str]:
    return [percent(float(value)) for value in np.quantile(frequencies, QUANTILES)]


def _picture(
    comparison: Comparison, selections: dict[str, Selections], backgrounds: dict[str, Frequencies]
) -> Picture:
    """Left: how many slots were selected n times or more. Right: df of what was selected."""
    style_of = {n: s | {"marker": ""} for n, s in styles(comparison.methods).items()}
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, *right = figure.subplots(1, 2 if backgrounds else 1, squeeze=False)[0]
    for name, selected in selections.items():
        times = np.sort(selected.times[1])
        reached, first = np.unique(times, return_index=True)
        left.plot(reached, len(times) - first, drawstyle="steps-post", **style_of[name])
        if name in backgrounds:
            _distribution(right[0], selected.frequencies(backgrounds[name]), **style_of[name])
    left.set(xscale="log", yscale="log", xlabel="times selected, n")
    left.set_ylabel("slots selected n times or more")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    plain_axes(left)
    if backgrounds:
        background = next(iter(backgrounds.values()))
        used = background[background > 0]
        _distribution(right[0], used, color="0.6", linewidth=4, alpha=0.6, zorder=1)
        right[0].set_xscale("symlog", linthresh=LINEAR_DF)
        right[0].set(xlabel="share of background documents that use the slot (df)", ylim=(0, 1.02))
        right[0].set_ylabel("share of selections below (grey: of all slots in use)")
        for axis in (right[0].xaxis, right[0].yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))
        plain_axes(right[0])
    legend(figure, [(style_of[name], name) for name in selections])
    caption = "How often slots were selected" + (
        ", and how common in the background the selected ones are." if backgrounds else "."
    )
    return Picture("slot usage", png(figure), caption)


def _distribution(axes: Axes, frequencies: Frequencies, **line: Any) -> None:
    """Draw the share of frequencies up to each value."""
    values, last = np.unique(np.sort(frequencies)[::-1], return_index=True)
    shares = 1 - last / len(frequencies)
    axes.plot([0, *values], [0, *shares], drawstyle="steps-post", **line)
