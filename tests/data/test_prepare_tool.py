"""`tools/prepare_data.py`: reports, resumes, and names its user's mistakes in one line."""

import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.support.corpora import documents_of, make_texts, write_jsonl
from titan_smf.commands.entry import exit_code
from titan_smf.commands.prepare_data import main
from titan_smf.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_imports_neither_torch_nor_datasets() -> None:
    script = (
        "import sys, runpy; sys.argv = ['prepare_data.py', '--help']\n"
        "try: runpy.run_path('tools/prepare_data.py', run_name='__main__')\n"
        "except SystemExit: print(sorted({'torch', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: prepare_data.py")
    assert done.stdout.endswith("[]\n")


def test_the_tool_reports_and_resumes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", make_texts())
    output = tmp_path / "out"
    arguments = [path, "--output", output, "--train-tokenizer", 300, "--validation-fraction", 0.1]
    for attempt in range(2):
        done = run_tool(*arguments, "--workers", 2)
        assert done.returncode == 0, done.stderr
        assert "400 documents" in done.stdout
        assert "0 rejected lines" in done.stdout
        assert ("tokens (" in done.stdout) == (attempt == 0), "progress, where there is work"
    tokenizer = load_tokenizer(path=str(output / "tokenizer.tiktoken"))
    assert tokenizer.n_vocab == 300
    train = documents_of(output, tokenizer)
    validation = documents_of(output / "validation", tokenizer)
    assert sorted(train + validation) == sorted(make_texts())


def test_user_mistakes_end_with_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "corpus.jsonl", make_texts(20))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is not parquet PAR1")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 999)[:-9])
    harmed = bytearray(gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(9999))))
    harmed[10:20] = b"\xff" * 10
    (tmp_path / "harmed.jsonl.gz").write_bytes(harmed)
    (tmp_path / "words.csv").write_text("a,b")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "n.parquet")
    out = tmp_path / "out"
    prepared = ["--output", out, "--tokenizer-name", "bytes"]
    assert exit_code(main, [path, *map(str, prepared)]) == 0

    fresh = ["--output", tmp_path / "fresh", "--tokenizer-name", "bytes"]
    other = ["--output", tmp_path / "fresh"]
    for arguments, message in [
        ([tmp_path / "corpus.json", *fresh], "does not exist; beside it there is corpus.jsonl"),
        (["some/dataset", *fresh], "write hf:some/dataset"),
        ([tmp_path / "*.text", *fresh], "no file matches"),
        ([tmp_path / "words.csv", *fresh], "is of no known kind"),
        ([tmp_path / "empty.jsonl", *fresh], "empty.jsonl: is empty"),
        ([tmp_path / "broken.jsonl", *fresh], "broken.jsonl:2: is not JSON: Expecting value"),
        ([tmp_path / "broken.parquet", *fresh], "broken.parquet: cannot be read: "),
        ([tmp_path / "torn.jsonl.gz", *fresh], "torn.jsonl.gz: cannot be read: Compressed"),
        ([tmp_path / "harmed.jsonl.gz", *fresh], "harmed.jsonl.gz: cannot be read: Error -3"),
        ([tmp_path / "n.parquet", *fresh], "has no column 'text', but n"),
        ([tmp_path / "n.parquet", *fresh, "--field", "n"], "column 'n' holds int64, not text"),
        (["nosuch://bucket/x.txt", *fresh], "nosuch://bucket/x.txt: cannot be reached"),
        ([path, *other], "either tokenizer.name or tokenizer.path"),
        ([path, *other, "--tokenizer-path", tmp_path / "no"], "no: cannot be read: No such file"),
        ([path, *fresh, "--validation-fraction", 2], "validation_fraction: got 2.0"),
        ([path, *prepared, "--field", "body"], "was made with other settings: field (text there"),
        ([path, "--output", out, "--train-tokenizer", 290], "was made with other settings: token"),
        ([path, path, *prepared], "was made with other settings: inputs"),
        ([path, "--output", tmp_path / "empty.jsonl", "--tokenizer-name", "bytes"],
         "empty.jsonl: cannot be written"),
    ]:  # fmt: skip
        assert exit_code(main, list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1, "one line, no traceback"

    write_jsonl(tmp_path / "corpus.jsonl", make_texts(21))
    done = run_tool(path, *prepared)
    assert (done.returncode, "the files behind the inputs" in done.stderr) == (2, True)
    assert done.stderr.count("\n") == 1
