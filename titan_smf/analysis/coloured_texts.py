"""The texts of an analysis as HTML, their tokens coloured by the slots that they read."""

import html
from collections.abc import Sequence
from typing import Any

from titan_smf.analysis.access_report import (
    CORE,
    SELECTED,
    most_reads,
    question_name,
    selected_slots,
)

STRONGEST = 0.6
"""Opacity of the strongest colour: text stays legible on it, on light and on dark pages."""


def coloured_texts(analysis: dict[str, Any]) -> str:
    """Return an HTML fragment, ASCII, with inline styles and no scripts.

    It shows each example's texts twice: coloured by reads of the core set, and of the selected
    slots.
    """
    kinds = [("core set", 1, CORE), (selected_slots(analysis), 2, SELECTED)]
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


def _legend(analysis: dict[str, Any], kinds: Sequence[tuple[str, int, str]]) -> str:
    reads = analysis["accesses_per_token"]
    parts = []
    for name, place, colour in kinds:
        style = f"{_background(colour, 1)};padding:.1em .4em"
        swatch = f'<span style="{style}">{most_reads(analysis, place)}</span>'
        parts.append(f"{_text(name)}: {swatch} of a token's {reads} reads")
    parts.append("the weaker the colour, the fewer")
    parts.append('<span style="text-decoration:underline">names</span> are underlined')
    return f'<p style="margin:0">{"; ".join(parts)}.</p>'


def _coloured(
    example: dict[str, Any], analysis: dict[str, Any], name: str, place: int, colour: str
) -> str:
    """Return one example's texts, coloured by one kind of reads."""
    most = max(1, most_reads(analysis, place))
    prefix = f'<span style="opacity:.7">{question_name(analysis)}: </span>'
    lines = []
    for tokens in (example["question"], *example["texts"]):
        spans = []
        for token in tokens:
            count, is_name = token[place], token[-1]
            styles = [_background(colour, count / most) + ";border-radius:2px"] if count else []
            styles += ["text-decoration:underline"] if is_name else []
            style = f' style="{";".join(styles)}"' if styles else ""
            title = f"{count} of {analysis['accesses_per_token']}"
            spans.append(f'<span{style} title="{title}">{_text(token[0])}</span>')
        lines.append(f'<div style="white-space:pre-wrap">{prefix}{"".join(spans)}</div>')
        prefix = ""
    head = f'<div style="opacity:.7;font-size:.9em">{_text(name)}</div>'
    return f"<div>{head}{''.join(lines)}</div>"


def _background(colour: str, share: float) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"background:rgba({red},{green},{blue},{STRONGEST * share:.2f})"


def _text(text: str) -> str:
    """Escape into ASCII, read alike in every encoding; invisible characters are replaced."""
    visible = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return html.escape(visible).encode("ascii", "xmlcharrefreplace").decode()
