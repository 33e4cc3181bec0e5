"""Mistakes a user can make with settings, and the message that each one gets."""

from dataclasses import dataclass

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
        "debug, memory, tokenizer, data, finetune, selection, lora, stream, replay, idf, analysis, "
        "evaluation, none has this name",
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
    "adapters without LoRA": with_options(
        'lora.rank: got 8; allowed: 32, or finetune.method = "lora"', "--lora.rank=8"
    ),
    "adapters of rank 0": with_options(
        "lora.rank: got 0; allowed: 1 or more", "--lora.rank=0", "--finetune.method=lora"
    ),
    "adapters that add nothing": with_options(
        "lora.alpha: got 0.0; allowed: more than 0: adapters are multiplied by alpha / rank",
        "--lora.alpha=0",
        "--finetune.method=lora",
    ),
    "adapters by PEFT's names": with_options(
        'lora.targets: got \'q_proj,v_proj\'; allowed: "all" or "attention" or a list, each item '
        '"wq" or "wk" or "wv" or "wo" or "w1" or "w2" or "w3"',
        "--lora.targets=q_proj,v_proj",
        "--finetune.method=lora",
    ),
    "adapters on nothing": with_options(
        "lora.targets: got []; allowed: linear maps that the model has; the list is empty",
        "--lora.targets=[]",
        "--finetune.method=lora",
    ),
    "adapters on what is memory": with_options(
        "lora.targets: got ['w1', 'w3']; allowed: linear maps that the model has; "
        "all its feed-forwards are memory layers",
        "--lora.targets=w1,w3",
        "--finetune.method=lora",
        "--memory.layers=0,1,2,3",
    ),
    "SGD for adapters": with_options(
        "optimizer.name: got 'SGD'; allowed: Adam or AdamW",
        "--optimizer.name=SGD",
        "--finetune.method=lora",
    ),
    "nothing but replay": with_options(
        "replay.share: got 1.0; allowed: from 0, for none, to below 1", "--replay.share=1"
    ),
    "replay without a stream": with_options(
        "replay.share: got 0.5; "
        "allowed: 0 without stream.path: what data.sources mix, their weights say",
        "--replay.share=0.5",
    ),
    "replay of nothing": Mistake(
        "default: replay.sources: got []; allowed: at least one table {path = ..., weight = ...}, "
        "with a path and a weight above 0: replay.share is 0.5",
        more=("--replay.share=0.5", "--stream.path=facts.jsonl"),
    ),
    "replay of less than a sequence": with_options(
        "replay.share: got 0.05; "
        "allowed: 0, or a share that leaves whole sequences of both in a global batch of 8",
        "--replay.share=0.05",
        '--replay.sources=[{path = "corpus.txt"}]',
        "--stream.path=facts.jsonl",
        "--training.global_batch_size=8",
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
    "patches of no weights": with_options(
        "checkpoint.initial_patches: got ['patch.safetensors']; allowed: [], or "
        "checkpoint.initial_load_path beside it: the weights that the patches change",
        "--checkpoint.initial_patches=patch.safetensors",
    ),
    "memory snapshots of a CPU": with_options(
        "profiling.enable_memory_snapshot: got True; "
        "allowed: false on a CPU: the snapshots are of a GPU's memory",
        "--profiling.enable_memory_snapshot",
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
    "no items at once": with_options(
        "evaluation.batch_size: got 0; allowed: 1 or more", "--evaluation.batch_size=0"
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
    "slots for half-keys": with_options(
        "memory.n_keys: got 50000; allowed: half-keys of which all tables' slots, its square each, "
        "are below 2**31",
        "--memory.n_keys=50000",
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
