"""`prepare_data`: the same shards for any number of workers and after any kill; clear errors."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from filelock import FileLock

from tests.support.corpora import documents_of, make_texts, write_all_kinds, write_jsonl
from titan_smf.data.prepare import prepare
from titan_smf.data.prepare_part import PrepareOptions
from titan_smf.data.raw_text import TextOptions
from titan_smf.data.token_shards import TokenShards
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import ConfigError, DataError

SMALL = PrepareOptions(part_bytes=4000, shard_tokens=2000)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_kind_of_input_gives_the_same_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = make_texts()
    for kind, path in write_all_kinds(tmp_path, texts).items():
        output = tmp_path / "out" / kind
        counts = prepare([path], str(output), tokenizer, SMALL)
        assert counts.documents == len(texts), kind
        assert documents_of(output, tokenizer) == texts, kind
        if kind not in ("t.jsonl.gz", "t.jsonl.zst", "hub"):
            assert len(list((output / "parts").iterdir())) > 3, "the work was divided"


def test_a_txt_file_may_be_one_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\n{name} again\n")
    options = PrepareOptions(TextOptions(split_text="none"), part_bytes=2)
    prepare([str(tmp_path)], str(tmp_path / "out"), tokenizer, options)
    assert documents_of(tmp_path / "out", tokenizer) == ["a\n\na again", "b\n\nb again"]


def test_pieces_of_any_size_lose_and_repeat_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = make_texts(40)
    paths = [write_jsonl(tmp_path / "t.jsonl", texts), str(tmp_path / "t.txt")]
    (tmp_path / "t.txt").write_text("\n\n" + "\n\n\n".join(texts) + "\n\n", encoding="utf-8")
    for part_bytes, path in itertools.product((1, 7, 50, 51, 52, 333, 100_000), paths):
        output = f"{path}-{part_bytes}"
        prepare([path], output, tokenizer, PrepareOptions(part_bytes=part_bytes))
        assert documents_of(output, tokenizer) == texts


@pytest.mark.launches
def test_output_is_the_same_for_any_number_of_workers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", make_texts())
    options = PrepareOptions(part_bytes=2000, shard_tokens=700, validation_fraction=0.2)
    for workers in (1, 3):
        prepare([path], str(tmp_path / f"{workers}"), tokenizer, options, workers)
    one = files_of(tmp_path / "1")
    assert one == files_of(tmp_path / "3")
    assert any("-001.tokens" in name for name in one), "parts had several shards"


LONG_RUN = """
import sys
from titan_smf.data.prepare import prepare
from titan_smf.data.prepare_part import PrepareOptions
from titan_smf.data.tokenizer import load_tokenizer
if __name__ == "__main__":
    options = PrepareOptions(part_bytes=3000, validation_fraction=0.1)
    prepare([sys.argv[1]], sys.argv[2], load_tokenizer("bytes"), options, int(sys.argv[3]))
