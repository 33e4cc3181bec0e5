"""Configuration: precedence, round trip, documentation, and the message of each user mistake."""

import dataclasses
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from titan_smf.config.checks import check
from titan_smf.config.help import SECTIONS, _field_docstrings, print_help, usage
from titan_smf.config.job import JobConfig, add_origin, load_config, save_resolved
from titan_smf.config.parsing import describe_type, get, settings_of
from titan_smf.config.refused import REFUSED, page, refusal
from titan_smf.config.sections import Source
from titan_smf.data.tokenizer import load_tokenizer
from titan_smf.errors import ConfigError
from titan_smf.training.train_spec import model_args

VALID = """\
[training]
steps = 20
local_batch_size = 2
[memory]
layers = [1, 2]
[tokenizer]
name = "bytes"
[data]
sources = [{path = "corpus.txt"}]
"""
MISTAKES = tomllib.loads(Path(__file__).with_name("mistakes.toml").read_text())


def start(argv: list[str], ranks: int) -> None:
    """Everything of a run's start that checks settings and needs no process group."""
    config = load_config(argv)
    try:
        check(config, ranks)
        model_args(config, load_tokenizer(**dataclasses.asdict(config.tokenizer)))
    except ConfigError as error:
        add_origin(error, config)
        raise


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_its_message(name: str, tmp_path: Path) -> None:
    mistake = MISTAKES[name]
    file = write(tmp_path, mistake.get("file", VALID))
    command = mistake.get("command", f"--job.config <file> {mistake.get('options', '')}")

    def place(text: str) -> str:
        return text.replace("<file>", file).replace("<folder>", str(tmp_path))

    with pytest.raises(ConfigError) as error:
        start([place(word) for word in shlex.split(command)], mistake.get("ranks", 1))
    assert str(error.value) == place(mistake["message"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parallelism.pipeline_parallel_degree", "2"),
        ("parallelism.context_parallel_degree", "2"),
        ("parallelism.expert_parallel_degree", "2"),
        ("fault_tolerance.enable", "true"),
        ("training.enable_cpu_offload", "true"),
        ("training.dataloader.num_workers", "2"),
        ("optimizer.early_step_in_backward", "true"),
        ("model.converters", "float8"),
        ("quantize.linear.float8.emulate", "true"),
        ("checkpoint.initial_load_in_hf", "true"),
        ("checkpoint.async_mode", "async"),
        ("checkpoint.create_seed_checkpoint", "true"),
        ("checkpoint.export_dtype", "bfloat16"),
        ("job.custom_config_module", "mine"),
        ("experimental.custom_import", "mine"),
        ("comm.mode", "fake_backend"),
        ("validation.dataset", "c4_validation_2"),
    ],
)
def test_a_setting_without_effect_is_refused(key: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^command line: {key}: got .*; allowed: .*; \w"):
        check(load_config(["--job.config", write(tmp_path), f"--{key}", value]), world_size=1)


def test_the_page_of_refused_settings_lists_them_all() -> None:
    file = Path(__file__).parents[2] / "docs/settings.md"
    text = file.read_text()
    assert text == page(), "write it again: python -m titan_smf.config.refused > docs/settings.md"
    refused = [key for key in settings_of(JobConfig) if refusal(key)]
    assert sorted(re.findall(r"`(\w+\.[\w.]+)`", text)) == sorted(refused)
    assert all(any(key.startswith(start) for key in refused) for start in REFUSED)
    assert all(row.count("|") == 4 for row in text.splitlines()[8:])


@pytest.mark.parametrize(
    "given",
    [
        "--metrics.disable_color_printing",
        "--parallelism.disable_loss_parallel",
        "--profiling.save_memory_snapshot_folder=snapshots",
    ],
)
def test_a_harmless_setting_of_torchtitan_is_accepted(given: str, tmp_path: Path) -> None:
    check(load_config(["--job.config", write(tmp_path), given]), world_size=1)


def write(folder: Path, toml: str = VALID) -> str:
    """The path of a new file with this text."""
    file = folder / "run.toml"
    file.write_text(toml)
    return str(file)


def test_command_line_wins_over_file_wins_over_default(tmp_path: Path) -> None:
    file = write(tmp_path)
    config = load_config(["--training.steps=7", "--job.config", file, "--compile.enable"])
    assert (config.training.steps, config.training.local_batch_size) == (7, 2)
    assert config.training.seq_len == JobConfig().training.seq_len
    assert config.compile.enable is True
    assert config.origins == {
        "training.steps": "command line",
        "compile.enable": "command line",
        "training.local_batch_size": file,
        "memory.layers": file,
        "tokenizer.name": file,
        "data.sources": file,
    }
    check(config, world_size=4)


@pytest.mark.parametrize("flag", ["--job.config", "--job.config_file", "--job.config-file"])
def test_the_file_can_be_named_in_torchtitans_ways(flag: str, tmp_path: Path) -> None:
    file = write(tmp_path)
    assert load_config([flag, file]) == load_config([f"{flag}={file}"])
    assert load_config([flag, file]).training.steps == 20


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--optimizer.lr=.5", 0.5),
        ("--optimizer.lr=1", 1.0),
        ("--optimizer.lr=5e-4", 5e-4),
        ("--training.max_norm=inf", float("inf")),
        ("--memory.layers=4,12", [4, 12]),
        ("--memory.layers=[4, 12]", [4, 12]),
        ("--memory.layers=4", [4]),
        ("--memory.layers=[]", []),
        ("--memory.layers=none", None),
        ("--memory.share_values=true", True),
        ("--compile.components=model,loss", ["model", "loss"]),
        ('--compile.components=["model"]', ["model"]),
        ("--job.description=12", "12"),
        ("--job.description=", ""),
        ("--job.dump-folder=a b", "a b"),
        ('--data.sources=[{path = "a"}]', [Source("a")]),
        ('--data.sources=[{"path": "a", "weight": 2}]', [Source("a", 2.0)]),
    ],
)
def test_values_of_the_command_line(option: str, value: object) -> None:
    config = load_config([option])
    key = option[2:].partition("=")[0].replace("-", "_")
    assert get(config, key) == value
    assert type(get(config, key)) is type(value)


