"""An analysis in sentences and tables, and the names that its pictures share; imports no torch."""

from collections.abc import Sequence
from typing import Any

ANALYSIS_FILE = "access_analysis.json"

CORE, SELECTED = "#e07b00", "#1f6fd6"
"""The colours of reads of the core set and of the selected slots."""


def sentences(analysis: dict[str, Any]) -> list[str]:
    """Describe the core sets: how large they are, and what reads them."""
    summary, core = analysis["summary"], analysis["summary"]["core_quantiles"]
    question = question_name(analysis)
    found = [
        f"{len(analysis['records'])} {analysis['kind']} of {analysis['stream']}, in batches of "
        f"{analysis['batch_size']} texts that touch {summary['touched'][0]:,.0f} slots on average.",
        f"Core set (slots that all texts of a step and the {question} read): median "
        f"{core['50%']:,.0f} slots, 80% between {core['10%']:,.0f} and {core['90%']:,.0f}. "
        f"It holds {_with_interval(summary['core_weight'])} of the {question}'s weight.",
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


def table(analysis: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: each ranking at `top_t` slots, means with 95% intervals."""
    place = analysis["sizes"].index(analysis["top_t"])
    titles = measure_titles(analysis)
    rows = []
    for ranking, found in analysis["summary"]["rankings"].items():
        size = "all touched" if ranking == "all" else f"{analysis['top_t']:,}"
        cells = [_with_interval(found[m][place], percent=m != "auc") for m in titles]
        rows.append([ranking, size, *cells])
    return ["ranking", "slots", *titles.values()], rows


def table_by_size(analysis: dict[str, Any], measure: str) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: one measure for each ranking and number of selected slots."""
    columns = ["ranking", *(f"{size:,}" for size in analysis["sizes"])]
    rows = [
        [ranking, *(_number(mean, percent=measure != "auc") for mean in found[measure])]
        for ranking, found in analysis["summary"]["rankings"].items()
    ]
    return columns, rows


def text_summary(analysis: dict[str, Any]) -> str:
    """Return the sentences and all tables, for a terminal."""
    from titan_smf.runtime import format_table  # imports torch, which a report does without

    columns, rows = table(analysis)
    parts = ["\n".join(sentences(analysis)), format_table([columns, *rows])]
    for measure, what in measure_titles(analysis).items():
        columns, rows = table_by_size(analysis, measure)
        parts.append(f"{what}, by number of slots\n{format_table([columns, *rows])}")
    return "\n\n".join(parts)


def _number(mean: Sequence[float] | None, percent: bool) -> str:
    if mean is None:
        return "-"
    return f"{mean[0]:.1%}" if percent else f"{mean[0]:.2f}"


def _with_interval(mean: Sequence[float] | None, percent: bool = True) -> str:
    if mean is None:
        return "-"
    low, high = (f"{100 * m:.1f}" if percent else f"{m:.2f}" for m in mean[1:])
    return f"{_number(mean, percent)} ({low} to {high})"


def question_name(analysis: dict[str, Any]) -> str:
    return "question" if analysis["kind"] == "facts" else "chunk"


def selected_slots(analysis: dict[str, Any]) -> str:
    if analysis["ranking"] == "all":
        return "slots that the texts read"
    return f"{analysis['top_t']:,} slots selected by {analysis['ranking']}"


def most_reads(analysis: dict[str, Any], place: int) -> int:
    """The most reads of a kind by a token that is shown."""
    texts = [t for e in analysis["examples"] for t in (e["question"], *e["texts"])]
    return max((token[place] for text in texts for token in text if token[0]), default=0)


def measure_titles(analysis: dict[str, Any]) -> dict[str, str]:
    """Return the title of each measure of a selection."""
    return {
        "recall": "core set found",
        "weight": f"the {question_name(analysis)}'s slot weight covered",
        "auc": "AUC: tokens of names against others",
    }