"""


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.002)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_started_again_equals_uninterrupted(
    tmp_path: Path, tokenizer: Tokenizer, workers: int
) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", make_texts(12_000))
    script = tmp_path / "run.py"
    script.write_text(LONG_RUN)
    output = tmp_path / "killed"
    command = [sys.executable, str(script), path, str(output), str(workers)]
    records = output / "parts"
    kept: dict[str, int] = {}
    for kill in range(2):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        enough = len(kept) + 5 + 20 * kill
        wait_until(lambda: len(list(records.glob("*"))) >= enough, "parts are recorded")  # noqa: B023
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: group_is_gone(process.pid), "workers end with their parent")  # noqa: B023
        assert not (output / "index.json").exists(), "it was killed before the end"
        with pytest.raises(DataError, match=r"is not finished; run tools/prepare_data.py again"):
            TokenShards(str(output))
        finished = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
        assert kept.items() <= finished.items(), "finished parts were not done again"
        kept = finished
    options = PrepareOptions(part_bytes=3000, validation_fraction=0.1)
    resumed = prepare([path], str(output), tokenizer, options)
    uninterrupted = prepare([path], str(tmp_path / "whole"), tokenizer, options)
    assert resumed == uninterrupted
    assert files_of(output) == files_of(tmp_path / "whole")


def test_finished_work_is_kept_and_lost_or_torn_shards_are_made_again(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", make_texts())
    output = tmp_path / "out"
    options = PrepareOptions(part_bytes=4000, validation_fraction=0.3)
    first = prepare([path], str(output), tokenizer, options)
    times = {file: file.stat().st_mtime_ns for file in output.rglob("*.tokens")}
    assert prepare([path], str(output), tokenizer, options) == first
    assert times == {file: file.stat().st_mtime_ns for file in output.rglob("*.tokens")}
    whole = files_of(output)
    (output / "00001-000.tokens").unlink()
    torn = output / "validation" / "00002-000.tokens"
    torn.write_bytes(torn.read_bytes()[:-1])
    assert prepare([path], str(output), tokenizer, options) == first
    assert files_of(output) == whole


def test_validation_documents_are_no_training_documents(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    texts = make_texts(2000)
    path = write_jsonl(tmp_path / "t.jsonl", texts + texts[:500])
    options = PrepareOptions(part_bytes=20_000, validation_fraction=0.1)
    prepare([path], str(tmp_path / "out"), tokenizer, options)
    train = documents_of(tmp_path / "out", tokenizer)
    validation = documents_of(tmp_path / "out" / "validation", tokenizer)
    assert set(train).isdisjoint(validation)
    assert sorted(train + validation) == sorted(texts + texts[:500])
    assert 150 < len(set(validation)) < 250
    prepare([path], str(tmp_path / "again"), tokenizer, PrepareOptions(validation_fraction=0.1))
    assert documents_of(tmp_path / "again" / "validation", tokenizer) == validation


def test_output_may_be_a_url(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", make_texts())
    url, local = "memory://prepared/shards", str(tmp_path / "local")
    for output in (url, url, local):
        prepare([path], output, tokenizer, SMALL)
    assert TokenShards(url, cache_dir=tmp_path / "cache").digest == TokenShards(local).digest


def test_lines_rejected_before_count_when_a_preparation_goes_on(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "a"}\n[1]\n{"text": "b"}\n')
    prepare([str(path)], str(tmp_path / "out"), tokenizer, PrepareOptions(on_bad_line="skip"))
    for stricter, message in (
        (PrepareOptions(), "t.jsonl:2: is"),
        (PrepareOptions(on_bad_line="skip", max_bad_lines=0), "1 lines were rejected"),
    ):
        with pytest.raises(DataError, match=message):
            prepare([str(path)], str(tmp_path / "out"), tokenizer, stricter)


BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"text": "torn', "is not JSON: "),
    (b"[1, 2]", "is [1, 2], not an object"),
    (b'{"body": "x"}', "has no field 'text', but body"),
    (b'{"text": 3}', "field 'text' is 3, not a text"),
    (b'{"text": null}', "field 'text' is null, not a text"),
    (b'{"text": "\xff"}', "is not UTF-8"),
    (b'{"text": "\\ud800"}', "field 'text' holds half of a surrogate pair"),
    (b"[" * 100_000, "is not JSON: "),
]


@pytest.mark.launches
def test_bad_lines_are_named_or_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = b'{"text": "good"}\n' * 30
    for number, (line, cause) in enumerate(BAD_LINES):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(good + line + b"\n" + good)
        output = str(tmp_path / f"out-{number}")
        for options in (SMALL, PrepareOptions(part_bytes=100)):
            with pytest.raises(DataError) as raised:
                prepare([str(path)], output, tokenizer, options)
            assert f"{path}:31: {cause}" in str(raised.value)

    everything = tmp_path / "all.jsonl"
    everything.write_bytes(good + b"\n".join([*(line for line, _ in BAD_LINES), good]))
    for workers in (1, 3):
        output = str(tmp_path / f"out-all-{workers}")
        options = PrepareOptions(part_bytes=100, on_bad_line="skip", max_bad_lines=7)
        with pytest.raises(DataError, match=r"8 lines were rejected, --max-bad-lines allows 7"):
            prepare([str(everything)], output, tokenizer, options, workers)
        options = PrepareOptions(part_bytes=100, on_bad_line="skip", max_bad_lines=8)
        counts = prepare([str(everything)], output, tokenizer, options, workers)
        assert (counts.documents, counts.rejected_lines) == (60, 8)
        places = [where for where, _ in counts.rejected]
        assert places == [f"{everything}:{n}" for n in range(31, 39)]


def test_bad_text_and_rows_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "latin.txt").write_bytes(b"fine\n\n" * 20 + b"a line\nna\xefve\n\nfine\n")
    rows = ["fine"] * 50 + [None] + ["fine"] * 9
    table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=20)
    broken = pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "utf8.parquet")
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", ["fine", "fine"])
    in_body = PrepareOptions(TextOptions(field="body"))
    for path, options, message in [
        (f"{tmp_path}/latin.txt", SMALL, r"latin.txt:42: is not UTF-8"),
        (f"{tmp_path}/rows.parquet", SMALL, r"row 51: field 'text' is null, not a text"),
        (f"{tmp_path}/utf8.parquet", SMALL, r"utf8.parquet: row 2: is not UTF-8"),
        (f"hf:{tmp_path}/hub", in_body, r"hub: file 1 of 1, row 1: has no field 'body', but text"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare([path], f"{tmp_path}/out/{path[-5:]}", tokenizer, options)


def test_empty_documents_are_left_out_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", ["one", "", " \n", "two"])
    counts = prepare([path], str(tmp_path / "out"), tokenizer, SMALL)
    assert (counts.documents, counts.empty_documents) == (2, 2)
    assert documents_of(tmp_path / "out", tokenizer) == ["one", "two"]


def test_a_failed_start_does_not_bind_the_output(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"body": "one"}\n')
    with pytest.raises(DataError, match="has no field 'text'"):
        prepare([str(path)], str(tmp_path / "out"), tokenizer, SMALL)
    options = PrepareOptions(TextOptions(field="body"))
    prepare([str(path)], str(tmp_path / "out"), tokenizer, options)
    assert documents_of(tmp_path / "out", tokenizer) == ["one"]


def test_another_run_on_the_same_output_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", ["one"])
    output = tmp_path / "out"
    output.mkdir()
    with FileLock(output / ".lock"), pytest.raises(DataError, match="another run is writing to it"):
        prepare([path], str(output), tokenizer, SMALL)


def test_wrong_options_are_named() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"validation_fraction": 1.0}, "validation_fraction: got 1.0"),
        ({"on_bad_line": "ignore"}, "on_bad_line: got 'ignore'; allowed: raise, skip"),
        ({"part_bytes": 0}, "part_bytes: got 0"),
        ({"max_bad_lines": -1}, "max_bad_lines: got -1"),
    ]
    for options, message in wrong:
        with pytest.raises(ConfigError, match=message):
            PrepareOptions(**options)
    with pytest.raises(ConfigError, match="split_text: got 'lines'; allowed: blank-lines, none"):
        TextOptions(split_text="lines")
