"""Token shards: a folder of tokenised documents, read memory-mapped.

    <folder>/index.json         written last; lists the shards with their sizes and hashes
    <folder>/00003-000.tokens   a shard

A shard is one file, little-endian throughout:

    8 bytes    the magic number `TSMFTOK1`
    8 bytes    length of the header
    header     JSON: version, tokenizer, type, counts, sha256 of what follows the padding
    padding    to a multiple of 64 bytes
    offsets    int64 (documents + 1): where each document starts among the tokens, and the end
    tokens     uint16 where the vocabulary allows it, else uint32

The *packed stream* of a folder is all its documents one after another, shard by shard.
"""

import array
import hashlib
import io
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from titan_smf import storage
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import DataError

FORMAT = "titan_smf token shards"
FORMAT_VERSION = 1
MAGIC = b"TSMFTOK1"
ALIGNMENT = 64
INDEX_NAME = "index.json"
PLAN_NAME = "plan.json"
SHARD_TOKENS = 1 << 25
PREPARE_AGAIN = "run tools/prepare_data.py again with the same settings to resume"


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the index lists it."""

    name: str
    documents: int
    tokens: int
    bytes: int
    sha256: str


class ShardWriter:
    """Collects documents and writes a shard whenever `shard_tokens` are reached.

    Shards are named `<prefix>-000.tokens` and so on. Each is complete or absent. The bytes depend
    on the documents, the tokenizer and `shard_tokens` alone.
    """

    def __init__(
        self, folder: str, prefix: str, tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self.shards: list[ShardInfo] = []
        self._folder = folder
        self._prefix = prefix
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(tokenizer.n_vocab)
        self._begin_shard()

    def _begin_shard(self) -> None:
        self._tokens = array.array("H" if self._dtype.itemsize == 2 else "I")
        self._offsets = array.array("q", [0])

    def add(self, text: str) -> None:
        """Append one document: begin token (if the encoding has one), text, end token."""
        self._tokens.fromlist(self._tokenizer.encode(text, bos=True, eos=True))
        self._offsets.append(len(self._tokens))
        if len(self._tokens) >= self._shard_tokens:
            self._write_shard()

    def close(self) -> list[ShardInfo]:
        """Write what is left and return all shards of this writer."""
        if self._tokens:
            self._write_shard()
        return self.shards

    def _write_shard(self) -> None:
        offsets = np.frombuffer(self._offsets, dtype=np.int64).astype("<i8").tobytes()
        tokens = np.frombuffer(self._tokens, dtype=f"u{self._dtype.itemsize}")
        payload = offsets + tokens.astype(self._dtype).tobytes()
        counts = {"documents": len(self._offsets) - 1, "tokens": len(self._tokens)}
        sha256 = storage.sha256_hex(payload)
        header = {"version": FORMAT_VERSION, "sha256": sha256, **counts}
        content = _head(header | _vocabulary(self._tokenizer)) + payload
        name = f"{self._prefix}-{len(self.shards):03d}.tokens"
        storage.write_bytes(storage.join(self._folder, name), content)
        self.shards.append(ShardInfo(name, bytes=len(content), sha256=sha256, **counts))
        self._begin_shard()


def write_index(folder: str, tokenizer: Tokenizer, shards: Sequence[ShardInfo]) -> None:
    """Write the index of a folder, which declares it finished."""
    index = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **_vocabulary(tokenizer),
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "shards": [asdict(shard) for shard in shards],
    }
    content = json.dumps(index, indent=1).encode() + b"\n"
    storage.write_bytes(storage.join(folder, INDEX_NAME), content)


def write_shards(
    folder: str, tokenizer: Tokenizer, documents: Iterable[str], shard_tokens: int = SHARD_TOKENS
) -> None:
    """Write a finished folder of token shards, in this process."""
    writer = ShardWriter(folder, "00000", tokenizer, shard_tokens)
    for document in documents:
        writer.add(document)
    write_index(folder, tokenizer, writer.close())


def token_dtype(n_vocab: int) -> np.dtype[Any]:
    return np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what headers, indices and plans say of a tokenizer."""
    return {key: getattr(tokenizer, key) for key in ("name", "fingerprint", "n_vocab")}


def _vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"tokenizer": describe(tokenizer), "dtype": token_dtype(tokenizer.n_vocab).name}


