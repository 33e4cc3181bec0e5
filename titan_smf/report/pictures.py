"""The sections of pictures: what learning costs, and how scores move during a run."""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from titan_smf.report.document import EXPLANATIONS, Block, Picture, Section, Text, plain
from titan_smf.report.estimates import mean_of
from titan_smf.report.frontier import Point, frontier
from titan_smf.report.methods import Comparison, Method, Setting
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
"""Rise of a loss in nats: below it the axis is linear, above it logarithmic."""
RISES = [0.002, 0.005, *(digit * 10.0**power for power in range(-2, 3) for digit in (1, 2, 5))]
"""Where that axis may have ticks."""

Style = dict[str, Any]
"""How a method is drawn, the same in all pictures: matplotlib's color, linestyle and marker."""


def styles(methods: Sequence[Method]) -> dict[str, Style]:
    """Return the style of each method by its name; up to 28 methods no two are alike."""
    found = {}
    for index, method in enumerate(methods):
        turn, place = divmod(index, len(COLOURS))
        found[method.name] = {
            "color": COLOURS[place],
            "linestyle": DASHES[turn % len(DASHES)],
            "marker": MARKERS[(place + 2 * turn) % len(MARKERS)],
        }
    return found


def costs_of_learning(comparison: Comparison) -> Section:
    """Return for each set to keep: the target's score against what was kept of the set."""
    blocks: list[Block] = [
        _cost(comparison, evaluated)
        or Text(f"{evaluated.name}: no run was evaluated before and after.")
        for evaluated in comparison.kept
    ]
    return Section("What learning costs", blocks)


def learning_curves(comparison: Comparison) -> Section:
    """Return the target and every set to keep over the steps of a run."""
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
    which = "at its chosen rate"
    if not all(setting.is_chosen for setting in shown.values()):
        which += " or, where none was chosen, at the one that learned most"
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
    area_of = _areas([s for method in comparison.methods for s in method.by_rate])
    entries, drawn = [], []
    for method in comparison.methods:
        places = _places(method, target, evaluated)
        if places:
            _draw_rates(axes, places, evaluated.is_score, style_of[method.name], area_of)
            drawn += [point for point, _ in places]
            shown = mean_of(s.parameters_per_step for s in method.by_rate)
            entries.append((style_of[method.name], f"{method.name}  ({size(shown)})"))
    if not drawn:
        return None
    if evaluated.is_score:
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
    legend(figure, entries, "method  (trainable parameters per step)")
    caption = EXPLANATIONS["cost_of_learning"].format(target=target.label, kept=evaluated.label)
    return Picture(f"{evaluated.name} against learning", png(figure), caption)


def _places(
    method: Method, target: EvaluationSet, evaluated: EvaluationSet
) -> list[tuple[Point, Setting]]:
    """The finite point of each rate: score learned, and share of a score lost or rise of a loss."""
    places = []
    for setting in method.by_rate:
        learned, lost = setting.end(target), setting.forgotten(evaluated)
        cost = lost.mean if lost else None
        if evaluated.is_score:
            cost = setting.forgotten_share(evaluated)
        if learned and cost is not None and math.isfinite(learned.mean) and math.isfinite(cost):
            places.append((Point(learned.mean, cost), setting))
    return places


def _draw_rates(
    axes: Axes,
    places: Sequence[tuple[Point, Setting]],
    is_score: bool,
    style: Style,
    area_of: Callable[[Setting], float],
) -> None:
    """Draw a point for each rate and the line of the frontier."""

    def height(point: Point) -> float:
        return 1 - point.forgetting if is_score else point.forgetting

    best = frontier([point for point, _ in places])
    learned, heights = [point.learning for point in best], [height(point) for point in best]
    axes.plot(learned, heights, **style | {"marker": ""}, linewidth=1.6, zorder=2)
    for point, setting in places:
        on_line = point in best
        axes.scatter(
            point.learning,
            height(point),
            s=area_of(setting),
            marker=style["marker"],
            facecolor=style["color"] if on_line else "none",
            edgecolor="white" if on_line else style["color"],
            alpha=1.0 if on_line else 0.6,
            linewidth=0.8,
            zorder=3,
        )


def _scale_rises(axes: Axes, rises: Sequence[float]) -> None:
    """Turn the vertical axis; make it logarithmic above `LINEAR_RISE` where rises are large."""
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


def _curve(axes: Axes, setting: Setting, evaluated: EvaluationSet, style: Style) -> None:
    by_step: dict[int, list[float]] = {}
    for run in setting.runs:
        for step, estimate in run.values.get(evaluated, {}).items():
            by_step.setdefault(step, []).append(estimate.mean)
    # A step that only some seeds have would make the mean jump.
    most = max(map(len, by_step.values()), default=0)
    steps = sorted(step for step, means in by_step.items() if len(means) == most)
    if not steps:
        return
    means = [math.fsum(by_step[step]) / most for step in steps]
    axes.plot(steps, means, **style, markersize=4, linewidth=1.5)
    if most > 1:
        lows, highs = ([f(by_step[step]) for step in steps] for f in (min, max))
        axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.12, linewidth=0)


def _areas(settings: Sequence[Setting]) -> Callable[[Setting], float]:
    """Areas of points by the logarithm of the trainable parameters per step, from those of all;
    the smallest where they are unknown."""
    logs = [math.log(n) for s in settings if (n := s.parameters_per_step)]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)

    def area(setting: Setting) -> float:
        if not setting.parameters_per_step or low == high:
            return SMALLEST
        share = (math.log(setting.parameters_per_step) - low) / (high - low)
        return SMALLEST + share * (LARGEST - SMALLEST)

    return area


def legend(figure: Figure, entries: Sequence[tuple[Style, str]], title: str = "") -> None:
    """Add an entry for each method below the panels, in as many columns as fit; the figure grows
    by the legend's height."""
    handles = [Line2D([], [], **style, markersize=6, label=_label(t)) for style, t in entries]
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
    """Leave out the frame's upper and right side; draw a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def png(figure: Figure) -> bytes:
    """Return the figure as the content of a PNG file."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in any script
        figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