def test_resolved_file_gives_an_equal_configuration(tmp_path: Path) -> None:
    options = [
        "--job.description=quotes \" ' and \\ and\nlines, ä",
        "--training.max_norm=inf",
        "--optimizer.eps=1e-30",
        "--memory.layers=[]",
        "--memory.value_lr=1",
        '--data.sources=[{path = "a"}, {path = "b", weight = 0.25}]',
    ]
    config = load_config(["--job.config", write(tmp_path), *options])
    check(config, world_size=1)
    saved = tmp_path / "new" / "config.toml"
    save_resolved(config, saved)
    again = load_config(["--job.config", str(saved)])
    assert again == config
    check(again, world_size=1)
    text = saved.read_text()
    assert f"# From {tmp_path / 'run.toml'}: training.steps, " in text
    save_resolved(again, saved)
    assert saved.read_text().splitlines()[3:] == text.splitlines()[4:]


def test_none_is_the_default_wherever_it_can_be_given() -> None:
    """A resolved file leaves none out, so another default would come back in its place."""
    for key, annotation in settings_of(JobConfig).items():
        if type(None) in get_args(annotation) and refusal(key) is None:
            assert get(JobConfig(), key) is None, key


def test_an_error_of_the_model_is_completed_with_its_source(tmp_path: Path) -> None:
    file = write(tmp_path)
    config = load_config(["--job.config", file])
    error = ConfigError("memory.layers", [1, 2], "blocks 0 to 1 of flavor debug")
    add_origin(error, config)
    expected = "memory.layers: got [1, 2]; allowed: blocks 0 to 1 of flavor debug"
    assert str(error) == f"{file}: {expected}"
    of_default = ConfigError("memory.k", 9, "8")
    add_origin(of_default, config)
    assert str(of_default) == "default: memory.k: got 9; allowed: 8"


def test_every_setting_of_ours_is_documented() -> None:
    for section in dataclasses.fields(JobConfig):
        kind = type(getattr(JobConfig(), section.name))
        if kind.__module__.startswith("titan_smf"):
            documented = _field_docstrings(kind)
            assert set(inspect.get_annotations(kind)) <= set(documented), kind
    assert _field_docstrings(Source).keys() == {"path", "weight"}


def test_help_names_every_section_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    settable = [key for key in settings_of(JobConfig) if refusal(key) is None]
    assert set(SECTIONS) == {key.partition(".")[0] for key in settable}
    assert print_help(["--job.config", "x.toml", "--help"], usage())
    printed = capsys.readouterr().out
    assert all(f"\n  {section} " in printed for section in SECTIONS)
    for section in SECTIONS:
        assert print_help(["--help", section], "")
    printed = capsys.readouterr().out
    for key in settable:
        assert f"--{key}  {describe_type(settings_of(JobConfig)[key])}; default " in printed
    assert not print_help(["--job.config", "x.toml"], "")
    with pytest.raises(SystemExit) as error:
        print_help(["--help", "memry"], "")
    assert error.value.code == 2
    assert "allowed: memory" in capsys.readouterr().err


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from titan_smf.config.help import *; print_help(['--help'], usage());"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--job.config FILE" in done.stdout
