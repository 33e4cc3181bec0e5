"""Batches of the continual phase: one fact or chunk a step or more, in the order of its stream.

    B sequences in a micro-batch, S sequence length, W ranks, G sequences in a global batch,
    P of them replay

The global batch of a step holds the texts of one record, one a row, whatever the number of ranks,
and P rows of background text between them (`replay.py`):

    text row i in step v   text (v*(G - P) + i) mod n of the record's n texts, v counting the steps
      of a record          on it in all epochs: fewer than G - P texts repeat in order, more go on
                           where the step before stopped
    micro-batch j, rank r  rows (j*W + r)*B to (j*W + r + 1)*B
    a row                  tokens  [begin] t1 t2 t3 [end]        S = 6
                           input   [begin] t1 t2 t3 [pad] [pad]
                           labels  t1 t2 t3 [end] ignored ignored

Every token that is read is followed by one to predict, so an input position is padding exactly
where its label is `IGNORE_INDEX`: `labels != IGNORE_INDEX` says which positions count for the loss
and for accesses. This holds with a tokenizer whose padding token is its end token.

Replay rows are full. Their tokens count for the loss as all others do, but are not what is new:
with replay, a batch also has `new` (B, S) bool, true for the tokens of texts, whose accesses count.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from titan_smf import storage
from titan_smf.data.loader import IGNORE_INDEX, Batch, check_same_position
from titan_smf.data.replay import Replay
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.streams.records import Record

logger = logging.getLogger("titan_smf")


class StreamLoader:
    """Yields the micro-batches of one record after another, `epochs` times, then ends.

    The state is how many global batches all ranks have finished: equal on every rank, and valid for
    any number of ranks and micro-batches. A batch stopped amid its micro-batches starts anew.

    Texts are tokenised at the start, 28 MB a second on one CPU core. A text of more than S + 1
    tokens, begin and end included, loses its end; one warning says how many do.

    It has the methods of torchtitan's `BaseDataLoader`.

    Args:
        global_batch_size: G, a multiple of `local_batch_size * dp_world_size`.
        epochs: times that the stream is read.
        steps_per_record: steps in a row on each record in an epoch.
        replay: the P rows of background text, of `seq_len` tokens; None for none.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        seq_len: int,
        local_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_world_size: int,
        epochs: int = 1,
        steps_per_record: int = 1,
        replay: Replay | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_world_size, "a rank of the data-parallel group"
        assert global_batch_size % (local_batch_size * dp_world_size) == 0, "whole micro-batches"
        assert records, "a stream is not empty"
        assert min(epochs, steps_per_record) >= 1, "each record is learned"
        self._seq_len = seq_len
        self._batch_size = local_batch_size
        self._global_size = global_batch_size
        self._rank = dp_rank
        self._num_ranks = dp_world_size
        self._steps_per_record = steps_per_record
        self._replay = replay
        self._is_replay = replay.is_replay if replay else np.zeros(global_batch_size, bool)
        self._text_of_row = np.cumsum(~self._is_replay) - 1
        self._pad_id = tokenizer.pad_id
        self._sequences = _tokenize(records, tokenizer, seq_len, warn=dp_rank == 0)
        texts = "".join(json.dumps(record.texts) + "\n" for record in records)
        self._identity = {
            "stream_records": len(records),
            "stream_digest": storage.sha256_hex(texts.encode(), digits=16),  # all that is learned
            "epochs": epochs,
            "steps_per_record": steps_per_record,
            "global_batch_size": global_batch_size,
            "seq_len": seq_len,
        }
        self._position = 0
        self.num_steps = len(records) * epochs * steps_per_record
        """Global batches from the start of the stream to its end."""

    def __iter__(self) -> Iterator[Batch]:
        starts = range(
            self._rank * self._batch_size, self._global_size, self._num_ranks * self._batch_size
        )
        while self._position < self.num_steps:
            for start in starts:
                batch = self._batch(slice(start, start + self._batch_size))
                if start == starts[-1]:
                    self._position += 1
                    if self._replay is not None:
                        self._replay.next_batch()
                yield batch

    def _batch(self, rows: slice) -> Batch:
        """Return these rows of the current global batch."""
        visit, step = divmod(self._position, self._steps_per_record)
        epoch, record = divmod(visit, len(self._sequences))
        sequences = self._sequences[record]
        shape = (self._batch_size, self._seq_len)
        inputs = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        is_replay = self._is_replay[rows]
        steps_before = epoch * self._steps_per_record + step
        first = steps_before * np.count_nonzero(~self._is_replay)
        for row in np.flatnonzero(~is_replay):
            tokens = sequences[(first + self._text_of_row[rows][row]) % len(sequences)]
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, : len(tokens) - 1] = tokens[1:]
        arrays: dict[str, npt.NDArray[Any]] = {"input": inputs}
        if self._replay is not None:
            background = self._replay.tokens(rows)
            inputs[is_replay], labels[is_replay] = background[:, :-1], background[:, 1:]
            arrays["new"] = (labels != IGNORE_INDEX) & ~is_replay[:, None]
        return {name: torch.from_numpy(a) for name, a in arrays.items()}, torch.from_numpy(labels)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it refers to: plain JSON values, equal on all ranks."""
        replay = self._replay.state_dict() if self._replay else {}
        return {**self._identity, "position": self._position, **replay}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved position of the same stream, read with the same settings.

        Raises:
            CheckpointError: says what differs.
        """
        here, saved = (
            {key: value for key, value in state.items() if key not in ("position", "replay")}
            for state in (self.state_dict(), state_dict)
        )
        check_same_position(here, saved, "stream")
        if self._replay is not None:
            self._replay.load_state_dict(state_dict)
        self._position = int(state_dict["position"])


def _tokenize(
    records: Sequence[Record], tokenizer: Tokenizer, seq_len: int, warn: bool
) -> list[list[npt.NDArray[np.int32]]]:
    """Return the tokens of each text of each record, at most `seq_len + 1` of them."""
    encoded = [
        [np.array(tokenizer.encode(text, bos=True, eos=True), np.int32) for text in record.texts]
        for record in records
    ]
    lengths = [len(tokens) - 1 for texts in encoded for tokens in texts]
    if warn and max(lengths) > seq_len:
        logger.warning(
            "%d of the stream's %d texts are longer than training.seq_len %d and lose their end; "
            "%d would hold them all",
            sum(length > seq_len for length in lengths),
            len(lengths),
            seq_len,
            max(lengths),
        )
    # Copies: a view would keep the end that is lost in memory.
    return [[tokens[: seq_len + 1].copy() for tokens in texts] for texts in encoded]
