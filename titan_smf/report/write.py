"""The report: runs and analyses in, sections in order, files out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from titan_smf.analysis import access_report
from titan_smf.analysis.access_pictures import draw_all
from titan_smf.analysis.coloured_texts import coloured_texts
from titan_smf.report import matched, pictures, slot_usage, tables
from titan_smf.report.document import (
    EXPLANATIONS,
    Block,
    Fragment,
    Picture,
    Points,
    Section,
    Table,
    Text,
    write_document,
)
from titan_smf.report.methods import Comparison, compare
from titan_smf.report.runs import analyses_below, find_runs

SECTIONS: tuple[Callable[[Comparison], Section | None], ...] = (
    matched.at_a_glance,
    tables.learning_and_forgetting,
    matched.matched_learning,
    pictures.costs_of_learning,
    pictures.learning_curves,
    slot_usage.slot_usage,
    tables.all_runs,
)
"""What a report says of a comparison; None where a section has nothing to say."""


def write_report(paths: Sequence[Path], output: Path) -> list[Path]:
    """Write `report.md`, `report.html` and PNGs over all runs in folders; return their paths.

    Raises:
        UserError: a folder holds no run, or no run has evaluations.
    """
    notes: list[str] = []
    sections: list[Section] = []
    for comparison in compare(find_runs(paths, notes), notes):
        sections.append(_summary(comparison))
        made = (make(comparison) for make in SECTIONS)
        sections += [replace(section, level=3) for section in made if section is not None]
    for file in {file.resolve(): file for file in sorted(analyses_below(paths))}.values():
        try:
            sections.append(_accesses(json.loads(file.read_bytes())))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            notes.append(
                f"{file}: not used, it is torn or of another version ({error!r}); run "
                "tools/analyse_accesses.py again"
            )
    left_out: Block = Points(list(dict.fromkeys(notes))) if notes else Text("Nothing.")
    sections.append(Section("What could not be read or used", [left_out]))
    return write_document(output, "Learning and forgetting: a report", sections)


def _summary(comparison: Comparison) -> Section:
    """What was compared, in a sentence."""
    seeds = sorted({run.seed for run in comparison.runs if run.seed is not None})
    kept = ", ".join(evaluated.label for evaluated in comparison.kept) or "nothing"
    text = (
        f"Methods: {len(comparison.methods)}. Runs: {len(comparison.runs)}. "
        f"Seeds: {', '.join(map(str, seeds)) or 'not set'}. "
        f"To be learned: {comparison.target.label}. To be kept: {kept}."
    )
    return Section(f"Target: {comparison.target.name}", [Text(text)])


def _accesses(analysis: dict[str, Any]) -> Section:
    """What tools/analyse_accesses.py found: which slots hold a fact, what each ranking finds."""
    drawn = draw_all(analysis)
    coverage, *others = (Picture(name, png, EXPLANATIONS[name]) for name, png in drawn.items())
    blocks: list[Block] = [
        Text(f"Read from {analysis['checkpoint']}; nothing was trained."),
        Points(access_report.sentences(analysis)),
        Table(
            "What each ranking selects, means with 95% intervals", *access_report.table(analysis)
        ),
        coverage,
        *(
            Table(
                f"{what}, by number of selected slots",
                *access_report.table_by_size(analysis, measure),
                folded=True,
            )
            for measure, what in access_report.measure_titles(analysis).items()
        ),
        *others,
        Fragment(
            coloured_texts(analysis),
            "The texts coloured by the slots that their tokens read are in the HTML page.",
        ),
    ]
    return Section(f"Slots that hold {analysis['kind']} of {analysis['stream']}", blocks)
