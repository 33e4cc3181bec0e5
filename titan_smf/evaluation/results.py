"""What a run's evaluations leave in its folder: `results.jsonl` and readable predictions.

results.jsonl            one line for each set and evaluation (`Evaluator.evaluate` makes it)
predictions/<set>.jsonl  one line for each item, of the set's last evaluation
"""

import json
from pathlib import Path
from typing import Any

from titan_smf import storage
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
        """Return the names of the sets with a result of the run itself at a step. Collective."""
        return from_first_rank(
            lambda: {
                line["set"]
                for line in read_lines(self.path)
                if line["step"] == step and line["checkpoint"] is None
            }
        )

    def add(self, result: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
        """Write a result in place of an earlier one of the same set, step and checkpoint.

        Args:
            predictions: an object for each item, to be read by a person; none for text.
        """
        if rank() != 0:
            return
        key = ("set", "step", "checkpoint")
        others = [line for line in read_lines(self.path) if any(line[k] != result[k] for k in key)]
        _write_lines(self.path, [*others, result])
        if predictions:
            _write_lines(self.predictions / f"{result['set']}.jsonl", predictions)


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    storage.write_bytes(str(path), content.encode())
