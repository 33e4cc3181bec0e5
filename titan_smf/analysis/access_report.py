"""What `access_analysis.json` says, as tables, pictures and coloured text; reads files, no torch.

access_analysis.json    everything
access_analysis.html    texts whose tokens are coloured by the slots that they read
access_coverage.png     how much of core set and question each ranking finds, by slots selected
access_core.png         sizes of the core sets
access_sequence.png     reads of core and of selected slots along texts
"""

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ANALYSIS_FILE = "access_analysis.json"
FRAGMENT_FILE = "access_analysis.html"

COLOURS = {"tfidf": "#1f6fd6", "kl": "#129a8a", "tf": "#e07b00", "random": "#8a8f96", "all": "#333"}
CORE, SELECTED = "#e07b00", "#1f6fd6"
STRONGEST = 0.6
"""Opacity of the strongest colour: text stays legible on it, on light and on dark pages."""
LONGEST_SHOWN = 40
"""Tokens of a text in the picture along the sequence."""


def write_report(analysis: dict[str, Any], folder: Path) -> None:
    """Write all files."""
    content = json.dumps(analysis, separators=(",", ":"), allow_nan=False)
    (folder / ANALYSIS_FILE).write_text(content + "\n")
    (folder / FRAGMENT_FILE).write_text(coloured_texts(analysis), encoding="ascii")
    for name, png in draw_all(analysis).items():
        (folder / f"{name}.png").write_bytes(png)


def sentences(analysis: dict[str, Any]) -> list[str]:
    """What was found besides the table: core sets and their common part."""
    summary, core = analysis["summary"], analysis["summary"]["core_quantiles"]
    found = [
        f"{len(analysis['records'])} {analysis['kind']} of {analysis['stream']}, in batches of "
        f"{analysis['batch_size']} texts that touch {summary['touched'][0]:,.0f} slots on average.",
        f"Core set (slots that all texts of a step and the {_question(analysis)} read): median "
        f"{core['50%']:,.0f} slots, 80% between {core['10%']:,.0f} and {core['90%']:,.0f}. "
        f"It holds {_with_interval(summary['core_weight'])} of the {_question(analysis)}'s weight.",
        f"Of the core set {_with_interval(summary['core_common'])} are slots that more than half "
        "of the background documents use, too.",
    ]
    if analysis["kind"] == "facts":
        found.append(
            f"Questions are read as evaluation asks them, in template {analysis['template']}, but "
            "without its examples: the answer is produced at the template's end."
        )
    if summary["core_auc"]:
        found.append(
            "Reads of the core set tell tokens of names from others with an AUC of "
            f"{_with_interval(summary['core_auc'], percent=False)} (0.5 is chance)."
        )
    return found


def measures(analysis: dict[str, Any]) -> dict[str, str]:
    """What is measured of a selection, in words."""
    return {
        "recall": "core set found",
        "weight": f"the {_question(analysis)}'s slot weight covered",
        "auc": "AUC: tokens of names against others",
    }


def table(analysis: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each ranking at `top_t` slots, means with 95% intervals over records."""
    place = analysis["sizes"].index(analysis["top_t"])
    titles = measures(analysis)
    rows = []
    for ranking, found in analysis["summary"]["rankings"].items():
        size = "all touched" if ranking == "all" else f"{analysis['top_t']:,}"
        cells = [_with_interval(found[m][place], percent=m != "auc") for m in titles]
        rows.append([ranking, size, *cells])
    return ["ranking", "slots", *titles.values()], rows


def table_by_size(analysis: dict[str, Any], measure: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: one measure for each ranking and number of selected slots."""
    columns = ["ranking", *(f"{size:,}" for size in analysis["sizes"])]
    rows = [
        [ranking, *(_number(mean, percent=measure != "auc") for mean in found[measure])]
        for ranking, found in analysis["summary"]["rankings"].items()
    ]
    return columns, rows


def text_summary(analysis: dict[str, Any]) -> str:
    """The sentences and all tables, for a terminal."""
    tables = [
        table(analysis),
        *(table_by_size(analysis, measure) for measure in measures(analysis)),
    ]
    titles = ["", *(f"{what}, by number of slots" for what in measures(analysis).values())]
    parts = ["\n".join(sentences(analysis))]
    for title, (columns, rows) in zip(titles, tables, strict=True):
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (columns, *rows)]
        parts.append("\n".join([title, *lines] if title else lines))
    return "\n\n".join(parts)


