"""Setting up: the environment that is used, the torch that is kept, the versions we rely on.

The set-up runs for real in a copy of its scripts; only the package index is replaced, by a folder
of empty wheels.
"""

import base64
import hashlib
import importlib
import inspect
import os
import pkgutil
import shutil
import subprocess
import textwrap
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import starts_processes

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH = "torch>=2.11,<2.16"


def write_wheel(folder: object, name: str, version: str, *requires: str) -> str:
    """Write an empty wheel; returns its file name. The build backend below has a copy of this."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: test\n"
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires)
    files = {
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{info}/RECORD,,\n"
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
        record += f"{path},sha256={digest.decode().rstrip('=')},{len(text)}\n"
    wheel = f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{wheel}", "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    return wheel


@dataclass
class Clone:
    """A copy of the set-up scripts beside a small project, and an index of empty wheels."""

    root: Path
    wheels: Path

    def set_up(self, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Source `tools/setup.sh` as the tools do; prints the folder and Python it leads to."""
        script = f'set -euo pipefail; source "{self.root}/tools/setup.sh"; pwd; command -v python'
        return self._run(["bash", "-c", script], cwd, environment)

    def install_torch(self, wanted: str) -> None:
        """Put this version of the empty torch into the clone's environment."""
        python = str(self.root / ".venv/bin/python")
        self._run(
            [python, "-m", "pip", "install", f"torch=={wanted}"], self.root, {}
        ).check_returncode()

    def torch(self) -> str:
        """The version of torch in the clone's environment."""
        code = "from importlib.metadata import version; print(version('torch'))"
        return self._run(
            [str(self.root / ".venv/bin/python"), "-c", code], self.root, {}
        ).stdout.strip()

    def _run(
        self, command: list[str], cwd: Path, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("VIRTUAL_ENV", "PYTHONPATH") and not name.startswith(("CONDA_", "PIP_"))
        }
        index = {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": self.wheels.as_uri(),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        return subprocess.run(
            command,
            cwd=cwd,
            env={**inherited, **index, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone whose environment was made by a first run, which is checked here."""
    folder = tmp_path_factory.mktemp("set up")
    clone = Clone(folder / "a clone", folder / "wheels")
    clone.wheels.mkdir()
    for torch in ("2.10.0", "2.11.0", "2.13.1", "2.15.0", "2.16.0"):
        write_wheel(clone.wheels, "torch", torch)
    (clone.root / "tools").mkdir(parents=True)
    for name in ("setup.sh", "install.py"):
        shutil.copy(ROOT / "tools" / name, clone.root / "tools")
    (clone.root / "pyproject.toml").write_text(
        textwrap.dedent(f"""\
            [build-system]
            requires = []
            build-backend = "backend"
            backend-path = ["."]
            [project]
            name = "titan_smf"
            version = "1"
            dependencies = ["{TORCH}"]
            """)
    )
    (clone.root / "backend.py").write_text(
        "import base64, hashlib, zipfile\n"
        + inspect.getsource(write_wheel)
        + "def build_editable(folder, *_):\n"
        f"    return write_wheel(folder, 'titan_smf', '1', '{TORCH}')\n"
    )
    first = clone.set_up(folder)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"Making {clone.root}/.venv with Python 3.1")
    assert "Installing into " in first.stdout
    assert clone.torch() == "2.13.1"
    return clone


def test_a_second_run_does_nothing_from_any_folder(clone: Clone, tmp_path: Path) -> None:
    again = clone.set_up(tmp_path, CI="true", CDPATH=str(tmp_path))
    assert again.stdout == f"{clone.root}\n{clone.root}/.venv/bin/python\n"
    assert (again.returncode, again.stderr) == (0, "")


def test_a_changed_pyproject_is_installed_again(clone: Clone) -> None:
    with (clone.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert "Installing into " in clone.set_up(clone.root).stdout
    assert "Installing into " not in clone.set_up(clone.root).stdout


@pytest.mark.parametrize("inside", ["2.11.0", "2.15.0"])
def test_an_installed_torch_in_range_is_kept(clone: Clone, inside: str) -> None:
    clone.install_torch(inside)
    (clone.root / ".venv/.titan_smf-installed").unlink()
    done = clone.set_up(clone.root)
    assert done.returncode == 0, done.stderr
    assert "Installing into " in done.stdout
    assert clone.torch() == inside


@pytest.mark.parametrize("outside", ["2.10.0", "2.16.0"])
def test_an_installed_torch_outside_the_range_stops_and_stays(clone: Clone, outside: str) -> None:
    clone.install_torch(outside)
    done = clone.set_up(clone.root)
    assert done.returncode == 1
    assert f"has torch {outside}; supported: {TORCH}" in done.stderr
    assert clone.torch() == outside
    clone.install_torch("2.13.1")


def test_a_failed_installation_shows_why_and_is_tried_again(clone: Clone) -> None:
    (clone.root / ".venv/.titan_smf-installed").unlink()
    for _ in range(2):
        done = clone.set_up(clone.root, PIP_CONSTRAINT="absent")
        assert done.returncode == 1
        assert "absent" in done.stderr
        assert "error: the installation failed; log: " in done.stderr


def test_the_active_environment_is_used(clone: Clone, tmp_path: Path) -> None:
    active = tmp_path / "mine"
    active.symlink_to(clone.root / ".venv")
    other = Clone(tmp_path / "other", clone.wheels)
    shutil.copytree(clone.root, other.root, ignore=shutil.ignore_patterns(".venv"))
    used = f"{other.root}\n{active}/bin/python\n"
    assert other.set_up(tmp_path, VIRTUAL_ENV=str(active)).stdout.endswith(used)
    conda = {"CONDA_PREFIX": str(active), "CONDA_DEFAULT_ENV": "mine"}
    assert other.set_up(tmp_path, **conda).stdout == used
    assert not (other.root / ".venv").exists()
    base = other.set_up(
        tmp_path, **conda | {"CONDA_DEFAULT_ENV": "base", "PATH": str(tools(tmp_path))}
    )
    assert "Python 3.11 to 3.13 is needed" in base.stderr


def tools(folder: Path) -> Path:
    """A folder for PATH that has what the script itself needs, a Python too old, and no other."""
    path = folder / "bin"
    path.mkdir()
    for name in ("bash", "dirname"):
        (path / name).symlink_to(str(shutil.which(name)))
    (path / "python3").write_text(f"#!{shutil.which('bash')}\nexit 1\n")
    (path / "python3").chmod(0o755)
    return path


def test_an_environment_with_another_python_is_refused(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/python").chmod(0o755)
    done = clone.set_up(tmp_path, VIRTUAL_ENV=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path} has no working Python 3.11 to 3.13: activate")


def test_a_python_without_venv_is_named(clone: Clone, tmp_path: Path) -> None:
    path = tools(tmp_path)
    (path / "python3").write_text("case $2 in *ensurepip*) exit 1; esac\n")
    other = Clone(tmp_path / "other", clone.wheels)
    shutil.copytree(clone.root / "tools", other.root / "tools")
    done = other.set_up(tmp_path, PATH=str(path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: python3 cannot make virtual environments: install its")


def test_scripts_parse_and_can_be_run() -> None:
    scripts = [*ROOT.glob(".ci/*"), *ROOT.glob("tools/*.sh"), *ROOT.glob("slurm/*.sh")]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        assert os.access(script, os.X_OK) == script.read_text().startswith("#!"), script


def test_tests_that_start_processes_are_found_by_their_code() -> None:
    assert starts_processes([Clone])
    assert starts_processes([test_scripts_parse_and_can_be_run])
    assert not starts_processes([test_a_change_is_named])


def test_installed_versions_meet_the_bounds() -> None:
    lines = PYPROJECT["dependencies"] + PYPROJECT["optional-dependencies"]["test"]
    for requirement in map(Requirement, lines):
        installed = version(requirement.name)
        assert requirement.specifier.contains(installed, prereleases=True), (
            f"{requirement.name} {installed} is installed; pyproject.toml: {requirement}"
        )


# What the project takes from other packages beyond their documented interface, and the parameters
# it passes.
RELIED_ON = {
    "torch._utils._get_available_device_type": "",
    "torch._utils._get_device_module": "device_type",
    "torch.distributed.fsdp.FSDPModule.set_force_sum_reduction_for_comms": "enable",
    "torch.distributed.tensor.distribute_tensor": "src_data_rank",
    "torchtitan.components.loss.IGNORE_INDEX": "",
    "torchtitan.components.lr_scheduler.build_lr_schedulers": (
        "optimizers lr_scheduler_config training_steps"
    ),
    "torchtitan.components.metrics.MetricsProcessor": "job_config parallel_dims",
    "torchtitan.components.metrics.MetricsProcessor.should_log": "step",
    "torchtitan.components.optimizer.OptimizersContainer._post_init": (
        "all_params optimizer_kwargs"
    ),
    "torchtitan.config.TORCH_DTYPE_MAP": "",
    "torchtitan.distributed.ParallelDims.get_mesh": "dims",
    "torchtitan.distributed.ParallelDims.fsdp_enabled": "",
    "torchtitan.distributed.ParallelDims.dp_replicate_enabled": "",
    "torchtitan.distributed.activation_checkpoint.apply_ac": (
        "model ac_config model_compile_enabled op_sac_save_list base_folder"
    ),
    "torchtitan.distributed.utils.clip_grad_norm_": "parameters max_norm foreach",
    "torchtitan.distributed.utils.set_pg_timeouts": "timeout parallel_dims",
    "torchtitan.models.llama3.infra.parallelize._op_sac_save_list": "",
    "torchtitan.models.llama3.infra.parallelize.apply_fsdp": (
        "model dp_mesh param_dtype reduce_dtype pp_enabled reshard_after_forward_policy"
    ),
    "torchtitan.models.llama3.model.args.TransformerModelArgs.update_from_config": "job_config",
    "torchtitan.models.llama3.model.model.Attention": "model_args",
    "torchtitan.models.llama3.model.model.FeedForward": (
        "dim hidden_dim multiple_of ffn_dim_multiplier"
    ),
    "torchtitan.models.llama3.model.model.Transformer.init_weights": "buffer_device",
    "torchtitan.models.llama3.model.model.TransformerBlock": "layer_id model_args",
    "torchtitan.models.llama3.model.model.TransformerBlock.forward": (
        "x freqs_cis attention_masks positions"
    ),
    "torch.distributed.fsdp.FSDPModule.set_reshard_after_forward": "reshard_after_forward recurse",
    "torchtitan.protocols.train_spec.TrainSpec": (
        "model_cls model_args parallelize_fn pipelining_fn build_optimizers_fn "
        "build_lr_schedulers_fn build_dataloader_fn build_tokenizer_fn build_loss_fn "
        "build_metrics_processor_fn"
    ),
    "torchtitan.protocols.train_spec.register_train_spec": "name train_spec",
    "torchtitan.tools.profiling.maybe_enable_memory_snapshot": (
        "profiling_config global_step base_folder"
    ),
    "torchtitan.tools.profiling.maybe_enable_profiling": "profiling_config global_step base_folder",
    "torchtitan.tools.utils.device_type": "",
    "torchtitan.train.Trainer.batch_generator": "data_iterable",
    "torchtitan.train.Trainer.post_dataloading_process": "input_dict labels",
    "torchtitan.train.Trainer.train_step": "data_iterator",
}


def changes(relied_on: Mapping[str, str]) -> list[str]:
    """What of `relied_on` is no longer there, in words."""
    found = []
    for name, parameters in relied_on.items():
        try:
            thing = pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            found.append(f"{name} is gone")
            continue
        taken = inspect.signature(thing).parameters if parameters else {}
        lost = [parameter for parameter in parameters.split() if parameter not in taken]
        found += [f"{name}({', '.join(taken)}) no longer takes {parameter}" for parameter in lost]
    return found


def test_torch_and_torchtitan_have_what_we_rely_on() -> None:
    importlib.import_module("titan_smf.torchtitan_api")
    installed = f"torch {version('torch')}, torchtitan {version('torchtitan')}"
    assert not changes(RELIED_ON), f"{installed}: " + "; ".join(changes(RELIED_ON))


def test_a_change_is_named() -> None:
    assert changes({"os.path.join": "a b", "os.path.joint": "", "nopackage.thing": ""}) == [
        "os.path.join(a, p) no longer takes b",
        "os.path.joint is gone",
        "nopackage.thing is gone",
    ]
