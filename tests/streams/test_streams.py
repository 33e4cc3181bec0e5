"""Fact and document streams: read strictly, one record a global batch, the same on any ranks."""

import gzip
import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import zstandard

from titan_smf.data.loader import TokenLoader, WeightedShards
from titan_smf.data.token_shards import ShardWriter, TokenShards, write_index
from titan_smf.data.tokenizer import Tokenizer, load_tokenizer, train_rank_file
from titan_smf.errors import CheckpointError, ConfigError, DataError
from titan_smf.streams.loader import StreamLoader
from titan_smf.streams.records import Document, Fact, Record, open_stream, read_records

SEQ_LEN = 12
FACT_LINE: dict[str, Any] = {
    "id": "a",
    "statements": ["Ünïcode \u4e2d\u6587 \u2028 \N{GRINNING FACE}.", "Second."],
    "question": "Which?",
    "answers": ["One", "1"],
}
FACT_FORM = (
    'each line of a fact stream is {"id": text, "statements": [text, ...], "question": text, '
    '"answers": [text, ...]}'
)

Row = tuple[tuple[int, ...], tuple[int, ...]]


def fact(name: str, num_statements: int) -> Fact:
    texts = tuple(f"{name}{'.' * (i % 4)}{i}" for i in range(num_statements))
    return Fact(name, texts, "?", ("!",))


TOKENIZER = load_tokenizer("bytes")
FACTS = [fact(f"f{n}", n) for n in (1, 3, 8, 11, 20)]
"""With fewer, as many and more statements than a global batch of 8 has rows."""


def loaders(
    records: Sequence[Record],
    num_ranks: int = 1,
    batch_size: int = 8,
    global_size: int = 8,
    seq_len: int = SEQ_LEN,
    tokenizer: Tokenizer = TOKENIZER,
    **options: Any,
) -> list[StreamLoader]:
    """One loader a rank."""
    sizes = (seq_len, batch_size, global_size)
    return [
        StreamLoader(records, tokenizer, *sizes, rank, num_ranks, **options)
        for rank in range(num_ranks)
    ]


def rows_of(ranks: list[StreamLoader], num_batches: int | None = None) -> list[Row]:
    """The rows of the next micro-batches of all ranks, or of all there are, in global order."""
    rows: list[Row] = []
    batches = zip(*ranks, strict=True)
    for batch_of_rank in itertools.islice(batches, num_batches):
        for inputs, labels in batch_of_rank:
            assert list(inputs) == ["input"]
            assert inputs["input"].dtype == labels.dtype == torch.int64
            assert inputs["input"].shape == labels.shape
            pairs = zip(inputs["input"].tolist(), labels.tolist(), strict=True)
            rows += [(tuple(tokens), tuple(targets)) for tokens, targets in pairs]
    return rows


def texts_of(rows: list[Row]) -> list[str]:
    """The texts of rows, of which only the counted positions are looked at."""
    return [TOKENIZER.decode([t for t in targets if t != -100][:-1]) for _, targets in rows]


