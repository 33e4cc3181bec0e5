"""Token shards come back as written, and a torn, foreign or unfinished folder is noticed."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.support.corpora import write_ranks
from titan_smf.data.token_shards import TokenShards, write_shards
from titan_smf.data.tokenizer import Tokenizer, load_tokenizer
from titan_smf.errors import DataError


@pytest.fixture(scope="module")
def wide_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary beyond 16 bits whose words have ids on both sides of the limit."""
    tokens = [bytes([value]) for value in range(256)]
    tokens += [b"%05d" % value for value in range(70_000)]
    path = write_ranks(tmp_path_factory.mktemp("wide") / "ranks", tokens)
    return load_tokenizer(path=path, pattern=r"[0-9]{5}|[\s\S]")


def make_documents(seed: int) -> list[str]:
    draws = random.Random(seed)
    return [
        " ".join(f"{draws.randrange(70_000):05d}" for _ in range(draws.randrange(1, 40)))
        for _ in range(60)
    ]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    write_shards(str(tmp_path / "shards"), tokenizer, make_documents(0), 300)
    return tmp_path / "shards"


@pytest.mark.parametrize("shard_tokens", [1, 300, 1 << 20])
def test_documents_and_stream_come_back(
    tmp_path: Path, tokenizer: Tokenizer, wide_tokenizer: Tokenizer, shard_tokens: int
) -> None:
    documents = make_documents(1)
    for used, width in ((tokenizer, 2), (wide_tokenizer, 4)):
        path = tmp_path / str(width)
        write_shards(str(path), used, documents, shard_tokens)
        shards = TokenShards(str(path), used.fingerprint)
        expected = [used.encode(text, bos=True, eos=True) for text in documents]
        stream = [token for document in expected for token in document]
        assert (shards.num_documents, shards.num_tokens) == (len(documents), len(stream))
        assert [shards.document(i).tolist() for i in range(len(documents))] == expected
        assert shards.tokens(0, shards.num_tokens).tolist() == stream
        assert shards.tokens(5, 5).tolist() == []
        draws = random.Random(2)
        for _ in range(200):
            start = draws.randrange(len(stream))
            stop = draws.randrange(start, len(stream) + 1)
            assert shards.tokens(start, stop).tolist() == stream[start:stop]
        assert shards.tokens(0, 1).dtype.itemsize == width
        shards.verify()


def test_a_shard_is_laid_out_as_documented(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards(str(tmp_path / "s"), tokenizer, ["ab", "c"])
    content = (tmp_path / "s" / "00000-000.tokens").read_bytes()
    assert content[:8] == b"TSMFTOK1"
    length = int.from_bytes(content[8:16], "little")
    header = json.loads(content[16 : 16 + length])
    assert (header["documents"], header["tokens"], header["dtype"]) == (2, 7, "uint16")
    assert header["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    payload = content[-(16 + length) // 64 * -64 :]
    assert np.frombuffer(payload[:24], "<i8").tolist() == [0, 4, 7]
    assert np.frombuffer(payload[24:], "<u2").tolist() == [256, 97, 98, 257, 256, 99, 257]


def test_same_documents_give_the_same_bytes(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    again = tmp_path / "again"
    write_shards(str(again), tokenizer, make_documents(0), 300)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert TokenShards(str(again)).digest == TokenShards(str(folder)).digest
    other = tmp_path / "other"
    write_shards(str(other), tokenizer, make_documents(3), 300)
    assert TokenShards(str(other)).digest != TokenShards(str(folder)).digest


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            edit("00000-001.tokens", lambda content: content[:-2]),
            "01.tokens: it has [0-9]+ bytes instead of",
        ),
        (lambda folder: (folder / "00000-001.tokens").unlink(), "00000-001.tokens: it is missing"),
        (edit("index.json", lambda content: content[:-40]), "index.json: is damaged"),
        (edit("index.json", lambda _: b'{"weight_map": {}}'), "json: is no index of token shards"),
        (
            edit("index.json", lambda content: content.replace(b'"version": 1', b'"version": 9')),
            "format version 9, this program reads 1",
        ),
        (
            lambda folder: (folder / "index.json").rename(folder / "plan.json"),
            "is not finished; run tools/prepare_data.py again .* to resume",
        ),
        (
            lambda folder: (folder / "index.json").unlink(),
            "holds no token shards; make them with tools/prepare_data.py",
        ),
    ],
)
def test_opening_a_harmed_folder_fails(
    folder: Path, harm: Callable[[Path], object], message: str
) -> None:
    harm(folder)
    with pytest.raises(DataError, match=message) as raised:
        TokenShards(str(folder))
    assert str(folder) in str(raised.value)


