"""Tokenizers keep every character, tell themselves apart and refuse damaged files."""

import base64
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import tiktoken
import tokenizers

from tests.support.corpora import write_ranks
from titan_smf.data.tokenizer import Tokenizer, load_tokenizer, train_rank_file
from titan_smf.errors import ConfigError, DataError, UserError

TEXTS = [
    "",
    "plain words, and 12345 digits",
    "naïve façade — “quotes” \N{GRINNING FACE}\N{EMOJI MODIFIER FITZPATRICK TYPE-6}",
    "\u4e2d\u6587 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8 e\u0301",
    "tabs\tand\r\nlines\n\n\n   trailing   ",
    "\x00\x01 controls \x7f \ufeff",
    "it's we'LL don't I'd",
]
CORPUS = [f"The {a} {b} {c}s, doesn't it? {n}\n" for n, (a, b, c) in enumerate(
    (a, b, c)
    for a in ("quick", "brown", "lazy", "weary", "happy")
    for b in ("fox", "dog", "miller", "sailor", "carter")
    for c in ("jump", "wander", "sleep", "hurry", "sing")
)]  # fmt: skip


SINGLE_BYTES = [bytes([value]) for value in range(256)]


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("ranks") / "small.tiktoken")
    train_rank_file(CORPUS, 320, path)
    return path


@pytest.fixture(scope="module")
def llama3_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ranks") / "llama3.tiktoken"
    others = (value.to_bytes(3, "big") for value in range(128_000 - 256))
    return write_ranks(path, [*SINGLE_BYTES, *others])


def all_tokenizers(rank_file: str) -> Iterator[Tokenizer]:
    yield load_tokenizer("bytes")
    for pattern in ("default", "llama3", "cl100k", "gpt2", r"\S+|\s+"):
        yield load_tokenizer(path=rank_file, pattern=pattern)


def test_text_comes_back_unchanged(rank_file: str) -> None:
    for tokenizer in all_tokenizers(rank_file):
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert all(0 <= token < tokenizer.n_vocab for token in ids)
            assert tokenizer.encode(text, bos=True, eos=True)[-1] == tokenizer.eos_id


def test_a_million_spaces_are_encoded(rank_file: str) -> None:
    text = "start" + " " * 1_000_000 + "\n" * 50_000 + "end"
    for tokenizer in all_tokenizers(rank_file):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_text_stay_text(rank_file: str) -> None:
    for tokenizer in all_tokenizers(rank_file):
        special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
        for text in ("<|end_of_text|>", "a<|begin_of_text|>b", "<|endoftext|>", "<|pad|>"):
            ids = tokenizer.encode(text)
            assert special.isdisjoint(ids)
            assert tokenizer.decode(ids) == text


def test_begin_and_end_are_added_where_they_exist(rank_file: str) -> None:
    small = load_tokenizer(path=rank_file)
    assert small.encode("x", bos=True, eos=True) == [317, *small.encode("x"), 318]
    assert (small.n_vocab, small.pad_id) == (320, 319)
    gpt2 = load_tokenizer(path=rank_file, pattern="gpt2")
    assert gpt2.bos_id is None
    assert gpt2.pad_id == gpt2.eos_id == 317
    assert gpt2.encode("x", bos=True, eos=True) == [*gpt2.encode("x"), 317]


def test_llama3_has_its_256_special_tokens_in_their_places(llama3_file: str) -> None:
    tokenizer = load_tokenizer(path=llama3_file, pattern="llama3")
    assert tokenizer.n_vocab == 128_256
    assert (tokenizer.bos_id, tokenizer.eos_id) == (128_000, 128_001)
    assert tokenizer.decode([128_004, 128_255]) == (
        "<|finetune_right_pad_id|><|reserved_special_token_247|>"
    )
    named = [128_006, 128_007, 128_009]
    assert tokenizer.decode(named) == "<|start_header_id|><|end_header_id|><|eot_id|>"


def test_llama3_file_without_its_pattern_is_refused(llama3_file: str) -> None:
    with pytest.raises(ConfigError, match="say llama3"):
        load_tokenizer(path=llama3_file)


def test_ids_that_stand_for_nothing_do_not_stop_decoding(rank_file: str) -> None:
    tokenizer = load_tokenizer(path=rank_file, pattern="cl100k")  # its special tokens leave gaps
    ids = [*tokenizer.encode("ab"), tokenizer.eos_id + 10, *tokenizer.encode("c")]
    assert tokenizer.decode(ids) == "ab\ufffdc"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_fingerprint_changes_with_anything_and_only_then(rank_file: str, tmp_path: Path) -> None:
    same = load_tokenizer(path=rank_file)
    assert same.fingerprint == load_tokenizer(path=rank_file).fingerprint
    assert same.fingerprint == pickle.loads(pickle.dumps(same)).fingerprint
    copied = tmp_path / "other-name.tiktoken"
    copied.write_bytes(Path(rank_file).read_bytes())
    assert same.fingerprint == load_tokenizer(path=str(copied)).fingerprint

    fingerprints = [tokenizer.fingerprint for tokenizer in all_tokenizers(rank_file)]
    for number, more in enumerate(([b"ab", b"cd"], [b"cd", b"ab"], [b"ab"], [b"ab", b"ce"])):
        path = write_ranks(tmp_path / str(number), [*SINGLE_BYTES, *more])
        fingerprints.append(load_tokenizer(path=path).fingerprint)
    assert len(set(fingerprints)) == len(fingerprints)