def facts_of_steps(loader: StreamLoader) -> list[set[str]]:
    """The beginnings of the ids of the facts in each step that is left."""
    return [
        {TOKENIZER.decode(row[row != -100].tolist())[:2] for row in labels} for _, labels in loader
    ]


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    lines = [FACT_LINE, FACT_LINE | {"id": "b", "source": {"page": 3}}]
    expected = [
        Fact(name, tuple(FACT_LINE["statements"]), "Which?", ("One", "1")) for name in ("a", "b")
    ]
    plain = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    files = {
        "plain.jsonl": plain,
        "escaped.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
        "blank_lines.jsonl": b"\n  \n" + plain.replace(b"\n", b"\n\n") + b"\n\n",
        "windows.jsonl": b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n") + b"\r\n",
        "zipped.jsonl.gz": gzip.compress(plain),
        "zipped.jsonl.zst": zstandard.compress(plain),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert read_records(str(tmp_path / name), Fact) == expected, name
    assert read_records(f"file://{tmp_path}/zipped.jsonl.gz", Fact) == expected
    with fsspec.open("memory://streams/facts.jsonl.gz", "wb") as file:
        file.write(files["zipped.jsonl.gz"])
    assert read_records("memory://streams/facts.jsonl.gz", Fact) == expected
    assert list(open_stream("memory://streams/facts.jsonl.gz", "facts")) == expected


def test_documents_are_read_as_their_rewrites(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text(json.dumps({"id": "d", "chunk": "As it is.", "rewrites": ["One.", "Two."]}))
    (document,) = open_stream(str(path), "documents")
    assert document == Document("d", "As it is.", ("One.", "Two."))
    assert document.texts == ("One.", "Two.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statements": None}, "statements is null, not a list of one text or more"),
        ({"statements": []}, "statements is [], not a list of one text or more"),
        ({"statements": "One."}, 'statements is "One.", not a list of one text or more'),
        ({"statements": ["One.", 2]}, "statements[1] is 2, not a text"),
        ({"statements": ["One.", " \n"]}, 'statements[1] is " \\n", not a text'),
        ({"statements": ["One.", "\ud83d"]}, "statements[1] holds half of a surrogate pair"),
        ({"answers": []}, "answers is [], not a list of one text or more"),
        ({"answers": [["One"]]}, 'answers[0] is ["One"], not a text'),
        ({"question": True}, "question is true, not a text"),
        ({"question": ["?"] * 50}, 'question is ["?", "?", "?", "?", "?", "?", "?", "?",..., not'),
        ({"id": 7}, "id is 7, not a text"),
        ({"id": ""}, 'id is "", not a text'),
        ({"id": "a"}, "has the id 'a' of line 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    lines = [FACT_LINE, FACT_LINE | {"id": "b"} | change, FACT_LINE | {"id": "c"}]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(DataError) as raised:
        read_records(str(path), Fact)
    start, end = f"{path}:2: {message}", f"; correct or remove the line: {FACT_FORM}"
    assert str(raised.value).startswith(start)
    assert str(raised.value).endswith(end)


def test_lines_that_are_no_records_are_named(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    good = json.dumps(FACT_LINE).encode()
    document = b'{"id": "d", "chunk": "c", "rewrites": ["r"]}'
    for bad, message in [
        (good[:-5], "is not JSON: "),
        (b"text", "is not JSON: "),
        (b'{"id": "\xff"}', "is not UTF-8: "),
        (b"[" * 100_000, "is not JSON: "),
        (b"[1, 2]", "is [1, 2], not an object"),
        (b"{}", "has no 'id', but no key"),
        (document, "has no 'statements', but id, chunk, rewrites"),
    ]:
        path.write_bytes(b"\n" + good + b"\n\n" + bad + b"\n")
        with pytest.raises(DataError) as raised:
            read_records(str(path), Fact)
        assert str(raised.value).startswith(f"{path}:4: {message}")
        assert str(raised.value).endswith(FACT_FORM)
    with pytest.raises(DataError, match=r'a document stream is {"id": text, "chunk": text, "rewri'):
        read_records(str(path), Document)


def test_files_that_are_no_streams_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(FACT_LINE).encode())
    files = {
        "empty.jsonl": (b"", f"holds nothing to learn: {FACT_FORM}"),
        "blank.jsonl": (b"\n \n", f"holds nothing to learn: {FACT_FORM}"),
        "torn.jsonl.gz": (whole[:-12], "cannot be read: "),
        "plain.jsonl.gz": (json.dumps(FACT_LINE).encode(), "cannot be read: "),
        "facts.txt": (b"text", f"is txt; a stream is jsonl, {FACT_FORM}"),
        "facts.csv": (b"a,b", "is of no known kind"),
    }
    for name, (content, message) in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError) as raised:
            read_records(str(path), Fact)
        assert str(raised.value).startswith(f"{path}: {message}")
    with pytest.raises(DataError, match=r"does not exist; beside it there is blank\.jsonl"):
        open_stream(str(tmp_path / "blnk.jsonl"), "facts")
    with pytest.raises(DataError, match="cannot be reached"):
        open_stream("nosuchprotocol://bucket/facts.jsonl", "facts")


def test_a_synthetic_stream_needs_no_file() -> None:
    world = "synthetic:world?seed=1&facts=20&new_facts=6"
    stream = open_stream(world, "facts")
    assert [type(record) for record in stream] == [Fact] * 6
    chunks = open_stream(world, "documents")
    assert {type(record) for record in chunks} == {Document}
    tuning = open_stream(world + "&tuning_facts=3&set=tuning_facts", "facts")
    others = open_stream(world + "&tuning_facts=3", "facts")
    assert len(tuning) == 3
    assert {record.id for record in tuning}.isdisjoint(record.id for record in others)
    for bad in (
        "synthetic:word",
        "synthetic:world?facts=x",
        "synthetic:world?facts=20&new_facts=0",
        "synthetic:world?facts=20&set=tuning_facts",
        "synthetic:world?facts=20&set=old_facts",
    ):
        with pytest.raises(ConfigError, match=r"^stream.path: got"):
            open_stream(bad, "facts")


def test_a_row_is_begin_text_end_and_padding_is_never_counted(tmp_path: Path) -> None:
    record = Fact("a", ("ab", "é", "abcdefghijk", "abcdefghijkl"), "?", ("!",))
    rank_file = str(tmp_path / "ranks.tiktoken")
    train_rank_file(["abc abd"], 260, rank_file)
    without_begin = load_tokenizer(path=rank_file, pattern="gpt2")
    assert without_begin.pad_id == without_begin.eos_id
    assert without_begin.bos_id is None
    for each in (TOKENIZER, without_begin):
        rows = rows_of(loaders([record], batch_size=4, global_size=4, tokenizer=each))
        assert len(rows) == 4
        for text, (inputs, labels) in zip(record.statements, rows, strict=True):
            tokens = each.encode(text, bos=True, eos=True)[: SEQ_LEN + 1]
            padding = SEQ_LEN + 1 - len(tokens)
            assert inputs == (*tokens[:-1], *[each.pad_id] * padding)
            assert labels == (*tokens[1:], *[-100] * padding)
            counted = [label != -100 for label in labels]
            assert sum(counted) == len(tokens) - 1, "one position for each token that is read"


def test_steps_follow_the_stream_and_end_with_it() -> None:
    (loader,) = loaders(FACTS, epochs=3)
    assert loader.num_steps == 15
    assert facts_of_steps(loader) == [{each.id[:2]} for each in FACTS] * 3, "one each"
    (resumed,) = loaders(FACTS, epochs=3)
    resumed.load_state_dict(loader.state_dict())
    assert list(loader) == list(resumed) == [], "a finished stream stays finished"


def test_steps_in_a_row_have_the_next_statements() -> None:
    (loader,) = loaders(FACTS, epochs=2, steps_per_record=3)
    assert loader.num_steps == 30
    expected = [{each.id[:2]} for each in FACTS for _ in range(3)] * 2
    assert facts_of_steps(loader) == expected, "three steps on each fact"
    many = FACTS[-1]
    in_epochs = texts_of(rows_of(loaders([many], epochs=6)))
    in_a_row = loaders([many], epochs=2, steps_per_record=3)
    assert texts_of(rows_of(in_a_row)) == in_epochs


def test_statements_repeat_in_order_and_rotate_over_epochs() -> None:
    for each in FACTS:
        texts = texts_of(rows_of(loaders([each], epochs=5)))
        endless = itertools.islice(itertools.cycle(each.statements), 5 * 8)
        assert texts == list(endless)
    many = FACTS[-1]
    texts = texts_of(rows_of(loaders([many], epochs=3)))
    assert len(set(texts[:16])) == 16, "two epochs have other statements"
    assert set(texts) == set(many.statements), "three epochs have all twenty"


def test_the_global_batch_does_not_depend_on_ranks_and_micro_batches() -> None:
    expected = rows_of(loaders(FACTS, epochs=2))
    assert len(expected) == 2 * 5 * 8
    for num_ranks, batch_size in [(1, 1), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)]:
        ranks = loaders(FACTS, num_ranks, batch_size, epochs=2)
        assert rows_of(ranks) == expected
        states = {json.dumps(rank.state_dict()) for rank in ranks}
        assert len(states) == 1, "the state is the same on every rank"


