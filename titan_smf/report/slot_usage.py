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
from titan_smf.report.document import Picture, Section, Table, Text
from titan_smf.report.methods import Comparison
from titan_smf.report.pictures import legend, plain_axes, png, styles
from titan_smf.report.runs import Run, read_lines
from titan_smf.report.tables import NOTHING, percent

SELECTIONS = "selections.jsonl"
QUANTILES = (0.1, 0.5, 0.9, 0.99)
LINEAR_DF = 0.01
"""Share of the documents: below it the axis of df is linear, above logarithmic."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Selections:
    """What a run selected, step by step.

    Args:
        sets: (t,) slot ids of each step, no id twice in one.
    """

    sets: Sequence[Integers]

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


def slot_usage(comparison: Comparison) -> Section | None:
    """How often slots were selected, how much steps share, how common the slots are elsewhere.

    One run a method: that of the lowest seed, at the rate that the pictures show. None if no run
    logged its selections.
    """
    selections: dict[str, Selections] = {}
    frequencies: dict[str, Frequencies] = {}
    for method in comparison.methods:
        runs = sorted(method.shown(comparison.target).runs, key=lambda run: run.seed or 0)
        run = next((run for run in runs if (run.folder / SELECTIONS).is_file()), None)
        if run is None or (selected := read_selections(run, comparison.notes)) is None:
            continue
        selections[method.name] = selected
        background = read_frequencies(run, int(selected.times[0][-1]), comparison.notes)
        if background is not None:
            frequencies[method.name] = background
    if not selections:
        return None
    rows = [
        [name, *_numbers(s), *_quantiles(s, frequencies.get(name))]
        for name, s in selections.items()
    ]
    columns = ["method", "steps", "slots a step", "different slots", "selected once"]
    columns += ["shared with the step before", "shared by two steps"]
    columns += [f"df, {quantile:.0%} of selections below" for quantile in QUANTILES]
    caption = "Slots selected, one run a method; df in % of the background's documents"
    used = _used_quantiles(frequencies)
    explained = (
        "Steps share slots where they need the same ones: steps in a row often learn the same "
        f"fact, pairs of steps mostly do not.{used}"
    )
    drawn = _picture(comparison, selections, frequencies)
    return Section("Slot usage", [drawn, Table(caption, columns, rows), Text(explained)])


@dataclass(frozen=True)
class Frequencies:
    """In how many of the background's documents each slot occurs."""

    df: npt.NDArray[np.int32]
    documents: int


def read_selections(run: Run, notes: list[str]) -> Selections | None:
    """Returns what a run selected; None, and a note, if nothing can be read."""
    path = run.folder / SELECTIONS
    try:
        sets = [np.array(line["slots"], np.int64) for line in read_lines(path, notes)]
        if not sum(map(len, sets)):
            raise ValueError("no slot was selected")
    except (KeyError, ValueError, TypeError) as error:
        notes.append(f"{path}: not used: {type(error).__name__}: {error}")
        return None
    return Selections(sets)


def read_frequencies(run: Run, last_slot: int, notes: list[str]) -> Frequencies | None:
    """Returns the counts that a run's configuration names; None, and a note, if there are none for
    slots up to the last one that it selected.

    A relative path is looked for here, then beside the run's folder and those above it.
    """
    named = str(run.config.get("selection", {}).get("idf_path", ""))
    if not named:
        return None
    near = [str(folder / named) for folder in run.folder.resolve().parents]
    places = (
        [named, *near] if storage.is_local(named) and not Path(named).is_absolute() else [named]
    )
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
        return Frequencies(df, documents)
    except (UserError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        notes.append(f"{run.folder}: document frequencies not used: {named}: {error}")
        return None


def _numbers(selections: Selections) -> list[str]:
    times = selections.times[1]
    shares = (selections.overlap_of_neighbours, selections.overlap_of_pairs)
    return [
        f"{len(selections.sets):,}",
        f"{selections.slots_per_step:,.0f}",
        f"{len(times):,}",
        percent(float((times == 1).mean())),
        *(percent(share) or NOTHING for share in shares),
    ]


def _quantiles(selections: Selections, background: Frequencies | None) -> list[str]:
    """Of the document frequency of what was selected, each selection counted."""
    if background is None:
        return [NOTHING] * len(QUANTILES)
    slots, times = selections.times
    df = np.repeat(background.df[slots], times) / background.documents
    return [percent(float(value)) for value in np.quantile(df, QUANTILES)]


def _used_quantiles(frequencies: dict[str, Frequencies]) -> str:
    """The same of all slots that the background uses, for comparison; of the first background."""
    background = next(iter(frequencies.values()), None)
    if background is None or not (background.df > 0).any():
        return ""
    df = background.df[background.df > 0] / background.documents
    values = ", ".join(percent(float(value)) for value in np.quantile(df, QUANTILES))
    return (
        f" Of all slots that the background uses ({len(df):,} of {len(background.df):,}) the same "
        f"quantiles of df are {values}."
    )


def _picture(
    comparison: Comparison, selections: dict[str, Selections], frequencies: dict[str, Frequencies]
) -> Picture:
    """Left: how many slots were selected n times or more. Right: df of what was selected."""
    style_of = styles(comparison.methods)
    panels = 2 if frequencies else 1
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, *right = figure.subplots(1, panels, squeeze=False)[0]
    for name, selected in selections.items():
        line = {"color": style_of[name].colour, "linestyle": style_of[name].dash}
        times = np.sort(selected.times[1])
        reached, first = np.unique(times, return_index=True)
        left.plot(reached, len(times) - first, drawstyle="steps-post", **line)
        if name in frequencies:
            background, (slots, counts) = frequencies[name], selected.times
            df = np.sort(np.repeat(background.df[slots], counts)) / background.documents
            _distribution(right[0], df, **line)
    left.set(xscale="log", yscale="log", xlabel="times selected, n")
    left.set_ylabel("slots selected n times or more")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    plain_axes(left)
    if frequencies:
        background = next(iter(frequencies.values()))
        df = np.sort(background.df[background.df > 0]) / background.documents
        _distribution(right[0], df, color="0.6", linewidth=4, alpha=0.6, zorder=1)
        right[0].set_xscale("symlog", linthresh=LINEAR_DF)
        right[0].set(xlabel="share of background documents that use the slot (df)", ylim=(0, 1.02))
        right[0].set_ylabel("share of selections below (grey: of all slots in use)")
        for axis in (right[0].xaxis, right[0].yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))
        plain_axes(right[0])
    legend(figure, [(style_of[name], name) for name in selections], markers=False)
    caption = "How often slots were selected" + (
        ", and how common in the background the selected ones are." if frequencies else "."
    )
    return Picture("slot usage", png(figure), caption)


def _distribution(axes: Axes, ascending: npt.NDArray[np.float64], **line: Any) -> None:
    values, last = np.unique(ascending[::-1], return_index=True)
    shares = 1 - last / len(ascending)
    axes.plot([0, *values], [0, *shares], drawstyle="steps-post", **line)
