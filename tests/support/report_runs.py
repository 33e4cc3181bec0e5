"""Finished runs as their files, written for tests, and what a report says of them."""

import json
from pathlib import Path
from typing import Any

import tomli_w

from titan_smf.report.write import write_report

SETS = {
    "new_facts": ("target", "questions", "f1"),
    "known_facts": ("held_out", "questions", "f1"),
    "background": ("background", "tokens", "loss"),
}
SPARSE, FULL = "sparse memory, t=100", "full finetuning"

Scores = dict[str, tuple[float, float]]
"""Of each set before and after training."""


def scores(learned: float, known: float, loss: float = 1.0) -> Scores:
    return {"new_facts": (0.0, learned), "known_facts": (0.8, known), "background": (1.0, loss)}


def result(name: str, step: int, mean: float, **changes: Any) -> dict[str, Any]:
    """A line of results.jsonl with an interval of 0.1 to both sides."""
    role, kind, metric = SETS.get(name, ("other", "questions", "f1"))
    value = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
    return {
        "set": name,
        "role": role,
        "kind": kind,
        "step": step,
        "checkpoint": f"step-{step}",
        "count": 100,
        "metrics": {metric: value},
        "settings": {},
        "seconds": 1.0,
    } | changes


def write_run(
    folder: Path,
    method: str,
    rate: float,
    seed: int | None,
    ends: Scores,
    kind: str = "sparse_memory",
    idf_path: str = "",
) -> Path:
    """A finished run of 10 steps."""
    folder.mkdir(parents=True)
    other = 0.123  # the rate that this method does not use
    config = {
        "job": {"description": method},
        "debug": {} if seed is None else {"seed": seed},
        "finetune": {"method": kind},
        "memory": {"value_lr": rate if kind == "sparse_memory" else other},
        "optimizer": {"lr": other if kind == "sparse_memory" else rate},
        "selection": {"idf_path": idf_path},
    }
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    lines = [result(name, step, ends[name][step // 10]) for step in (0, 10) for name in ends]
    write_lines(folder / "results.jsonl", lines)
    steps = [{"step": step, "loss": 1.0, "numbers_updated": 1600} for step in range(1, 11)]
    write_lines(folder / "metrics.jsonl", steps)
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def report(*paths: Path) -> str:
    """The markdown of a report, written into `report` beside the first folder."""
    output = paths[0].parent / "report"
    write_report(paths, output)
    return (output / "report.md").read_text()


def table(markdown: str, heading: str, below: str = "") -> dict[str, dict[str, str]]:
    """The first table under a heading (and a line after it): its rows by name, cells by column."""
    text = markdown.split(f"# {heading}\n")[1]
    lines = text.split(f"\n{below}")[1].split("\n") if below else text.split("\n")
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    assert len({len(row) for row in rows}) == 1, "every row has a cell for each column"
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def notes(markdown: str) -> str:
    return markdown.split("## What could not be read or used\n")[1]