def test_pickled_tokenizer_encodes_alike(rank_file: str) -> None:
    for tokenizer in all_tokenizers(rank_file):
        assert pickle.loads(pickle.dumps(tokenizer)).encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])


def test_training_a_rank_file_is_deterministic(rank_file: str, tmp_path: Path) -> None:
    again = tmp_path / "again"
    train_rank_file(iter(CORPUS), 320, str(again))
    assert again.read_bytes() == Path(rank_file).read_bytes()


def test_trained_merges_are_those_of_byte_pair_encoding(rank_file: str) -> None:
    """Each token merges two of lower rank, and tiktoken cuts words as the trainer's merges do."""
    lines = [line.split() for line in Path(rank_file).read_bytes().splitlines()]
    tokens = [base64.b64decode(token) for token, _ in lines]
    merges = []
    for rank in range(256, len(tokens)):
        lower = {token: i for i, token in enumerate(tokens[:rank])}
        encoding = tiktoken.Encoding("", pat_str="", mergeable_ranks=lower, special_tokens={})
        parts = encoding._encode_single_piece(tokens[rank])
        assert len(parts) == 2, "a token is the merge of two earlier ones"
        merges.append((tokens[parts[0]].decode(), tokens[parts[1]].decode()))

    # spaces and letters are enough to compare with: the corpus is ASCII
    vocabulary = {token.decode("latin-1"): rank for rank, token in enumerate(tokens)}
    reference = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    ours = load_tokenizer(path=rank_file)
    words = sorted({word for text in CORPUS for word in text.split()})
    for word in [*words, *(" " + word for word in words), " foxes", "sleepier", " wanderings"]:
        if all(char.isalpha() or char == " " for char in word):
            assert ours.encode(word) == reference.encode(word).ids
    text = "".join(CORPUS)
    assert len(ours.encode(text)) < len(text) / 2


def test_training_says_when_the_text_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gives a vocabulary of 262 tokens at most, 300 were asked"):
        train_rank_file(["ab abc"] * 3, 300, str(tmp_path / "ranks"))
    with pytest.raises(ConfigError, match="more than 259"):
        train_rank_file(["ab abc"], 259, str(tmp_path / "ranks"))


def test_rank_files_are_read_and_written_through_fsspec(rank_file: str) -> None:
    written = train_rank_file(CORPUS, 320, "memory://tokenizers/small.tiktoken")
    assert written.fingerprint == load_tokenizer(path=rank_file).fingerprint
    again = load_tokenizer(path="memory://tokenizers/small.tiktoken")
    assert (again.fingerprint, again.name) == (written.fingerprint, "small.tiktoken")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 tokens"),
        (b"QQ== 0\nQg==\n", r":2: is not `base64 rank`: b'Qg=='"),
        (b"QQ== 0\n!!!! 1\n", r":2: is not `base64 rank`"),
        (b"QQ== zero\n", r":1: is not `base64 rank`"),
        (b"QQ== 0\nQg== 2\n", "the ranks 0 to 1, each once"),
        (b"QQ== 0\nQQ== 1\n", "the ranks 0 to 0, each once"),
        (b"QQ== 0\nQg== 1\n", "no rank for 254 of the 256 single bytes"),
        (b"\x80\x02binary\x00", "is not `base64 rank`"),
    ],
)
def test_damaged_rank_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "ranks"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        load_tokenizer(path=str(path))
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either tokenizer.name or tokenizer.path"),
        ({"name": "bytes", "path": "x"}, "either tokenizer.name or tokenizer.path"),
        ({"name": "o200k"}, "tokenizer.name: got 'o200k'; allowed: bytes, .*o200k_base"),
        ({"name": "bytes", "pattern": "gpt2"}, "only together with tokenizer.path"),
        ({"path": "/nowhere/ranks"}, "/nowhere/ranks: cannot be read: No such file"),
        ({"path": "RANKS", "pattern": "("}, "tokenizer.pattern: got '\\('"),
        ({"path": "RANKS", "pattern": "llama"}, "skips some characters"),
        ({"path": "RANKS", "pattern": r"\w*"}, "matches empty text"),
        ({"path": "RANKS", "pattern": r"\w+"}, "skips some characters"),
    ],
)
def test_wrong_settings_are_named(rank_file: str, settings: dict[str, str], message: str) -> None:
    settings = {key: value.replace("RANKS", rank_file) for key, value in settings.items()}
    with pytest.raises(UserError, match=message):
        load_tokenizer(**settings)


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"p50k_base.*could not be downloaded.*tokenizer\.path"):
        load_tokenizer("p50k_base")
