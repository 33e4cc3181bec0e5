"""Files by path or fsspec URL: whole-file reads, writes that are complete or absent, a lock.

A plain path and a URL (`s3://...`, `memory://...`, `file://...`) are used the same way. Every
failure becomes a DataError that names the file.
"""

import difflib
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from filelock import FileLock

from titan_smf.errors import DataError

UNFINISHED = ".unfinished"


def filesystem_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind `url` and the path inside it."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot be reached: {error}") from error


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> Path:
    """The plain path of a local file or `file://` URL."""
    return Path(filesystem_of(url)[1])


def join(folder: str, *names: str) -> str:
    return "/".join([folder.rstrip("/"), *names])


def exists(url: str) -> bool:
    filesystem, path = filesystem_of(url)
    return bool(filesystem.exists(path))


def missing(url: str, hint: str = "") -> DataError:
    """The error for a path that does not exist, with names beside it that look alike."""
    filesystem, path = filesystem_of(url)
    folder, _, name = path.rstrip("/").rpartition("/")
    try:
        beside = [str(entry).rpartition("/")[2] for entry in filesystem.ls(folder, detail=False)]
    except (OSError, ValueError):
        beside = []
    close = difflib.get_close_matches(name, beside, n=3)
    did_you_mean = f"; beside it there is {', '.join(close)}" if close else ""
    return DataError(f"{url}: does not exist{did_you_mean}{hint}")


def size_of(url: str) -> int:
    filesystem, path = filesystem_of(url)
    return int(filesystem.size(path))


@contextmanager
def open_binary(url: str, compression: str | None = None) -> Iterator[BinaryIO]:
    """`url` opened for reading; a failure to open it is a DataError that names it."""
    filesystem, path = filesystem_of(url)
    try:
        file = filesystem.open(path, "rb", compression=compression)
    except ValueError as error:  # fsspec does not know the compression: its package is missing
        raise DataError(f"{url}: {error}; zstd needs the package zstandard") from error
    except OSError as error:
        raise DataError(f"{url}: cannot be read: {error.strerror or error}") from error
    with file:
        yield file


def read_bytes(url: str) -> bytes:
    with open_binary(url) as file:
        return file.read()


def write_bytes(url: str, content: bytes) -> None:
    """Write a file that is complete or absent, whenever the process dies.

    Object stores publish an object when its upload ends; on a local disk the file is written
    under another name and then renamed.
    """
    write_file(url, lambda file: file.write(content))


def write_file(url: str, write: Callable[[BinaryIO], Any]) -> None:
    """As `write_bytes`, with the content written by a function."""
    filesystem, path = filesystem_of(url)
    try:
        filesystem.makedirs(filesystem._parent(path), exist_ok=True)
        if not is_local(url):
            with filesystem.open(path, "wb") as file:
                write(file)
            return
        unfinished = Path(f"{path}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
        try:
            with unfinished.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{url}: cannot be written: {error.strerror or error}") from error


def remove_unfinished(folder: str) -> None:
    """Delete what killed writers left in a local folder and below."""
    if is_local(folder):
        for path in local_path(folder).rglob(f"*{UNFINISHED}"):
            path.unlink(missing_ok=True)


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "titan_smf"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process of this machine at a time works on `folder`; the others wait."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise DataError(
            f"{folder}: the cache cannot be written: {error.strerror or error}; "
            "set XDG_CACHE_HOME to a folder that can"
        ) from error
    try:
        yield
    finally:
        lock.release()


def sha256_hex(content: bytes, digits: int = 64) -> str:
    return hashlib.sha256(content).hexdigest()[:digits]