def test_a_flipped_bit_is_found_by_verify(folder: Path) -> None:
    flip = edit("00000-001.tokens", lambda c: c[:-3] + bytes([c[-3] ^ 1]) + c[-2:])
    flip(folder)
    with pytest.raises(DataError, match=r"00000-001.tokens: its content does not match its hash"):
        TokenShards(str(folder)).verify()


def test_a_shard_of_another_folder_is_noticed_when_read(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for name, document in (("a", "one"), ("b", "two")):
        write_shards(str(tmp_path / name), tokenizer, [document])
    shutil.copy(tmp_path / "b" / "00000-000.tokens", tmp_path / "a" / "00000-000.tokens")
    with pytest.raises(DataError, match="its header does not match the index"):
        TokenShards(str(tmp_path / "a")).tokens(0, 1)


def test_another_tokenizer_is_refused_by_both_names(
    folder: Path, tokenizer: Tokenizer, wide_tokenizer: Tokenizer
) -> None:
    with pytest.raises(DataError) as raised:
        TokenShards(str(folder), wide_tokenizer.fingerprint)
    for part in (str(folder), tokenizer.fingerprint, wide_tokenizer.fingerprint):
        assert part in str(raised.value)


def test_a_missing_folder_suggests_names_like_it(folder: Path) -> None:
    with pytest.raises(DataError, match="does not exist; beside it there is shards"):
        TokenShards(str(folder.with_name("shard")))


def test_remote_shards_are_copied_once_and_read_alike(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    url = "memory://bucket/remote-shards"
    write_shards(url, tokenizer, make_documents(0), 300)
    local = TokenShards(str(folder))
    for _ in range(2):
        remote = TokenShards(url, tokenizer.fingerprint, tmp_path / "cache")
        assert remote.digest == local.digest
        assert (remote.tokens(0, 900) == local.tokens(0, 900)).all()
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/remote-shards/00000-001.tokens", b"overwritten after the copy")
    TokenShards(url, cache_dir=tmp_path / "cache").verify()
    with pytest.raises(DataError, match=r"00000-001.tokens: 26 of [0-9]+ bytes arrived"):
        TokenShards(url, cache_dir=tmp_path / "another-cache")
    assert TokenShards(f"file://{folder}").digest == local.digest


def test_a_remote_shard_damaged_on_the_way_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    url = "memory://bucket/damaged-shards"
    write_shards(url, tokenizer, make_documents(0), 300)
    memory = fsspec.filesystem("memory")
    content = bytearray(memory.cat("/bucket/damaged-shards/00000-000.tokens"))
    content[-1] ^= 1
    memory.pipe("/bucket/damaged-shards/00000-000.tokens", bytes(content))
    with pytest.raises(DataError, match="does not match its hash"):
        TokenShards(url, cache_dir=tmp_path / "cache")
    content[-1] ^= 1
    memory.pipe("/bucket/damaged-shards/00000-000.tokens", bytes(content))
    TokenShards(url, cache_dir=tmp_path / "cache").verify()


def test_a_folder_without_tokens_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards(str(tmp_path / "empty"), tokenizer, [])
    with pytest.raises(DataError, match="holds no tokens"):
        TokenShards(str(tmp_path / "empty"))
