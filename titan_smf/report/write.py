"""The report: runs in, sections in order, files out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from titan_smf.report import matched, overview, pictures, slot_usage, tables
from titan_smf.report.access import access_sections
from titan_smf.report.document import Points, Section, Text, write_document
from titan_smf.report.methods import Comparison, compare
from titan_smf.report.runs import find_runs

SectionMaker = Callable[[Comparison], Section | None]
"""Makes a section of a comparison, None if it has nothing to say."""

SECTIONS: tuple[SectionMaker, ...] = (
    overview.at_a_glance,
    tables.learning_and_forgetting,
    matched.matched_learning,
    pictures.costs_of_learning,
    pictures.learning_curves,
    slot_usage.slot_usage,
    tables.all_runs,
)


def write_report(paths: Sequence[Path], output: Path) -> list[Path]:
    """Writes `report.md`, `report.html` and PNGs over all runs in folders; returns their paths.

    Raises:
        UserError: a folder holds no run, or no run has evaluations.
    """
    notes: list[str] = []
    comparisons = compare(find_runs(paths, notes), notes)
    sections: list[Section] = []
    for comparison in comparisons:
        sections.append(_summary(comparison))
        made = (make(comparison) for make in SECTIONS)
        sections += [replace(section, level=3) for section in made if section is not None]
    sections += access_sections(paths, notes)
    sections.append(_left_out(notes))
    return write_document(output, "Learning and forgetting: a report", sections)


def _summary(comparison: Comparison) -> Section:
    """What was compared, in a sentence."""
    runs, kept = comparison.runs, comparison.kept
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    kept_names = ", ".join(evaluated.label for evaluated in kept) or "nothing"
    text = (
        f"Methods: {len(comparison.methods)}. Runs: {len(runs)}. "
        f"Seeds: {', '.join(map(str, seeds)) or 'not set'}. "
        f"To be learned: {comparison.target.label}. To be kept: {kept_names}."
    )
    return Section(f"Target: {comparison.target.name}", [Text(text)])


def _left_out(notes: Sequence[str]) -> Section:
    """Everything that could not be read or used, by name."""
    blocks = [Points(list(dict.fromkeys(notes)))] if notes else [Text("Nothing.")]
    return Section("What could not be read or used", [*blocks])