def coloured_texts(analysis: dict[str, Any]) -> str:
    """An HTML fragment, ASCII, with styles inline and no scripts: each example's texts twice, once
    coloured by reads of the core set, once by reads of the selected slots."""
    kinds = [("core set", 1, CORE), (_selected(analysis), 2, SELECTED)]
    blocks = [_legend(analysis, kinds)]
    for example in analysis["examples"]:
        columns = "".join(_coloured(example, analysis, *kind) for kind in kinds)
        blocks.append(
            f'<p style="font-weight:600;margin:1.2em 0 .3em">{_text(example["id"])}</p>'
            '<div style="display:grid;gap:.6em 1.5em;'
            f'grid-template-columns:repeat(auto-fit,minmax(min(22em,100%),1fr))">{columns}</div>'
        )
    style = "font:.95em/1.9 system-ui,sans-serif;overflow-wrap:anywhere"
    return f'<div style="{style}">{"".join(blocks)}</div>\n'


def draw_all(analysis: dict[str, Any]) -> dict[str, bytes]:
    """PNGs by name."""
    return {
        "access_coverage": _draw_coverage(analysis),
        "access_core": _draw_core(analysis),
        "access_sequence": _draw_sequences(analysis),
    }


def _selected(analysis: dict[str, Any]) -> str:
    if analysis["ranking"] == "all":
        return "slots that the texts read"
    return f"{analysis['top_t']:,} slots selected by {analysis['ranking']}"


def _question(analysis: dict[str, Any]) -> str:
    return "question" if analysis["kind"] == "facts" else "chunk"


def _number(mean: Sequence[float] | None, percent: bool) -> str:
    if mean is None:
        return "-"
    return f"{mean[0]:.1%}" if percent else f"{mean[0]:.2f}"


def _with_interval(mean: Sequence[float] | None, percent: bool = True) -> str:
    if mean is None:
        return "-"
    low, high = (f"{100 * m:.1f}" if percent else f"{m:.2f}" for m in mean[1:])
    return f"{_number(mean, percent)} ({low} to {high})"


def _legend(analysis: dict[str, Any], kinds: Sequence[tuple[str, int, str]]) -> str:
    parts = []
    for name, place, colour in kinds:
        most = _most(analysis, place)
        swatch = f'<span style="{_background(colour, 1)};padding:.1em .4em">{most}</span>'
        parts.append(f"{_text(name)}: {swatch} of a token's {analysis['accesses_per_token']} reads")
    parts.append("the weaker the colour, the fewer")
    parts.append('<span style="text-decoration:underline">names</span> are underlined')
    return f'<p style="margin:0">{"; ".join(parts)}.</p>'


def _most(analysis: dict[str, Any], place: int) -> int:
    """The most reads of a kind by a token that is shown."""
    texts = [t for e in analysis["examples"] for t in (e["question"], *e["texts"])]
    return max((token[place] for text in texts for token in text if token[0]), default=0)


