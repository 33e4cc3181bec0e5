"""A mistake ends a run with one message, exit code 2 and no traceback; on several ranks once."""

import io
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

from tests.support.launch import run_on_ranks
from tests.support.training_runs import CONFIG

TRAIN = ["-m", "titan_smf.train", "--job.config", str(CONFIG)]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)


def test_one_message_and_exit_code_2(tmp_path: Path) -> None:
    words = ["--job.dump_folder", str(tmp_path), "--checkpoint.initial_load_path", "nowhere"]
    message = (
        "error: checkpoint.initial_load_path: nowhere: no complete checkpoint there; "
        "give a run's folder, its checkpoints folder, or one step-N folder\n"
    )
    result = run(*TRAIN, *words)
    assert result.stderr == message
    assert result.returncode == 2
    settings = (
        "error: command line: memory.layers: got [9]; allowed: layer indices from 0 to 3: "
        "the model has 4\n"
    )
    argv = [*TRAIN[2:], *words, "--memory.layers", "[9]"]
    assert run_on_ranks(start, 1, argv) == [(2, settings)], "before any weights are looked for"


def start(rank: int, ranks: int, argv: list[str]) -> tuple[int, str]:
    """The exit code and the messages of the entry point."""
    from titan_smf.commands.entry import exit_code_on_ranks
    from titan_smf.commands.train import main

    with redirect_stderr(io.StringIO()) as messages:
        return exit_code_on_ranks(main, argv), messages.getvalue()


def test_several_ranks_print_the_message_once(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    result = run(*launcher, *TRAIN, "--job.dump_folder", str(tmp_path), "--memory.k", "200")
    message = "error: command line: memory.k: got 200; allowed: at most memory.n_keys, 96"
    assert (result.stdout + result.stderr).count(message) == 1
    assert result.returncode != 0


def test_help_needs_no_torch() -> None:
    program = "import sys; sys.argv = ['train', '--help']; import runpy\n" + (
        "try: runpy.run_module('titan_smf.train', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    result = run("-c", program)
    assert result.returncode == 0, result.stderr
    assert "--job.config FILE" in result.stdout
