"""Configuration: precedence, round trip, documentation, and the message of each user mistake."""

import dataclasses
import inspect
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from titan_smf.config import JobConfig, check, explain, load_config, save_resolved
from titan_smf.config_checks import unsupported
from titan_smf.config_parsing import describe, get, settings_of
from titan_smf.config_sections import Source
from titan_smf.data.tokenizer import load_tokenizer
from titan_smf.errors import ConfigError
from titan_smf.help import SECTIONS, _field_docstrings, print_help
from titan_smf.train_spec import model_args

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


@dataclass(frozen=True)
class Mistake:
    """What a user gives, and the message for it; <file> is run.toml, <folder> where it lies."""

    message: str
    toml: str = VALID
    argv: str = "--job.config <file>"
    more: tuple[str, ...] = ()
    ranks: int = 1


def with_options(message: str, *options: str, ranks: int = 1) -> Mistake:
    """A mistake on the command line, beside a valid file."""
    return Mistake(f"command line: {message}", more=options, ranks=ranks)


def in_file(message: str, toml: str) -> Mistake:
    """A mistake in the file."""
    return Mistake(message, toml=toml)


MISTAKES = {
    # The file itself.
    "missing file": Mistake(
        "command line: job.config: got '<folder>/rum.toml'; "
        "allowed: an existing TOML file; in <folder>: run.toml",
        argv="--job.config <folder>/rum.toml",
    ),
    "missing folder": Mistake(
        "command line: job.config: got '<folder>/a/b/run.toml'; "
        "allowed: an existing TOML file; in <folder>: run.toml",
        argv="--job.config_file=<folder>/a/b/run.toml",
    ),
    "folder instead of a file": Mistake(
        "command line: job.config: got '<folder>'; "
        "allowed: an existing TOML file; in <folder>: run.toml",
        argv="--job.config <folder>",
    ),
    "file without a name": Mistake(
        "command line: job.config: got None; allowed: a value after it: a string",
        argv="--job.config",
    ),
    "not TOML": in_file(
        "<file>, line 2: training.steps: got 'steps = ten'; allowed: TOML syntax (Invalid value)",
        "[training]\nsteps = ten\n",
    ),
    "text that does not end": in_file(
        """<file>, line 3: job: got 'x'; allowed: TOML syntax (Unterminated string)""",
        '[job]\ndescription = """\nx',
    ),
    "text after a value": in_file(
        "<file>, line 2: training.steps: got 'steps = 1 seq_len = 2'; "
        "allowed: TOML syntax (Expected newline or end of document after a statement)",
        "[training]\nsteps = 1 seq_len = 2",
    ),
    "key twice": in_file(
        "<file>, line 4: training.steps: got 'steps = 2'; "
        "allowed: each key and each [section] once (Cannot overwrite a value)",
        "[training]\nsteps = 1\nseq_len = 8\nsteps = 2",
    ),
    "section twice": in_file(
        "<file>, line 3: training: got '[training]'; "
        "allowed: each key and each [section] once (Cannot declare ('training',) twice)",
        "[training]\nsteps = 1\n[training]\nseq_len = 2\n",
    ),
    # Names.
    "unknown key": in_file(
        "<file>: memory.n_key: got 128; "
        "allowed: memory.n_keys is the nearest setting, none has this name",
        "[memory]\nn_key = 128\n",
    ),
    "key of another section": with_options(
        "training.lr: got '0.1'; allowed: optimizer.lr is the nearest setting, none has this name",
        "--training.lr",
        "0.1",
    ),
    "unknown section": with_options(
        "world.size: got '4'; allowed: the sections job, profiling, metrics, "
        "model, optimizer, lr_scheduler, training, parallelism, checkpoint, activation_checkpoint, "
        "compile, quantize, comm, memory_estimation, fault_tolerance, experimental, validation, "
        "debug, memory, tokenizer, data, none has this name",
        "--world.size=4",
    ),
    "misspelt section": in_file(
        "<file>: memry.heads: got 4; "
        "allowed: memory.heads is the nearest setting, none has this name",
        "[memry]\nheads = 4\n",
    ),
    "unknown key, nothing near": with_options(
        "memory.colour: got 'red'; "
        "allowed: the settings that --help memory lists, none has this name",
        "--memory.colour=red",
    ),
    "unknown option without a section": with_options(
        "flavor: got 'debug'; allowed: model.flavor is the nearest setting, none has this name",
        "--flavor",
        "debug",
    ),
    "section that is a value": in_file(
        "<file>: memory: got [1, 2]; allowed: a table of settings, [memory]", "memory = [1, 2]\n"
    ),
    # Types.
    "text for a number": in_file(
        "<file>: training.steps: got 'ten'; allowed: a whole number", '[training]\nsteps = "ten"\n'
    ),
    "quoted number": in_file(
        "<file>: training.steps: got '10'; allowed: a whole number", '[training]\nsteps = "10"\n'
    ),
    "fraction for a whole number": with_options(
        "training.steps: got '1.5'; allowed: a whole number", "--training.steps", "1.5"
    ),
    "true for a number": in_file(
        "<file>: training.steps: got True; allowed: a whole number", "[training]\nsteps = true\n"
    ),
    "number for true or false": in_file(
        "<file>: compile.enable: got 1; allowed: true or false", "[compile]\nenable = 1\n"
    ),
    "yes for true": with_options(
        "compile.enable: got 'yes'; allowed: true or false", "--compile.enable", "yes"
    ),
    "layers as text": in_file(
        "<file>: memory.layers: got '6,12'; allowed: none or a list, each item a whole number",
        '[memory]\nlayers = "6,12"\n',
    ),
    "one layer of a wrong type": in_file(
        "<file>: memory.layers[1]: got '12'; allowed: none or a list, each item a whole number",
        '[memory]\nlayers = [6, "12"]\n',
    ),
    "unknown choice": with_options(
        'memory.value_dtype: got \'fp16\'; allowed: "float32" or "bfloat16" or "float64"',
        "--memory.value_dtype=fp16",
    ),
    "source as text": in_file(
        "<file>: data.sources: got 'a.txt'; "
        "allowed: a list, each item a table {path = a string, weight = a number}",
        '[data]\nsources = "a.txt"\n',
    ),
    "unknown key of a source": in_file(
        "<file>: data.sources[0].wieght: got 2; "
        "allowed: a list, each item a table {path = a string, weight = a number}",
        '[[data.sources]]\npath = "a.txt"\nwieght = 2\n',
    ),
    "source without a path": in_file(
        "<file>: data.sources[0].path: got {'weight': 2}; "
        "allowed: a list, each item a table {path = a string, weight = a number}",
        "[[data.sources]]\nweight = 2\n",
    ),
    # The command line.
    "a word that is no option": with_options(
        "argument: got 'debug.toml'; allowed: --section.key value", "debug.toml"
    ),
    "option without its value": with_options(
        "training.steps: got None; allowed: a value after it: a whole number",
        "--training.steps",
        "--compile.enable",
    ),
    "option twice": with_options(
        "training.steps: got '6'; allowed: one value, but the option is given twice",
        "--training.steps=5",
        "--training.steps",
        "6",
    ),
    # What settings mean.
    "no steps": with_options("training.steps: got 0; allowed: 1 or more", "--training.steps=0"),
    "negative rate": with_options(
        "optimizer.lr: got -0.1; allowed: 0 or more", "--optimizer.lr=-0.1"
    ),
    "rate that is not a number": with_options(
        "optimizer.lr: got nan; allowed: 0 or more", "--optimizer.lr=nan"
    ),
    "decay above the whole run": with_options(
        "lr_scheduler.decay_ratio: got 1.5; allowed: from 0 to 1", "--lr_scheduler.decay_ratio=1.5"
    ),
    "schedule shorter than the run": with_options(
        "lr_scheduler.total_steps: got 10; "
        "allowed: training.steps (20) or more: past its end the rate would turn negative",
        "--lr_scheduler.total_steps=10",
    ),
    "beta that never forgets": with_options(
        "optimizer.beta2: got 1.0; allowed: from 0 to below 1", "--optimizer.beta2=1"
    ),
    "unknown optimizer": with_options(
        "optimizer.name: got 'SGD'; allowed: Adam or AdamW", "--optimizer.name", "SGD"
    ),
    "float64 in one place": with_options(
        "training.dtype: got 'float64'; allowed: float64 in all of training.dtype, "
        "mixed_precision_param and mixed_precision_reduce, or in none of them",
        "--training.dtype=float64",
    ),
    "unknown part to compile": with_options(
        "compile.components: got ['model', 'optimizer']; allowed: ['model', 'loss']",
        "--compile.components=model,optimizer",
    ),
    "another architecture": with_options(
        "model.name: got 'llama3'; allowed: memory_llama", "--model.name=llama3"
    ),
    "layer twice": with_options(
        "memory.layers: got [2, 2]; allowed: each block once", "--memory.layers=2,2"
    ),
    "no data": in_file(
        "default: data.sources: got []; "
        "allowed: at least one table {path = ..., weight = ...}, with a path and a weight above 0",
        '[tokenizer]\nname = "bytes"\n',
    ),
    "source without a share": with_options(
        "data.sources: got [Source(path='a', weight=0.0)]; "
        "allowed: at least one table {path = ..., weight = ...}, with a path and a weight above 0",
        '--data.sources=[{"path": "a", "weight": 0}]',
    ),
    "validation without data": Mistake(
        "default: data.validation: got ''; allowed: a path, because validation.enable is true",
        more=("--validation.enable",),
    ),
    "batch not divisible by ranks": with_options(
        "training.global_batch_size: got 12; allowed: -1, or a multiple of "
        "training.local_batch_size (2) times the number of ranks, 4",
        "--training.global_batch_size=12",
        ranks=4,
    ),
    "replicas that do not divide the ranks": with_options(
        "parallelism.data_parallel_replicate_degree: got 3; "
        "allowed: a divisor of the number of ranks, 4",
        "--parallelism.data_parallel_replicate_degree=3",
        ranks=4,
    ),
    "more shards than ranks": with_options(
        "parallelism.data_parallel_shard_degree: got 8; allowed: -1 or 2: "
        "times data_parallel_replicate_degree (2) it gives the number of ranks, 4",
        "--parallelism.data_parallel_shard_degree=8",
        "--parallelism.data_parallel_replicate_degree=2",
        ranks=4,
    ),
    "replicas of one rank": with_options(
        "parallelism.data_parallel_replicate_degree: got 4; "
        "allowed: 1 (FSDP), or at most 2: each replica is split over 2 ranks or more",
        "--parallelism.data_parallel_replicate_degree=4",
        ranks=4,
    ),
    # What the tokenizer and the model check.
    "no tokenizer": with_options(
        "tokenizer.name: got ''; "
        "allowed: either tokenizer.name or tokenizer.path, not both and not neither",
        "--tokenizer.name=",
    ),
    "two tokenizers": Mistake(
        "<file>: tokenizer.name: got 'bytes'; "
        "allowed: either tokenizer.name or tokenizer.path, not both and not neither",
        more=("--tokenizer.path=ranks.tiktoken",),
    ),
    "unknown flavor": with_options(
        "model.flavor: got '7B'; allowed: debug, demo, 1.3B", "--model.flavor=7B"
    ),
    "layer outside the model": with_options(
        "memory.layers: got [4]; allowed: layer indices from 0 to 3: the model has 4",
        "--memory.layers=4",
    ),
    "negative layer": with_options(
        "memory.layers: got [-1]; allowed: layer indices from 0 to 3: the model has 4",
        "--memory.layers=-1",
    ),
    "more slots than half-keys": with_options(
        "memory.k: got 32; allowed: at most memory.n_keys, 16",
        "--memory.k=32",
        "--memory.n_keys=16",
    ),
    "fewer half-keys than the flavor's slots": Mistake(
        "default: memory.k: got 8; allowed: at most memory.n_keys, 4", more=("--memory.n_keys=4",)
    ),
    "odd query": with_options(
        "memory.k_dim: got 33; allowed: an even number: a key has two halves", "--memory.k_dim=33"
    ),
    # torchtitan's settings that have no effect here.
    "tensor parallelism": with_options(
        "parallelism.tensor_parallel_degree: got 2; allowed: 1; "
        "split the model and its table over more ranks instead, as FSDP does by default",
        "--parallelism.tensor_parallel_degree=2",
        ranks=2,
    ),
    "torchtitan's data set": in_file(
        "<file>: training.dataset: got 'c4'; "
        "allowed: 'c4_test'; name the text or the token shards in data.sources",
        '[training]\ndataset = "c4"\n',
    ),
    "file named in the file": in_file(
        "<file>: job.config_file: got 'base.toml'; "
        "allowed: None; name the file on the command line, --job.config FILE",
        '[job]\nconfig_file = "base.toml"\n',
    ),
}


