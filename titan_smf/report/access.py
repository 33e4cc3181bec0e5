"""The section about accesses: which slots hold a fact, and what each ranking finds of them.

Reads `access_analysis.json`, which tools/analyse_accesses.py writes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_smf.analysis import access_report
from titan_smf.report.document import Fragment, Picture, Points, Section, Table, Text


def access_sections(paths: Sequence[Path], notes: list[str]) -> list[Section]:
    """Returns a section for each analysis in folders and below them, by path, each once."""
    found = {file.resolve(): file for file in sorted(analyses_below(paths))}
    sections = []
    for file in found.values():
        try:
            sections.append(_section(json.loads(file.read_bytes())))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            notes.append(
                f"{file}: not used, it is torn or of another version ({error!r}); run "
                "tools/analyse_accesses.py again"
            )
    return sections


def analyses_below(paths: Sequence[Path]) -> list[Path]:
    """The files of analyses in folders and below them."""
    return [file for path in paths for file in path.rglob(access_report.ANALYSIS_FILE)]


def _section(analysis: dict[str, Any]) -> Section:
    title = f"Slots that hold {analysis['kind']} of {analysis['stream']}"
    pictures = access_report.draw_all(analysis)
    columns, rows = access_report.table(analysis)
    by_size = [
        Table(f"{what}, by number of selected slots", *content, folded=True)
        for measure, what in access_report.measures(analysis).items()
        for content in [access_report.table_by_size(analysis, measure)]
    ]
    return Section(
        title,
        [
            Text(f"Read from {analysis['checkpoint']}; nothing was trained."),
            Points(access_report.sentences(analysis)),
            Table("What each ranking selects, means with 95% intervals", columns, rows),
            Picture(
                "access-coverage",
                pictures["access_coverage"],
                "What each ranking finds, by the number of slots it selects: of the core set, of "
                "the weight that the question puts on slots, and how well reads of selected slots "
                "tell names from other tokens (0.5 is chance). Bands: 95% intervals over records.",
            ),
            *by_size,
            Picture("access-core", pictures["access_core"], "Sizes of the core sets."),
            Picture(
                "access-sequence",
                pictures["access_sequence"],
                "Reads of core and of selected slots along two questions and a text of each.",
            ),
            Fragment(
                access_report.coloured_texts(analysis),
                "The texts coloured by the slots that their tokens read are in the HTML page.",
            ),
        ],
    )
