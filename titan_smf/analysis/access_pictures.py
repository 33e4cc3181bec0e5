"""Pictures of an analysis, as PNGs."""

import io
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from titan_smf.analysis.access_report import (
    CORE,
    SELECTED,
    measure_titles,
    most_reads,
    question_name,
    selected_slots,
)

COLOURS = {"tfidf": "#1f6fd6", "kl": "#129a8a", "tf": "#e07b00", "random": "#8a8f96", "all": "#333"}
LONGEST_SHOWN = 40
"""Tokens of a text in the picture along the sequence."""


def draw_all(analysis: dict[str, Any]) -> dict[str, bytes]:
    """Draw every picture; returns PNGs by name."""
    pictures = {}
    for name, draw in (
        ("access_coverage", _draw_coverage),
        ("access_core", _draw_core),
        ("access_sequence", _draw_sequences),
    ):
        figure = Figure(layout="constrained")
        draw(figure, analysis)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=120)
        pictures[name] = content.getvalue()
    return pictures


def _draw_coverage(figure: Figure, analysis: dict[str, Any]) -> None:
    """Draw a panel for each measure, over the number of selected slots."""
    figure.set_size_inches(13, 4.2)
    sizes, summary = analysis["sizes"], analysis["summary"]
    titles = measure_titles(analysis).items()
    for axes, (measure, title) in zip(figure.subplots(1, 3), titles, strict=True):
        for ranking, found in summary["rankings"].items():
            means = [mean for mean in found[measure] if mean is not None]
            if len(means) < len(sizes):
                continue
            middle, low, high = zip(*means, strict=True)
            colour = COLOURS[ranking]
            if ranking == "all":
                axes.axhline(middle[0], color=colour, linestyle="--", label="all touched", lw=1.2)
                continue
            axes.plot(sizes, middle, color=colour, marker="o", markersize=4, label=ranking)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        of_core = {"weight": summary["core_weight"], "auc": summary["core_auc"]}.get(measure)
        if of_core:
            axes.axhline(of_core[0], color="0.2", linestyle=":", label="core set")
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("slots selected")
        axes.set_title(title, fontsize=11)
        if measure != "auc":
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.grid(axis="y", color="0.9")
    handles, labels = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)


def _draw_core(figure: Figure, analysis: dict[str, Any]) -> None:
    """Draw a histogram of the core sets' sizes."""
    figure.set_size_inches(9, 3.4)
    sizes = [record["core"] for record in analysis["records"]]
    median = analysis["summary"]["core_quantiles"]["50%"]
    axes = figure.subplots()
    width = max(1, -(-max(sizes) // 60))
    axes.hist(sizes, bins=range(0, max(sizes) + 2 * width, width), color=CORE)
    axes.axvline(median, color="0.2", linestyle=":", label=f"median {median:,.0f}")
    axes.set_xlabel("slots in the core set")
    axes.set_ylabel(analysis["kind"])
    axes.set_title(f"Core sets of {len(sizes):,} {analysis['kind']}", fontsize=11)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)


def _draw_sequences(figure: Figure, analysis: dict[str, Any]) -> None:
    """Draw the reads of each token of two questions and a text of each."""
    shown = [
        (f"{example['id']}: {what}", text[:LONGEST_SHOWN])
        for example in analysis["examples"][:2]
        for what, text in (
            (question_name(analysis), example["question"]),
            ("text", example["texts"][0]),
        )
    ]
    figure.set_size_inches(13, 1.9 * len(shown) + 0.5)
    reads = analysis["accesses_per_token"]
    longest = max(len(text) for _, text in shown)
    most = max(most_reads(analysis, 1), most_reads(analysis, 2), 1) / reads
    for axes, (title, text) in zip(figure.subplots(len(shown)), shown, strict=True):
        for place, (_, *counts, is_name) in enumerate(text):
            if is_name:
                axes.axvspan(place - 0.5, place + 0.5, color="0.9", linewidth=0)
            for shift, count, colour in zip((-0.2, 0.2), counts, (CORE, SELECTED), strict=True):
                axes.bar(place + shift, count / reads, width=0.4, color=colour)
        labels = [token[0].strip().replace("$", r"\$") or "[space]" for token in text]
        axes.set_xticks(range(len(text)), labels, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.6, longest - 0.4)
        axes.set_ylim(0, 1.05 * most)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set_title(title, fontsize=10, loc="left")
    legend = {
        "reads of the core set": CORE,
        f"reads of the {selected_slots(analysis)}": SELECTED,
        "token of a name": "0.9",
    }
    handles = [Patch(color=colour, label=label) for label, colour in legend.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False)
    figure.supylabel(f"share of a token's {reads} reads", fontsize=10)
