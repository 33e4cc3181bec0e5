"""The reports of a plan: one for each group of arms, beside the arms that all are compared with."""

from pathlib import Path

from titan_smf.report.write import write_report
from titan_smf.reproduce.plan import Plan, slug
from titan_smf.reproduce.runs import analyses_folder, complete_folders


def write_reports(plan: Plan) -> list[Path]:
    """Write a report for each group of arms with complete runs; returns the HTML pages.

    The report of the first group has the analyses of accesses; those of the others have the arms
    of the first group too, to compare with.
    """
    groups = complete_folders(plan)
    first = next(iter(groups))
    pages = []
    for group, folders in groups.items():
        analyses = [folder for folder in [analyses_folder(plan)] if folder.is_dir()]
        inputs = folders + (analyses if group == first else groups[first])
        written = write_report(inputs, Path(plan.reproduce.folder, "report", slug(group)))
        pages += [path for path in written if path.suffix == ".html"]
    return pages
