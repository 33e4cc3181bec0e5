"""What a run's evaluations leave in its folder: `results.jsonl` and readable predictions.

results.jsonl            one line for each set and evaluation (`SetResult.line`)
predictions/<set>.jsonl  one line for each item, of the set's last evaluation
"""

import json
from pathlib import Path
from typing import Any

from titan_smf import storage
from titan_smf.evaluation.evaluate import SetResult
from titan_smf.runtime import from_first_rank, rank
from titan_smf.storage import drop_lines_after, read_lines

RESULTS_FILE = "results.jsonl"
PREVIOUS_FILE = "results.previous.jsonl"
"""Results of a run in this folder that ended before it saved a checkpoint."""
PREDICTIONS_FOLDER = "predictions"


class ResultsFile:
    """The results in one folder; only rank 0 reads and writes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RESULTS_FILE
        self.predictions = folder / PREDICTIONS_FOLDER

    def start(self, step: int) -> None:
        """Begin to write the results of a run that goes on after `step`; later ones are dropped."""
        if rank() != 0 or not self.path.is_file():
            return
        if step == 0:
            self.path.replace(self.path.with_name(PREVIOUS_FILE))
        else:
            drop_lines_after(self.path, step)

    def sets_at(self, step: int) -> set[str]:
        """Names of the sets that the run itself has a result of at this step. Collective."""
        return from_first_rank(
            lambda: {
                line["set"]
                for line in read_lines(self.path)
                if line["step"] == step and line["checkpoint"] is None
            }
        )

    def add(self, result: SetResult, step: int, checkpoint: str | None) -> None:
        """Write a result; it takes the place of an earlier one of the same set and checkpoint."""
        if rank() != 0:
            return
        new = result.line(step, checkpoint)
        lines = [line for line in read_lines(self.path) if _key(line) != _key(new)]
        _write_lines(self.path, [*lines, new])
        if result.predictions:
            _write_lines(self.predictions / f"{result.name}.jsonl", result.predictions)


def _key(line: dict[str, Any]) -> list[Any]:
    return [line[name] for name in ("set", "step", "checkpoint")]


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    storage.write_bytes(str(path), content.encode())
