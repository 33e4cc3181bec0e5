"""Files by path or fsspec URL: whole-file reads, writes that are complete or absent, a lock.

A plain path and a URL (`s3://...`, `memory://...`, `file://...`) are used the same way. Every
failure becomes a DataError that names the file.
"""

import difflib
import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from filelock import FileLock

from titan_smf.errors import DataError, UserError

UNFINISHED = ".unfinished"


@contextmanager
def _file(url: str, action: str) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
    """Yield the file system behind `url` and the path inside it.

    Raises:
        DataError: it names `url`, in place of whatever a file system or decompressor raises inside.
    """
    try:
        yield fsspec.core.url_to_fs(url)
    except UserError:
        raise
    except Exception as error:
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{url}: cannot be {action}: {cause}") from error


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> Path:
    """Return the plain path of a local file or `file://` URL."""
    with _file(url, "reached") as (_, path):
        return Path(path)


def join(folder: str, *names: str) -> str:
    return "/".join([folder.rstrip("/"), *names])


def exists(url: str) -> bool:
    with _file(url, "reached") as (filesystem, path):
        return bool(filesystem.exists(path))


def is_folder(url: str) -> bool:
    with _file(url, "reached") as (filesystem, path):
        return bool(filesystem.isdir(path))


def size_of(url: str) -> int:
    """Return the size of a file in bytes."""
    with _file(url, "reached") as (filesystem, path):
        return int(filesystem.size(path))


def files_of(url: str) -> list[str]:
    """Return the files that a glob matches or that lie in a folder and below it, sorted."""
    with _file(url, "listed") as (filesystem, path):
        found = sorted(filesystem.find(path) if is_folder(url) else filesystem.glob(path))
        return found if is_local(url) else [filesystem.unstrip_protocol(name) for name in found]


def missing(url: str, hint: str = "") -> DataError:
    """Return the error for a path that does not exist; it names what looks alike beside it."""
    with _file(url, "reached") as (filesystem, path):
        folder, _, name = path.rstrip("/").rpartition("/")
        try:
            entries = filesystem.ls(folder, detail=False)
        except Exception:  # the folder is missing too, or cannot be listed
            entries = []
    beside = [str(entry).rpartition("/")[2] for entry in entries]
    close = difflib.get_close_matches(name, beside, n=3)
    did_you_mean = f"; beside it there is {', '.join(close)}" if close else ""
    return DataError(f"{url}: does not exist{did_you_mean}{hint}")


@contextmanager
def open_binary(url: str, compression: str | None = None) -> Iterator[BinaryIO]:
    """Open `url` for reading; a failure to open or read it is a DataError that names it."""
    with (
        _file(url, "read") as (filesystem, path),
        filesystem.open(path, "rb", compression=compression) as file,
    ):
        # Remote files read a whole block for each line, zstd's have no lines: both need it.
        yield io.BufferedReader(file)


def read_bytes(url: str) -> bytes:
    with open_binary(url) as file:
        return file.read()


def write_bytes(url: str, content: bytes) -> None:
    """Write a file that is complete or absent, whenever the process dies.

    Object stores publish an object when its upload ends; on a local disk the file is written
    under another name and then renamed.
    """
    with _file(url, "written") as (filesystem, path):
        filesystem.makedirs(filesystem._parent(path), exist_ok=True)
        if not is_local(url):
            filesystem.pipe_file(path, content)
            return
        unfinished = Path(f"{path}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def remove(url: str) -> None:
    """Delete a file, if it is there."""
    with _file(url, "deleted") as (filesystem, path):
        if filesystem.exists(path):
            filesystem.rm_file(path)


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
    """Hold a folder's lock, so that one process of this machine at a time works on it."""
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


def write_json(path: Path, value: Any) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def drop_lines_after(path: Path, step: int) -> None:
    """Leave only the lines up to a step in a file with one JSON object a step; make the file."""
    kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step]
    # Not by `write_bytes`: a plain path such as `~/run` would mean another file to fsspec.
    shortened = path.with_name(f"{path.name}.kept")
    shortened.write_text("".join(kept))
    shortened.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a jsonl file; a last line torn by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
