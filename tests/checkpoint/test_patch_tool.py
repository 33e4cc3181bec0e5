"""`tools/patch.py`: makes, applies, reverts, shows and merges patches, and says how far it is."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patch_runs import Made, weights
from titan_smf.checkpoint.patch_checkpoints import export_patch
from titan_smf.commands.patch import main
from titan_smf.progress import ProgressTimer

TOOL = Path(__file__).parents[2] / "tools/patch.py"


def test_the_tool_makes_applies_reverts_shows_and_merges(
    saved: tuple[Path, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = tmp_path / "runs", saved[1][1]
    shutil.copytree(saved[0] / "2/float32", folder)
    (folder / "first/config.toml").write_text('[stream]\npath = "facts.jsonl"\n')
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    merged = tmp_path / "merged.safetensors"
    outputs = [tmp_path / "applied", tmp_path / "reverted"]
    for arguments in (
        ("export", folder / "base", folder / "first", "--output", one),
        ("export", folder / "first", folder / "second", "--output", two, "--data", "more facts"),
        ("apply", folder / "base", one, two, "--output", outputs[0]),
        ("revert", folder / "second", one, two, "--output", outputs[1]),
        ("merge", one, two, "--output", merged),
    ):
        main(list(map(str, arguments)))
        assert capsys.readouterr().err == ""
    assert weights(outputs[0]) == made["float32/second"][1]
    assert weights(outputs[1]) == made["float32/base"][1]
    main(["show", str(merged)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:2] == ["patch", f"{merged},"]
    assert shown[1].split() == ["rows", "5", "of", "98", "(5.102%)"]
    assert shown[-4].endswith("5 training steps on facts.jsonl")
    assert shown[-2].endswith("5 training steps on more facts")
    assert shown[-1].endswith(made["float32/first"][0])
    assert len({line.index(line.split("  ")[-1].strip()) for line in shown}) == 1, "aligned"
    with pytest.raises(SystemExit, match="2"):
        main(["merge", str(one)])  # without --output
    # As users start it.
    command = [sys.executable, str(TOOL), "apply", str(folder / "first"), str(one)]
    command += ["--output", str(tmp_path / "no")]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    light = "import sys, runpy; sys.argv = ['patch.py', 'apply', '--help']\n"
    light += f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
    light += "finally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", light], check=False).returncode == 0


def test_the_tool_reports_progress(
    saved: tuple[Path, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProgressTimer, "due", lambda timer: True)
    lines: list[str] = []
    runs = saved[0] / "1/float32"
    export_patch(runs / "base", runs / "first", "", lines.append)
    assert lines[0] == "comparing: 0 of 0 MiB"
    assert "step-5: fingerprint: 0 of 0 MiB" in lines[-1]