def test_resume_at_every_position_with_other_ranks() -> None:
    expected = rows_of(loaders(FACTS, steps_per_record=2))
    shapes = [(1, 8), (2, 2), (4, 1), (1, 2), (4, 2)]
    for (num_ranks, batch_size), other in itertools.product(shapes, shapes):
        ranks = loaders(FACTS, num_ranks, batch_size, steps_per_record=2)
        micro_batches = 8 // (num_ranks * batch_size)
        rows: list[Row] = []
        for step in range(10 + 1):
            assert rows == expected[: step * 8]
            state = json.loads(json.dumps(ranks[-1].state_dict()))
            resumed = loaders(FACTS, *other, steps_per_record=2)
            for rank in resumed:
                rank.load_state_dict(state)
            assert rows_of(resumed) == expected[step * 8 :]
            rows += rows_of(ranks, micro_batches)


def test_a_state_saved_amid_a_global_batch_starts_it_anew() -> None:
    expected = rows_of(loaders(FACTS))
    ranks = loaders(FACTS, num_ranks=2, batch_size=1)
    rows_of(ranks, num_batches=4 + 3)
    resumed = loaders(FACTS)
    resumed[0].load_state_dict(ranks[0].state_dict())
    assert rows_of(resumed) == expected[8:]


def test_long_texts_lose_their_end_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    fitting = Fact("a", ("x" * (SEQ_LEN - 1), "short"), "?", ("!",))
    long = Fact("b", ("x" * SEQ_LEN, "y" * 100, "z"), "?", ("!",))
    with caplog.at_level(logging.WARNING, "titan_smf"):
        loaders([fitting])
        assert caplog.messages == []
        ranks = loaders([fitting, long], num_ranks=2, batch_size=4)
    assert caplog.messages == [
        "2 of the stream's 5 texts are longer than training.seq_len 12 and lose their end; 101 "
        "would hold them all"
    ]
    inputs, labels = rows_of(ranks)[8 + 1]
    assert inputs == (TOKENIZER.bos_id, *[ord("y")] * (SEQ_LEN - 1))
    assert labels == (ord("y"),) * SEQ_LEN


