"""Text to token shards: in parallel, resumable, the same bytes for any number of workers.

1. Plan: the inputs are cut into pieces, and neighbouring pieces are grouped into parts of about
   `part_bytes`. The plan depends on the inputs and settings alone and is written first.
2. Each part is tokenised by one worker into shards of its own, then recorded in `parts/`.
3. When every part is recorded, the index is written; that makes the folder usable.

A killed run started again does the parts that have no record. Layout of the output:

    <output>/plan.json  parts/00003.json  00003-000.tokens ...  index.json
    <output>/validation/00003-000.tokens ...  index.json            (with a validation fraction)
"""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from filelock import FileLock, Timeout

from titan_smf import storage
from titan_smf.data.prepare_part import (
    Counts,
    PrepareOptions,
    prepare_part,
    read_record,
    validation_folder,
)
from titan_smf.data.raw_text import Piece, plan_pieces, read_documents
from titan_smf.data.token_shards import INDEX_NAME, PLAN_NAME, describe, write_index
from titan_smf.data.tokenizer import Tokenizer, load_tokenizer, train_rank_file
from titan_smf.errors import ConfigError, DataError
from titan_smf.progress import ProgressTimer

PLAN_VERSION = 1
TRAINED_RANK_FILE = "tokenizer.tiktoken"
TRAINING_CHARACTERS = 1 << 28
"""A rank file is trained on the first documents, up to this much text."""

Parts = dict[int, list[Piece]]
"""Pieces of parts, by the numbers of the parts."""
PartsDone = Iterator[tuple[int, Counts]]
"""Numbers of parts with their records, as they get done."""


def prepare(
    inputs: list[str],
    output: str,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    workers: int = 1,
    report: Callable[[str], None] | None = None,
) -> Counts:
    """Write the token shards of `inputs` to the folder `output`; resume what is unfinished.

    Each document becomes `[begin] text [end]`; one with empty text is left out and counted.
    `report` is called with a progress line about every second.

    Raises:
        DataError: inputs that cannot be used, a line that is no document, an output that was made
            from other inputs or with other settings.
    """
    with _only_writer(output):
        parts = _plan(inputs, output, tokenizer, options)
        found = {number: read_record(output, number) for number in range(len(parts))}
        records = {number: record for number, record in found.items() if record}
        todo = {number: pieces for number, pieces in enumerate(parts) if number not in records}
        total = sum(records.values(), Counts())
        total.check_rejected(options)  # of what was prepared before, perhaps with other settings
        work = partial(prepare_part, output, tokenizer, options)
        for number, counts in _reporting(_run(output, work, todo, workers), todo, report):
            total += counts
            total.check_rejected(options)
            records[number] = counts
        total = sum((records[number] for number in sorted(records)), Counts())
        _write_indices(inputs, output, tokenizer, options, total)
        return total


def _write_indices(
    inputs: list[str], output: str, tokenizer: Tokenizer, options: PrepareOptions, total: Counts
) -> None:
    """Make the output usable: its own index is written last."""
    if total.documents == 0:
        raise DataError(
            f"{', '.join(inputs)}: no document in the input ({total.empty_documents} empty, "
            f"{total.rejected_lines} rejected lines)"
        )
    if not total.shards:
        raise DataError(f"{output}: every document fell to the validation part; lower its fraction")
    if options.validation_fraction:
        if not total.validation_shards:
            raise DataError(
                f"{output}: none of {total.documents} documents fell to the validation part; "
                "raise its fraction"
            )
        write_index(validation_folder(output), tokenizer, total.validation_shards)
    write_index(output, tokenizer, total.shards)


def train_tokenizer(
    inputs: list[str], output: str, vocab_size: int, options: PrepareOptions
) -> Tokenizer:
    """Return the tokenizer of a rank file in `output`; train it on the inputs if it is not there.

    A rank file without finished parts beside it may be from other inputs: it is trained again.
    """
    path = storage.join(output, TRAINED_RANK_FILE)
    if storage.exists(path) and _has_finished_parts(output):
        tokenizer = load_tokenizer(path=path)
        if tokenizer.n_vocab != vocab_size:
            raise ConfigError(
                "train_tokenizer",
                vocab_size,
                f"{tokenizer.n_vocab}, with which {output} was begun; or another output",
            )
        return tokenizer

    def texts() -> Iterator[str]:
        left = TRAINING_CHARACTERS
        for document in read_documents(plan_pieces(inputs, options.text), options.text):
            if isinstance(document, str):
                left -= len(document)
                if left < 0:
                    return
                yield document

    return train_rank_file(texts(), vocab_size, path)


