"""The sections of pictures: what learning costs, and how scores move during a run."""

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from titan_smf.report.document import Block, Picture, Section, Text, plain
from titan_smf.report.frontier import Point, frontier
from titan_smf.report.methods import Comparison, Method, Setting, mean_of
from titan_smf.report.runs import EvaluationSet
from titan_smf.report.tables import size

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#222222")
"""Told apart with any kind of colour vision (Okabe and Ito 2008), all but their yellow."""
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
MARKERS = "os^DvP*"
SMALLEST, LARGEST = 45.0, 280.0
"""Areas of points, in square points of print."""
LEGEND_COLUMNS = 3
"""At most."""
LINEAR_RISE = 0.01
"""Of a loss, nats: below it the axis is linear, above logarithmic."""
RISES = [0.002, 0.005, *(digit * 10.0**power for power in range(-2, 3) for digit in (1, 2, 5))]
"""Where that axis may have ticks."""


@dataclass(frozen=True)
class Style:
    """How a method is drawn, the same in all pictures."""

    colour: str
    dash: object
    marker: str


def styles(methods: Sequence[Method]) -> dict[str, Style]:
    """Returns the style of each method; no two are alike up to 28 of them."""
    found = {}
    for index, method in enumerate(methods):
        turn, place = divmod(index, len(COLOURS))
        marker = MARKERS[(place + 2 * turn) % len(MARKERS)]
        found[method.name] = Style(COLOURS[place], DASHES[turn % len(DASHES)], marker)
    return found


def costs_of_learning(comparison: Comparison) -> Section:
    """For each set to keep: target score against what was kept of it."""
    blocks: list[Block] = []
    for evaluated in comparison.kept:
        picture = _cost(comparison, evaluated)
        if picture is None:
            blocks.append(Text(f"{evaluated.name}: no run was evaluated before and after."))
        else:
            blocks.append(picture)
    return Section("What learning costs", blocks)