class TokenShards:
    """A finished folder of token shards; opening it reads the index and checks every file's size.

    Args:
        path: the folder, or an fsspec URL of one, which is first copied into the cache.
        tokenizer_fingerprint: the shards must have been made by this tokenizer.
        cache_dir: where copies of remote folders are kept.

    Raises:
        DataError: no shards there, an unfinished folder, a torn shard, another tokenizer.
    """

    def __init__(
        self,
        path: str,
        tokenizer_fingerprint: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.path = path
        index = _read_index(path)
        self.tokenizer_name: str = index["tokenizer"]["name"]
        self.tokenizer_fingerprint: str = index["tokenizer"]["fingerprint"]
        if tokenizer_fingerprint not in (None, self.tokenizer_fingerprint):
            raise DataError(
                f"{path}: was made by tokenizer {self.tokenizer_name} with fingerprint "
                f"{self.tokenizer_fingerprint}, but the tokenizer in use has fingerprint "
                f"{tokenizer_fingerprint}: use that tokenizer, or prepare the text with this one"
            )
        self.num_documents: int = index["documents"]
        self.num_tokens: int = index["tokens"]
        if self.num_tokens == 0:
            raise DataError(f"{path}: holds no tokens")
        self._shards = [ShardInfo(**entry) for entry in index["shards"]]
        self._dtype = np.dtype(index["dtype"]).newbyteorder("<")
        hashes = "".join(shard.sha256 for shard in self._shards)
        self.digest = storage.sha256_hex(hashes.encode(), digits=16)
        """16 hex digits that change with any token or document boundary."""

        self._token_starts = np.cumsum([0] + [shard.tokens for shard in self._shards])
        self._document_starts = np.cumsum([0] + [shard.documents for shard in self._shards])
        self._maps: dict[int, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}
        if storage.is_local(path):
            self._folder = storage.local_path(path)
        else:
            base = Path(cache_dir) if cache_dir else storage.default_cache_dir()
            self._folder = base / "shards" / self.digest
            self._fetch()
        for shard in self._shards:
            file = self._folder / shard.name
            if not file.exists():
                raise self._damaged(shard, "it is missing")
            if (size := file.stat().st_size) != shard.bytes:
                raise self._damaged(shard, f"it has {size} bytes instead of {shard.bytes}")

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return tokens `start` to `stop` of the packed stream, memory-mapped within one shard."""
        assert 0 <= start <= stop <= self.num_tokens, "a range within the packed stream"
        shard = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        parts = []
        while start < stop:
            begin, end = self._token_starts[shard : shard + 2]
            parts.append(self._map(shard)[1][start - begin : stop - begin])
            start, shard = end, shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty(0, self._dtype), *parts])

    def document(self, index: int) -> npt.NDArray[Any]:
        """Return the tokens of one document, begin and end tokens included."""
        assert 0 <= index < self.num_documents, "a document of this folder"
        shard = int(np.searchsorted(self._document_starts, index, side="right")) - 1
        offsets, tokens = self._map(shard)
        here = index - self._document_starts[shard]
        return tokens[offsets[here] : offsets[here + 1]]

    def verify(self) -> None:
        """Read everything and compare it with the hashes in the index."""
        for shard in self._shards:
            with (self._folder / shard.name).open("rb") as file:
                self._check_hash(shard, file)

    def _map(self, number: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the offsets and tokens of one shard, mapped when first needed."""
        if number not in self._maps:
            shard = self._shards[number]
            path = self._folder / shard.name
            with path.open("rb") as file:
                header = _read_head(file, str(path))
                payload_start = file.tell()
            if any(header[key] != getattr(shard, key) for key in ("documents", "tokens", "sha256")):
                raise self._damaged(shard, "its header does not match the index")
            offsets = np.memmap(path, "<i8", "r", payload_start, (shard.documents + 1,))
            tokens_start = payload_start + offsets.nbytes
            tokens = np.memmap(path, self._dtype, "r", tokens_start, (shard.tokens,))
            self._maps[number] = (offsets, tokens)
        return self._maps[number]

    def _check_hash(self, shard: ShardInfo, file: BinaryIO) -> None:
        _read_head(file, shard.name)
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        if digest.hexdigest() != shard.sha256:
            raise self._damaged(shard, "its content does not match its hash")

    def _damaged(self, shard: ShardInfo, what: str) -> DataError:
        return DataError(
            f"{storage.join(self.path, shard.name)}: {what}; copy the folder again, or delete this "
            f"file and {PREPARE_AGAIN}"
        )

    def _fetch(self) -> None:
        """Copy the shards of a remote folder; one process of a machine does it, others wait."""
        with storage.locked(self._folder):
            for shard in self._shards:
                copy = self._folder / shard.name
                if copy.exists() and copy.stat().st_size == shard.bytes:
                    continue
                content = storage.read_bytes(storage.join(self.path, shard.name))
                if len(content) != shard.bytes:
                    raise self._damaged(shard, f"{len(content)} of {shard.bytes} bytes arrived")
                self._check_hash(shard, io.BytesIO(content))
                storage.write_bytes(str(copy), content)


def _head(header: dict[str, Any]) -> bytes:
    encoded = json.dumps(header, sort_keys=True).encode()
    head = MAGIC + struct.pack("<Q", len(encoded)) + encoded
    return head + b"\0" * (-len(head) % ALIGNMENT)


def _read_head(file: BinaryIO, path: str) -> dict[str, Any]:
    """Read the header of a shard, up to where the offsets start."""
    start = file.read(16)
    if start[:8] != MAGIC or len(start) < 16:
        raise DataError(f"{path}: is no token shard: copy or prepare it again")
    (length,) = struct.unpack("<Q", start[8:])
    try:
        header = json.loads(file.read(length))
    except ValueError as error:
        raise DataError(f"{path}: its header is damaged: copy or prepare it again") from error
    _check_version(header, path)
    end = 16 + length
    file.seek(end + -end % ALIGNMENT)
    return header


def _read_index(folder: str) -> dict[str, Any]:
    path = storage.join(folder, INDEX_NAME)
    if not storage.exists(path):
        if not storage.exists(folder):
            raise storage.missing(folder)
        if storage.exists(storage.join(folder, PLAN_NAME)):
            raise DataError(f"{folder}: is not finished; {PREPARE_AGAIN}")
        raise DataError(f"{folder}: holds no token shards; make them with tools/prepare_data.py")
    try:
        index = json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path}: is damaged; delete it and {PREPARE_AGAIN}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{path}: is no index of token shards")
    _check_version(index, path)
    return index


def _check_version(header: dict[str, Any], path: str) -> None:
    if header["version"] != FORMAT_VERSION:
        raise DataError(
            f"{path}: has format version {header['version']}, this program reads "
            f"{FORMAT_VERSION}: prepare the text again"
        )