def start(argv: list[str], ranks: int) -> None:
    """Everything of a run's start that checks settings and needs no process group."""
    config = load_config(argv)
    try:
        check(config, ranks)
        model_args(config, load_tokenizer(**dataclasses.asdict(config.tokenizer)))
    except ConfigError as error:
        explain(error, config)
        raise


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_its_message(mistake: Mistake, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(mistake.toml)

    def place(text: str) -> str:
        return text.replace("<file>", str(file)).replace("<folder>", str(tmp_path))

    argv = [place(word) for word in mistake.argv.split()]
    with pytest.raises(ConfigError) as error:
        start([*argv, *mistake.more], mistake.ranks)
    assert str(error.value) == place(mistake.message)


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
    assert config.where == {
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
        if type(None) in get_args(annotation) and unsupported(key) is None:
            assert get(JobConfig(), key) is None, key


def test_an_error_of_the_model_is_completed_with_its_source(tmp_path: Path) -> None:
    file = write(tmp_path)
    config = load_config(["--job.config", file])
    error = ConfigError("memory.layers", [1, 2], "blocks 0 to 1 of flavor debug")
    expected = "memory.layers: got [1, 2]; allowed: blocks 0 to 1 of flavor debug"
    assert explain(error, config) == f"{file}: {expected}"
    assert (
        explain(ConfigError("memory.k", 9, "8"), config) == "default: memory.k: got 9; allowed: 8"
    )


def test_every_setting_of_ours_is_documented() -> None:
    for section in dataclasses.fields(JobConfig):
        kind = type(getattr(JobConfig(), section.name))
        if kind.__module__.startswith("titan_smf"):
            documented = _field_docstrings(kind)
            assert set(inspect.get_annotations(kind)) <= set(documented), kind
    assert _field_docstrings(Source).keys() == {"path", "weight"}


def test_help_names_every_section_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    settable = [key for key in settings_of(JobConfig) if unsupported(key) is None]
    assert set(SECTIONS) == {key.partition(".")[0] for key in settable}
    assert print_help(["--job.config", "x.toml", "--help"])
    usage = capsys.readouterr().out
    assert all(f"\n  {section} " in usage for section in SECTIONS)
    for section in SECTIONS:
        assert print_help(["--help", section])
    printed = capsys.readouterr().out
    for key in settable:
        assert f"--{key}  {describe(settings_of(JobConfig)[key])}; default " in printed
    assert not print_help(["--job.config", "x.toml"])
    with pytest.raises(SystemExit) as error:
        print_help(["--help", "memry"])
    assert error.value.code == 2
    assert "allowed: memory" in capsys.readouterr().err


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, titan_smf.help; titan_smf.help.print_help(['--help']);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--job.config FILE" in done.stdout