def _plan(
    inputs: list[str], output: str, tokenizer: Tokenizer, options: PrepareOptions
) -> list[list[Piece]]:
    """Divide the work into parts and record that; a resumed run must come to the same plan."""
    parts: list[list[Piece]] = []
    filled = options.part_bytes
    for piece in plan_pieces(inputs, options.text, options.part_bytes):
        if filled >= options.part_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(piece)
        filled = options.part_bytes if piece.kind == "hub" else filled + piece.size
    if not parts:
        raise DataError(f"{', '.join(inputs)}: is empty")

    settings = asdict(options)
    del settings["on_bad_line"], settings["max_bad_lines"]  # may change when a run is resumed
    plan = {
        "version": PLAN_VERSION,
        "tokenizer": describe(tokenizer),
        **settings.pop("text"),
        **settings,
        "inputs": inputs,
        "parts": [[asdict(piece) for piece in part] for part in parts],
    }
    path = storage.join(output, PLAN_NAME)
    if _has_finished_parts(output):
        _check_same_plan(json.loads(storage.read_bytes(path)), plan, output)
    elif storage.exists(storage.join(output, INDEX_NAME)):
        raise DataError(f"{output}: already holds token shards of another origin; choose another")
    else:
        storage.write_bytes(path, json.dumps(plan, indent=1).encode() + b"\n")
    storage.remove_unfinished(output)
    return parts


def _check_same_plan(before: dict[str, Any], plan: dict[str, Any], output: str) -> None:
    differing = [
        f"{key} ({before.get(key)} there, {value} now)"
        for key, value in plan.items()
        if key != "parts" and value != before.get(key)
    ]
    if not differing and plan["parts"] != before["parts"]:
        differing = ["the files behind the inputs"]
    if differing:
        raise DataError(
            f"{output}: was made with other settings: {'; '.join(differing)}. Choose another "
            "output, or delete this one"
        )


def _run(output: str, work: Callable[..., Counts], todo: Parts, workers: int) -> PartsDone:
    """Do the parts, in this process or by workers."""
    if workers <= 1 or len(todo) <= 1:
        for number, pieces in todo.items():
            yield number, work(number, pieces)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(todo)), multiprocessing.get_context("spawn"), _start_worker
    )
    try:
        futures = {pool.submit(work, number, pieces): number for number, pieces in todo.items()}
        for done in as_completed(futures):
            yield futures[done], done.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"{output}: a worker process died, perhaps for lack of memory: run again with "
            "fewer workers to resume"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _reporting(
    parts_done: PartsDone, todo: Parts, report: Callable[[str], None] | None
) -> PartsDone:
    """Pass on the parts; report speed and time left about every second, and at the end."""
    left = {number: sum(piece.size for piece in pieces) for number, pieces in todo.items()}
    if not all(left.values()):  # hub datasets do not say their sizes: then every part counts alike
        left = dict.fromkeys(left, 1)
    size = sum(left.values())
    done = Counts()
    timer = ProgressTimer(seconds_between_lines=1)
    for number, counts in parts_done:
        yield number, counts
        del left[number]
        done += counts
        if report and (timer.due() or not left):
            seconds, size_done = timer.elapsed(), size - sum(left.values())
            report(
                f"part {len(todo) - len(left)}/{len(todo)}: "
                f"{done.documents:,} documents ({done.documents / seconds:,.0f}/s), "
                f"{done.tokens:,} tokens ({done.tokens / seconds:,.0f}/s), "
                f"{timer.seconds_left(size_done, size):.0f} s left"
            )


@contextmanager
def _only_writer(output: str) -> Iterator[None]:
    """Refuse a second run on the same local folder at the same time."""
    if not storage.is_local(output):
        yield
        return
    folder = storage.local_path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise DataError(f"{output}: another run is writing to it") from error
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror or error}") from error
    with lock:
        yield


def _start_worker() -> None:
    """Leave interrupts to the main process, and end when it is gone, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker process"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _has_finished_parts(output: str) -> bool:
    return storage.exists(storage.join(output, "parts"))