def test_resuming_something_else_says_what_differs(tmp_path: Path) -> None:
    (loader,) = loaders(FACTS, epochs=2)
    state = loader.state_dict()
    changed = [*FACTS[:-1], Fact("f20", (*FACTS[-1].statements[:-1], "other"), "?", ("!",))]
    digest = "stream_digest is [0-9a-f]{16} here and [0-9a-f]{16} in the checkpoint"
    writer = ShardWriter(str(tmp_path), "00000", TOKENIZER)
    writer.add("text " * 20)
    write_index(str(tmp_path), TOKENIZER, writer.close())
    shards = TokenLoader([WeightedShards("s", TokenShards(str(tmp_path)))], 12, 8, 0, 1, 0)
    cases: list[tuple[StreamLoader | TokenLoader, str]] = [
        (loaders(changed, epochs=2)[0], f": {digest}\\. Use the stream"),
        (loaders(FACTS[::-1], epochs=2)[0], f": {digest}\\. Use the stream"),
        (loaders(FACTS[:4], epochs=2)[0], f"stream_records is 4 here and 5 .*{digest}"),
        (loaders(FACTS)[0], "resumed: epochs is 1 here and 2 in the checkpoint. Use"),
        (
            loaders(FACTS, epochs=2, global_size=16)[0],
            "resumed: global_batch_size is 16 here and 8 in the checkpoint. Use the stream",
        ),
        (
            loaders(FACTS, epochs=2, seq_len=9)[0],
            "resumed: seq_len is 9 here and 12 in the checkpoint. Use the stream and settings",
        ),
        (shards, "epochs is absent here and 2 in the checkpoint"),
    ]
    for other, message in cases:
        with pytest.raises(CheckpointError, match=message):
            other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="seed is absent here and 0 in the checkpoint"):
        loader.load_state_dict(shards.state_dict())
    asked_otherwise = [Fact(f.id, f.statements, "Other?", ("other",)) for f in FACTS]
    loaders(asked_otherwise, epochs=2)[0].load_state_dict(state)
