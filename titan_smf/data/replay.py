"""Replay: rows of background text among the rows of new knowledge.

    G rows in a global batch, P of them replay, S sequence length

Row i of a global batch is a replay row where `(i + 1) * P // G` is greater than `i * P // G`: they
are spread evenly over the micro-batches, and depend on G and P alone, not on the number of ranks.
Each step takes the next P samples of the background, in the order of a `TokenLoader`.

    G = 8, P = 2      row    0 1 2 3 4 5 6 7
                      replay . . . 0 . . . 1
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from titan_smf.data.loader import TokenLoader


class Replay:
    """Reads the replay rows of one global batch after another.

    Args:
        background: gives the samples; nobody else may move its position.
        num_rows: P, 1 or more and less than `global_batch_size`.
        global_batch_size: G.
    """

    def __init__(self, background: TokenLoader, num_rows: int, global_batch_size: int) -> None:
        assert 0 < num_rows < global_batch_size, "both kinds of rows in a batch"
        self._background = background
        self.num_rows = num_rows
        rows = np.arange(global_batch_size)
        before = rows * num_rows // global_batch_size
        self.is_replay: npt.NDArray[np.bool_] = (rows + 1) * num_rows // global_batch_size > before
        """(G,), whether a row is a replay row."""

    def tokens(self, rows: slice) -> npt.NDArray[np.int64]:
        """Return the tokens (n, S + 1) of the replay rows among `rows` of the current batch."""
        here = np.zeros_like(self.is_replay)
        here[rows] = True
        tokens, _ = self._background.peek(self.num_rows, here[self.is_replay])
        return tokens

    def next_batch(self) -> None:
        """Move on by one global batch."""
        self._background.skip(self.num_rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the background; equal on all ranks, JSON values."""
        return {"replay_rows": self.num_rows, "replay": self._background.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position, of the same number of rows.

        Raises:
            CheckpointError: it is in another background; it says what differs.
        """
        self._background.load_state_dict(state_dict["replay"])