def learning_curves(comparison: Comparison) -> Section:
    """The target and every set to keep over the steps of a run."""
    shown = {method.name: method.shown(comparison.target) for method in comparison.methods}
    drawn = [comparison.target, *comparison.kept]
    columns = min(2, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(10, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    style_of = styles(comparison.methods)
    for axes, evaluated in zip(panels, drawn, strict=False):
        for name, setting in shown.items():
            _curve(axes, setting, evaluated, style_of[name])
        axes.set_title(_label(evaluated.label), loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        plain_axes(axes)
    for axes in panels[len(drawn) :]:
        axes.set_axis_off()
    legend(figure, [(style_of[n], f"{n}, rate {s.rate}") for n, s in shown.items()])
    which = (
        "at its chosen rate"
        if all(s.is_chosen for s in shown.values())
        else ("at its chosen rate or, where none was chosen, at the one that learned most")
    )
    caption = (
        f"Scores during the runs, each method {which}; mean over seeds, the band from the lowest "
        "to the highest."
    )
    return Section("Learning curves", [Picture("learning curves", png(figure), caption)])


def _cost(comparison: Comparison, evaluated: EvaluationSet) -> Picture | None:
    """Up and to the right is better: scores kept in % of the start, losses' rise downwards."""
    target = comparison.target
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots()
    style_of = styles(comparison.methods)
    areas = Areas([s for method in comparison.methods for s in method.by_rate])
    entries, drawn = [], []
    for method in comparison.methods:
        if points := _draw_rates(axes, method, target, evaluated, style_of[method.name], areas):
            drawn += points
            shown = mean_of(s.numbers_per_step for s in method.by_rate)
            entries.append((style_of[method.name], f"{method.name}  ({size(shown)})"))
    if not drawn:
        return None
    if evaluated.metric.higher_is_better:
        axes.set_ylabel(f"{_label(evaluated.label)} kept, % of start")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.axhline(1.0, color="0.75", linewidth=1, zorder=1)
        axes.set_ylim(bottom=min(axes.get_ylim()[0], 0.8))
    else:
        axes.set_ylabel(f"rise of {_label(evaluated.label)} (axis turned: up is better)")
        axes.axhline(0.0, color="0.75", linewidth=1, zorder=1)
        _scale_rises(axes, [point.forgetting for point in drawn])
    # From 0 on: small differences shall look small.
    learned = [point.learning for point in drawn]
    axes.set_xlim(min(0.0, *learned), 1.06 * max(0.1, *learned))
    axes.set_xlabel(f"{_label(target.label)} after training  \N{RIGHTWARDS ARROW} learned more")
    plain_axes(axes)
    legend(figure, entries, "method  (numbers that a step trains)")
    caption = (
        f"{target.label} against {evaluated.label}: up and to the right is better. One point a "
        "rate, mean over seeds, its size by the trainable numbers of a step (logarithmic). Lines "
        "join the points that no other one of the method beats; hollow points are beaten."
    )
    return Picture(f"{evaluated.name} against learning", png(figure), caption)


def _draw_rates(
    axes: Axes,
    method: Method,
    target: EvaluationSet,
    evaluated: EvaluationSet,
    style: Style,
    areas: "Areas",
) -> list[Point]:
    """A point for each rate and the line of the frontier; returns the finite points."""
    is_score = evaluated.metric.higher_is_better
    places: list[tuple[Point, Setting]] = []
    for setting in method.by_rate:
        learned, cost = setting.end(target), _cost_of(setting, evaluated)
        if learned and cost is not None and math.isfinite(learned.mean) and math.isfinite(cost):
            places.append((Point(learned.mean, cost), setting))

    def height(point: Point) -> float:
        return 1 - point.forgetting if is_score else point.forgetting

    best = frontier([point for point, _ in places])
    axes.plot(
        [point.learning for point in best],
        [height(point) for point in best],
        color=style.colour,
        linestyle=style.dash,
        linewidth=1.6,
        zorder=2,
    )
    for point, setting in places:
        on_line = point in best
        axes.scatter(
            point.learning,
            height(point),
            s=areas.of(setting),
            marker=style.marker,
            facecolor=style.colour if on_line else "none",
            edgecolor="white" if on_line else style.colour,
            alpha=1.0 if on_line else 0.6,
            linewidth=0.8,
            zorder=3,
        )
    return [point for point, _ in places]


def _scale_rises(axes: Axes, rises: Sequence[float]) -> None:
    """The vertical axis for rises, turned; logarithmic above `LINEAR_RISE` where they are large."""
    low, high = min(0.0, *rises), max(LINEAR_RISE, *rises)
    if high <= 10 * LINEAR_RISE:
        margin = 0.06 * (high - low)
        axes.set_ylim(high + margin, low - margin)
        return
    axes.set_yscale("symlog", linthresh=LINEAR_RISE)
    low, high = 1.5 * low - LINEAR_RISE / 10, 1.5 * high
    ticks = [0.0, *(sign * rise for rise in RISES for sign in (-1, 1))]
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.set_ylim(high, low)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _cost_of(setting: Setting, evaluated: EvaluationSet) -> float | None:
    """The share of a score that was lost, or the rise of a loss."""
    if evaluated.metric.higher_is_better:
        return setting.forgotten_share(evaluated)
    forgotten = setting.forgotten(evaluated)
    return None if forgotten is None else forgotten.mean


def _curve(axes: Axes, setting: Setting, evaluated: EvaluationSet, style: Style) -> None:
    by_step: dict[int, list[float]] = {}
    for run in setting.runs:
        for step, estimate in run.values.get(evaluated.name, {}).items():
            by_step.setdefault(step, []).append(estimate.mean)
    # A step that only some seeds have would make the mean jump.
    most = max(map(len, by_step.values()), default=0)
    steps = sorted(step for step, means in by_step.items() if len(means) == most)
    if not steps:
        return
    means = [math.fsum(by_step[step]) / most for step in steps]
    axes.plot(
        steps,
        means,
        color=style.colour,
        linestyle=style.dash,
        marker=style.marker,
        markersize=4,
        linewidth=1.5,
    )
    if most > 1:
        lows, highs = ([f(by_step[step]) for step in steps] for f in (min, max))
        axes.fill_between(steps, lows, highs, color=style.colour, alpha=0.12, linewidth=0)


class Areas:
    """Areas of points by the logarithm of a step's trainable numbers, from those of all points."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        logs = [math.log(n) for s in settings if (n := s.numbers_per_step)]
        self.low, self.high = (min(logs), max(logs)) if logs else (0.0, 0.0)

    def of(self, setting: Setting) -> float:
        """In square points; the smallest where the numbers are unknown."""
        if not setting.numbers_per_step or self.low == self.high:
            return SMALLEST
        share = (math.log(setting.numbers_per_step) - self.low) / (self.high - self.low)
        return SMALLEST + share * (LARGEST - SMALLEST)


def legend(
    figure: Figure, entries: Sequence[tuple[Style, str]], title: str = "", markers: bool = True
) -> None:
    """Below the panels, an entry for each method, in as many columns as fit; the figure grows by
    its height."""
    handles = [
        Line2D(
            [],
            [],
            color=s.colour,
            linestyle=s.dash,
            marker=s.marker if markers else "",
            markersize=6,
            label=_label(t),
        )
        for s, t in entries
    ]
    for columns in range(LEGEND_COLUMNS, 0, -1):
        drawn = figure.legend(
            handles=handles,
            loc="outside lower left",
            ncols=columns,
            frameon=False,
            fontsize=9.5,
            title=title,
            title_fontsize=9.5,
            alignment="left",
            handlelength=3,
            columnspacing=1.5,
        )
        extent = drawn.get_window_extent()
        if extent.width <= figure.bbox.width or columns == 1:
            break
        drawn.remove()
    figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)


def _label(text: str, width: int = 34) -> str:
    """Text for a picture: wrapped, cut at three lines, dollars not read as mathematics."""
    lines = wrap(plain(text), width) or [""]
    if len(lines) > 3:
        lines = [*lines[:2], f"{lines[2][: width - 1]}\N{HORIZONTAL ELLIPSIS}"]
    return "\n".join(lines).replace("$", r"\$")


def plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def png(figure: Figure) -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in any script
        figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
