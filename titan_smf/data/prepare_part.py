"""One part of preparing text: pieces of the inputs in, token shards and a record of them out.

A part depends on nothing but its pieces and the options, so any process may do it, at any time and
again. Its record is written last: a part without one has not been done.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from typing import Any

from titan_smf import storage
from titan_smf.data.raw_text import Piece, Rejected, TextOptions, read_documents
from titan_smf.data.token_shards import SHARD_TOKENS, ShardInfo, ShardWriter
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import ConfigError, DataError

REJECTED_SHOWN = 10


@dataclass(frozen=True)
class PrepareOptions:
    """Everything but the inputs, the output and the tokenizer."""

    text: TextOptions = field(default_factory=TextOptions)
    validation_fraction: float = 0.0
    """Share of the documents put aside, chosen by a hash of their text: equal documents stay
    together, so no text is in both parts."""
    part_bytes: int = 64 << 20
    """Bytes of input a worker takes at a time."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens at which a shard is full."""
    on_bad_line: str = "raise"
    """`raise`: stop at a line or row that is no document; `skip`: count it and go on."""
    max_bad_lines: int = 100
    """With `skip`: stop all the same when there are more than this."""

    def __post_init__(self) -> None:
        for key, is_usable, allowed in (
            ("validation_fraction", 0 <= self.validation_fraction < 1, "at least 0 and below 1"),
            ("on_bad_line", self.on_bad_line in ("raise", "skip"), "raise, skip"),
            ("part_bytes", self.part_bytes >= 1, "at least 1"),
            ("shard_tokens", self.shard_tokens >= 1, "at least 1"),
            ("max_bad_lines", self.max_bad_lines >= 0, "at least 0"),
        ):
            if not is_usable:
                raise ConfigError(key, getattr(self, key), allowed)


@dataclass
class Counts:
    """What was read and written: the record of one part, or the sum of several."""

    documents: int = 0
    tokens: int = 0
    empty_documents: int = 0
    rejected_lines: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    """The first few rejected lines."""
    shards: list[ShardInfo] = field(default_factory=list)
    validation_shards: list[ShardInfo] = field(default_factory=list)

    def __add__(self, other: "Counts") -> "Counts":
        total = Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))
        del total.rejected[REJECTED_SHOWN:]
        return total

    def summary(self) -> str:
        shards = self.shards + self.validation_shards
        aside = sum(shard.documents for shard in self.validation_shards)
        return (
            f"{self.documents:,} documents ({aside:,} for validation), {self.tokens:,} tokens, "
            f"{self.rejected_lines:,} rejected lines, {self.empty_documents:,} empty documents, "
            f"{len(shards):,} shards, {sum(shard.bytes for shard in shards):,} bytes"
        )

    def check_rejected(self, options: PrepareOptions) -> None:
        """Raise a DataError if more lines were rejected than the options allow."""
        if options.on_bad_line == "raise" and self.rejected_lines:
            where, cause = self.rejected[0]
            raise DataError(
                f"{where}: {cause}; tools/prepare_data.py --on-bad-line skip leaves such lines out"
            )
        if self.rejected_lines > options.max_bad_lines:
            first = "; ".join(f"{where}: {cause}" for where, cause in self.rejected[:3])
            raise DataError(
                f"{self.rejected_lines} lines were rejected, --max-bad-lines allows "
                f"{options.max_bad_lines}. The first: {first}"
            )


def prepare_part(
    output: str, tokenizer: Tokenizer, options: PrepareOptions, number: int, pieces: list[Piece]
) -> Counts:
    """Tokenise the pieces of part `number` into shards, and record that."""
    counts = Counts()
    train, validation = (
        ShardWriter(folder, f"{number:05d}", tokenizer, options.shard_tokens)
        for folder in (output, validation_folder(output))
    )
    for document in read_documents(pieces, options.text):
        if isinstance(document, Rejected):
            counts += Counts(rejected_lines=1, rejected=[document])
            counts.check_rejected(options)
        elif not document.strip():
            counts.empty_documents += 1
        else:
            counts.documents += 1
            aside = _is_validation(document, options.validation_fraction)
            (validation if aside else train).add(document)
    counts.shards = train.close()
    counts.validation_shards = validation.close()
    counts.tokens = sum(shard.tokens for shard in counts.shards + counts.validation_shards)
    record = json.dumps(asdict(counts), indent=1).encode() + b"\n"
    storage.write_bytes(_record_path(output, number), record)
    return counts


def validation_folder(output: str) -> str:
    return storage.join(output, "validation")


def _record_path(output: str, number: int) -> str:
    return storage.join(output, "parts", f"{number:05d}.json")


def read_record(output: str, number: int) -> Counts | None:
    """Return the record of a part, if it has one and its shards are there."""
    path = _record_path(output, number)
    if not storage.exists(path):
        return None
    record: dict[str, Any] = json.loads(storage.read_bytes(path))
    record["rejected"] = [Rejected(*entry) for entry in record["rejected"]]
    for key, folder in (("shards", output), ("validation_shards", validation_folder(output))):
        record[key] = [ShardInfo(**entry) for entry in record[key]]
        for shard in record[key]:
            shard_path = storage.join(folder, shard.name)
            if not storage.exists(shard_path) or storage.size_of(shard_path) != shard.bytes:
                return None
    return Counts(**record)


def _is_validation(text: str, fraction: float) -> bool:
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
