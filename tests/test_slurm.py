"""What the job scripts start and how they end, with SLURM's programs replaced by small scripts."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "scontrol": """
case "$1 $2" in
  "show hostnames") echo n1 ;;
  "show node") echo "   NodeAddr=10.0.0.1 NodeHostName=n1" ;;
  *) echo "scontrol $*" ;;
esac""",
    "scancel": 'touch "$STOPPED"',
    "srun": """
echo "srun $*"
if [ "$WAITS" ]; then until [ -f "$STOPPED" ]; do sleep 0.05; done; fi
exit $CODE""",
}


def start(folder: Path, script: str, code: int = 0, waits: str = "") -> "subprocess.Popen[str]":
    """A job on two nodes of two processes each, whose step ends with `code`, at once or if told."""
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    job = {"SUBMIT_DIR": ROOT, "JOB_NUM_NODES": 2, "CPUS_PER_TASK": 2, "JOB_NODELIST": "n[1-2]"}
    environment = {f"SLURM_{name}": str(value) for name, value in job.items()}
    environment |= {"SLURM_JOB_ID": "7", "PATH": f"{folder}:{os.environ['PATH']}", "WAITS": waits}
    environment |= {"VIRTUAL_ENV": "any", "STOPPED": f"{folder}/stopped", "CODE": str(code)}
    command = ["bash", str(ROOT / "slurm" / script), "--some.setting", "a b"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_each_node_holds_a_replica_in_the_words_of_the_program(tmp_path: Path) -> None:
    replicas = "parallelism.data_parallel_replicate_degree 2"
    scripts = sorted((ROOT / "slurm").glob("*.sh"))
    assert len(scripts) > 5
    for script in scripts:
        if script.name in ("launch.sh", "pipeline.sh"):
            continue
        printed, _ = start(tmp_path, script.name).communicate(timeout=60)
        assert "--nnodes 2 --nproc_per_node 2" in printed, script
        assert "--rdzv_endpoint 10.0.0.1:20007" in printed, script
        phase = "common." if script.name == "reproduce.sh" else ""
        assert printed.endswith(f"--some.setting a b --{phase}{replicas}\n"), script


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_ends_as_its_program_does(tmp_path: Path, code: int) -> None:
    job = start(tmp_path, "sparse_ft.sh", code)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == code
    assert "requeue" not in printed


@pytest.mark.parametrize("code", [0, 1])
def test_a_job_that_was_stopped_is_requeued(tmp_path: Path, code: int) -> None:
    job = start(tmp_path, "sparse_ft.sh", code, waits="yes")
    assert job.stdout is not None
    assert job.stdout.readline().startswith("srun ")
    job.send_signal(signal.SIGUSR1)
    printed, _ = job.communicate(timeout=60)
    assert ("scontrol requeue 7" in printed) == (code != 0), "unless it was at its end all the same"
    assert job.returncode == code
