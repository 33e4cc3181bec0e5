"""Data sources by path: token shards, a text file or the invented world.

Text is turned into token shards on first use and kept in the cache, under a key of its content and
the tokenizer. Several processes may ask at once: one prepares, the others wait.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from titan_smf import storage
from titan_smf.data.prepare import PLAN_VERSION, prepare
from titan_smf.data.prepare_part import PrepareOptions
from titan_smf.data.raw_text import TextOptions, plan_pieces, read_documents
from titan_smf.data.rows import kind_of
from titan_smf.data.token_shards import FORMAT_VERSION, INDEX_NAME, TokenShards, write_shards
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import DataError
from titan_smf.world.source import SYNTHETIC_PREFIX, parse_world
from titan_smf.world.world import WORLD_VERSION

LARGEST_TEXT = 256 << 20
"""Bytes of a text file that is still prepared on first use."""


def open_source(
    path: str, tokenizer: Tokenizer, cache_dir: str | Path | None = None
) -> TokenShards:
    """Open the token shards of `path`; prepare them if it is text or the invented world.

    Args:
        path: a folder or URL of token shards; a txt, jsonl (field `text`) or parquet (column
            `text`) file; or `synthetic:world?facts=2000&split=train`, of which `parse_world`
            has all settings.
        tokenizer: what the shards must have been, or are, made with.
        cache_dir: default `$XDG_CACHE_HOME/titan_smf`, or `~/.cache/titan_smf`.

    Raises:
        DataError: nothing there, nothing in it, unfinished, torn, or of another tokenizer.
        ConfigError: a synthetic source with unknown settings.
    """
    cache = Path(cache_dir) if cache_dir else storage.default_cache_dir()
    if path.startswith(SYNTHETIC_PREFIX):
        world, split, _ = parse_world(path)
        counts = [world.num_facts, world.num_new_facts, world.num_tuning_facts]
        spec = json.dumps([WORLD_VERSION, world.seed, *counts, split])
        folder = cache / "synthetic" / _key(spec, tokenizer.fingerprint)
        return _prepare_once(
            folder, tokenizer, lambda: write_shards(str(folder), tokenizer, world.documents(split))
        )
    if not storage.exists(path):
        raise storage.missing(path)
    if storage.is_folder(path):
        return TokenShards(path, tokenizer.fingerprint, cache)
    kind_of(path)
    if (size := storage.size_of(path)) > LARGEST_TEXT:
        raise DataError(
            f"{path}: has {size >> 20} MiB, more than is prepared on first use "
            f"({LARGEST_TEXT >> 20}); prepare it with tools/prepare_data.py"
        )
    with storage.open_binary(path) as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    name = path.rsplit("/", 1)[-1]
    folder = cache / "text" / _key(name, content, str(PLAN_VERSION), tokenizer.fingerprint)
    return _prepare_once(
        folder, tokenizer, lambda: prepare([path], str(folder), tokenizer, PrepareOptions())
    )


def _prepare_once(folder: Path, tokenizer: Tokenizer, write: Callable[[], object]) -> TokenShards:
    with storage.locked(folder):
        if not (folder / INDEX_NAME).exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
            write()
    return TokenShards(str(folder), tokenizer.fingerprint)


def source_texts(path: str) -> Iterator[str]:
    """Yield the documents of a source that is text or the invented world, in order.

    Raises:
        DataError: nothing there, or token shards, whose text is gone.
        ConfigError: a synthetic source with unknown settings.
    """
    if path.startswith(SYNTHETIC_PREFIX):
        world, split, _ = parse_world(path)
        yield from world.documents(split)
        return
    options = TextOptions()
    for document in read_documents(plan_pieces([path], options), options):
        if not isinstance(document, str):
            raise DataError(f"{document.where}: {document.cause}")
        yield document


def _key(*parts: str) -> str:
    joined = "\n".join([str(FORMAT_VERSION), *parts])
    return storage.sha256_hex(joined.encode(), digits=24)