def _coloured(
    example: dict[str, Any], analysis: dict[str, Any], name: str, place: int, colour: str
) -> str:
    """One example's texts, coloured by one kind of reads."""
    most = max(1, _most(analysis, place))
    rows = [(_question(analysis), example["question"]), *(("", text) for text in example["texts"])]
    lines = []
    for label, tokens in rows:
        spans = []
        for piece, *counts, is_name in tokens:
            count = counts[place - 1]
            styles = [_background(colour, count / most) + ";border-radius:2px"] if count else []
            styles += ["text-decoration:underline"] if is_name else []
            title = f"{count} of {analysis['accesses_per_token']}"
            style = f' style="{";".join(styles)}"' if styles else ""
            spans.append(f'<span{style} title="{title}">{_text(piece)}</span>')
        prefix = f'<span style="opacity:.7">{label}: </span>' if label else ""
        lines.append(f'<div style="white-space:pre-wrap">{prefix}{"".join(spans)}</div>')
    head = f'<div style="opacity:.7;font-size:.9em">{_text(name)}</div>'
    return f"<div>{head}{''.join(lines)}</div>"


def _background(colour: str, share: float) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"background:rgba({red},{green},{blue},{STRONGEST * share:.2f})"


def _text(text: str) -> str:
    """Escaped, in ASCII, so that it is read alike in every encoding; what cannot be seen is shown
    as a replacement character."""
    visible = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return html.escape(visible).encode("ascii", "xmlcharrefreplace").decode()


def _draw_coverage(analysis: dict[str, Any]) -> bytes:
    from matplotlib.figure import Figure  # 0.3 s to import

    sizes, summary = analysis["sizes"], analysis["summary"]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axes, (measure, title) in zip(
        figure.subplots(1, 3), measures(analysis).items(), strict=True
    ):
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
        if measure == "weight":
            axes.axhline(summary["core_weight"][0], color="0.2", linestyle=":", label="core set")
        if measure == "auc" and summary["core_auc"]:
            axes.axhline(summary["core_auc"][0], color="0.2", linestyle=":", label="core set")
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("slots selected")
        axes.set_title(title, fontsize=11)
        if measure != "auc":
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
    handles, labels = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return _png(figure)


def _draw_core(analysis: dict[str, Any]) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    sizes = [record["core"] for record in analysis["records"]]
    median = analysis["summary"]["core_quantiles"]["50%"]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    width = max(1, -(-max(sizes) // 60))
    axes.hist(sizes, bins=range(0, max(sizes) + 2 * width, width), color=CORE)
    axes.axvline(median, color="0.2", linestyle=":", label=f"median {median:,.0f}")
    axes.set_xlabel("slots in the core set")
    axes.set_ylabel(analysis["kind"])
    axes.set_title(f"Core sets of {len(sizes):,} {analysis['kind']}", fontsize=11)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _png(figure)


def _draw_sequences(analysis: dict[str, Any]) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [
        (f"{example['id']}: {what}", text[:LONGEST_SHOWN])
        for example in analysis["examples"][:2]
        for what, text in (
            (_question(analysis), example["question"]),
            ("text", example["texts"][0]),
        )
    ]
    reads = analysis["accesses_per_token"]
    longest = max(len(text) for _, text in shown)
    most = max(max(_most(analysis, place) for place in (1, 2)), 1) / reads
    figure = Figure(figsize=(13, 1.9 * len(shown) + 0.5), layout="constrained")
    for axes, (title, text) in zip(figure.subplots(len(shown)), shown, strict=True):
        for place, (_, *counts, is_name) in enumerate(text):
            if is_name:
                axes.axvspan(place - 0.5, place + 0.5, color="0.9", linewidth=0)
            for shift, count, colour in zip((-0.2, 0.2), counts, (CORE, SELECTED), strict=True):
                axes.bar(place + shift, count / reads, width=0.4, color=colour)
        labels = [_label(token[0]) for token in text]
        axes.set_xticks(range(len(text)), labels, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.6, longest - 0.4)
        axes.set_ylim(0, 1.05 * most)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    legend = {
        "reads of the core set": CORE,
        f"reads of the {_selected(analysis)}": SELECTED,
        "token of a name": "0.9",
    }
    handles = [Patch(color=colour, label=label) for label, colour in legend.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False)
    figure.supylabel(f"share of a token's {reads} reads", fontsize=10)
    return _png(figure)


def _label(piece: str) -> str:
    return piece.strip().replace("$", r"\$") or "[space]"


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
