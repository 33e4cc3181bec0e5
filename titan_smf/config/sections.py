"""The sections of a run's configuration: torchtitan's, extended, and our own.

A docstring under a field says what it is, its unit, why the default, and where a published value
comes from. `titan_smf.config.job` reads, checks and saves them.
"""

# No `from __future__ import annotations` here: the field types must be types, not text.
from dataclasses import dataclass, field
from typing import Literal

from titan_smf.torchtitan_api import titan_sections as titan

LinearMap = Literal["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
"""Queries, keys, values, output of an attention; gate, down, up of a feed-forward."""


@dataclass
class Model(titan.Model):
    name: str = "memory_llama"
    """The architecture: torchtitan's Llama whose chosen feed-forward blocks are memory layers."""

    flavor: str = "debug"
    """A named set of sizes; the settings below and `[memory]` override single ones of them."""

    dim: int | None = None
    """Model dimension; none = the flavor's, as for every size in this section."""

    n_layers: int | None = None
    """Number of Transformer blocks."""

    n_heads: int | None = None
    """Number of attention heads; divides `dim`."""

    n_kv_heads: int | None = None
    """Number of key/value heads (grouped-query attention); divides `n_heads`."""

    ffn_dim: int | None = None
    """Hidden dimension of the feed-forward blocks."""

    rope_theta: float | None = None
    """Base of the rotary position embedding."""

    attn_type: Literal["sdpa", "flex"] | None = None
    """Attention: "flex" keeps it within documents; "sdpa" runs over the whole packed sequence."""


@dataclass
class Training(titan.Training):
    dtype: Literal["bfloat16", "float32", "float64"] = "float32"  # type: ignore[assignment]
    """Type of parameters, gradients and optimizer state; "float64" is for exactness checks."""

    mixed_precision_param: Literal["bfloat16", "float32", "float64"] = "bfloat16"  # type: ignore[assignment]
    """Type in which blocks compute; the value table keeps `memory.value_dtype`."""

    mixed_precision_reduce: Literal["float32", "float64"] = "float32"  # type: ignore[assignment]
    """Type in which gradients are summed over ranks."""


@dataclass
class Metrics(titan.Metrics):
    enable_tensorboard: bool = True
    """Also write the metrics of `metrics.jsonl` for TensorBoard."""


@dataclass
class Checkpoint(titan.Checkpoint):
    folder: str = "checkpoints"
    """Folder of the checkpoints, inside `job.dump_folder`."""

    initial_load_path: str | None = None
    """Another run's folder, or one of its checkpoints, whose weights start this run; ignored once
    this run has a checkpoint of its own."""

    initial_patches: list[str] = field(default_factory=list)
    """Patches, paths or fsspec URLs, that change the weights of `initial_load_path`, in this order,
    before the run starts from them."""

    last_save_model_only: bool = False
    """Save only the model at the end; such a run cannot be resumed, therefore off."""

    keep_latest_k: int = 3
    """Number of newest checkpoints to keep, 0 = all; older ones go once a newer one is complete."""


@dataclass
class Parallelism(titan.Parallelism):
    data_parallel_replicate_degree: int = 1
    """Copies of the model (HSDP). Each is split over the remaining ranks, 2 or more, best those of
    one node: the value table's lookups stay inside a copy."""

    data_parallel_shard_degree: int = -1
    """Ranks over which a copy of the model and its value table are split (FSDP); -1 = all ranks
    that the number of copies leaves."""


@dataclass
class Validation(titan.Validation):
    freq: int = 100
    """Steps between two validations; there is one after the last step, too."""

    steps: int = 10
    """Size of a validation in global training batches, of sequences spread evenly over the data;
    -1 = all validation data once. The same sequences for any number of ranks."""


@dataclass
class Memory:
    layers: list[int] | None = None
    """Blocks whose feed-forward is a memory layer, counted from 0; [] = a plain dense Llama;
    none = the flavor's, as for every size in this section. The paper's 1.3B model: [12] of 22."""

    n_keys: int | None = None
    """Half-keys per head and half; the table has `n_keys ** 2` slots. Published: 1024."""

    heads: int | None = None
    """Query heads, each with keys of its own; their results are summed. Published: 4."""

    k: int | None = None
    """Slots retrieved per token and head. Published: 32."""

    k_dim: int | None = None
    """Dimension of a query, both halves together, so even. Published: 512 (reference code); half
    the value dimension in Memory Layers at Scale (arXiv 2412.09764)."""

    v_dim: int | None = None
    """Dimension of a value, the row of a slot. Published: 1024, or the model dimension."""

    share_values: bool | None = None
    """One table read by all memory layers (Memory Layers at Scale) rather than one each."""

    qk_norm: bool | None = None
    """Normalise queries and keys; Memory Layers at Scale uses it "when needed"."""

    value_lr: float = 1e-3
    """Learning rate of the values, multiplied by the schedule as `optimizer.lr` is for the rest.
    Published: 0.001 beside 1e-4 for the rest of the model."""

    value_weight_decay: float = 0.0
    """Weight decay of the values. The paper is silent; 0 leaves rows that no token reads as they
    are."""

    value_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the value table; "bfloat16" halves its memory, "float64" is for exactness checks."""


@dataclass
class Tokenizer:
    name: str = ""
    """A named encoding: "bytes" (needs no file) or one of tiktoken's, such as "cl100k_base"."""

    path: str = ""
    """A tiktoken rank file, path or fsspec URL, instead of a name; Llama 3's `tokenizer.model` is
    one."""

    pattern: str = ""
    """How text is split before merging, and the special tokens, with a rank file: a name of
    `titan_smf/data/tokenizer.py` ("llama3", "gpt2") or a regular expression; "" = "default"."""


@dataclass
class Source:
    path: str
    """Token shards written by `tools/prepare_data.py`; or text, prepared on first use; or
    `synthetic:world?facts=N`, an invented world of N facts."""

    weight: float = 1.0
    """Share of the samples that come from this source, relative to the other sources' weights."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  a class attribute that pydantic reads


@dataclass
class Data:
    sources: list[Source] = field(default_factory=list)
    """What to train on; samples are drawn from the sources in proportion to their weights."""

    validation: str = ""
    """What the validation loss is measured on, given like the path of a source."""

    cache: str = ""
    """Folder for text prepared on first use; "" = `~/.cache/titan_smf`."""


@dataclass
class Finetune:
    method: Literal["full", "sparse_memory", "lora", "values"] = "full"
    """What learns, while everything else stays as it is: "full" = all weights, as in pretraining;
    "sparse_memory" = in each step the rows of the slots it selects (arXiv 2510.15103); "lora" =
    adapters beside linear maps (arXiv 2106.09685); "values" = whole value tables, a control."""


@dataclass
class Lora:
    rank: int = 32
    """Rank of the adapters. Published: 32, 128 and 256."""

    alpha: float = 64.0
    """Adapters are multiplied by `alpha / rank`. Published: 1/2, 1, 2 and 4 times the rank."""

    targets: Literal["all", "attention"] | list[LinearMap] = "all"
    """The linear maps that get adapters: "all" of attention and feed-forward, those of "attention"
    alone, or a list of names. Output head and memory layers get none."""


@dataclass
class Replay:
    share: float = 0.0
    """Share of each global batch that is background text beside what is learned from the stream,
    rounded to whole sequences; 0 = none, whatever the sources."""

    sources: list[Source] = field(default_factory=list)
    """The background, given like `data.sources`: best what the model was pretrained on."""

    def num_rows(self, global_batch_size: int) -> int:
        """How many sequences of a global batch are background text."""
        return round(self.share * global_batch_size)


@dataclass
class Selection:
    ranking: Literal["tfidf", "tf", "kl", "random", "all"] = "tfidf"
    """How accessed slots are ranked: by use here against use in the background ("tfidf", the
    paper's; "kl"), by use here alone ("tf"), by chance, or "all" of them. With bfloat16 the
    addresses round: of 100 slots of the trained debug model 3 are others than with float32, at most
    7 in a step. Activation checkpointing changes none, nor did compile in 20 such steps."""

    top_t: int = 500
    """Slots selected in a step. Published: 500 for facts, 10,000 for documents."""

    idf_path: str = ""
    """The background's counts, `idf.safetensors` of tools/compute_idf.py; "tfidf" and "kl" need
    them."""

    log: bool = False
    """Write each step's slots, counts and scores to `selections.jsonl` in the run's folder."""

    verify: bool = False
    """Select each step a second time from dense counts on every rank, and stop at a difference.
    Costs tensors of the table's number of slots."""


@dataclass
class Stream:
    path: str = ""
    """New knowledge, learned one fact or chunk after another: a jsonl file or fsspec URL, or
    `synthetic:world?...`; "" = train on `data.sources`."""

    kind: Literal["facts", "documents"] = "facts"
    """Lines of `id, statements, question, answers`, or of `id, chunk, rewrites`."""

    epochs: int = 1
    """Times the stream is learned; the run ends with it, or at `training.steps` before."""

    steps_per_record: int = 1
    """Steps in a row on each fact or chunk, each with its next texts. Published: 1, which is too
    few for small models."""


@dataclass
class Idf:
    path: str = ""
    """File of the counts, path or fsspec URL; "" = `idf.safetensors` in `job.dump_folder`."""

    num_batches: int = 1000
    """Background batches, each of which counts as one document. Published: 1000."""

    first_batch: int = 0
    """Number of the first batch. Jobs that each count a part of the background, one beginning where
    another ends, give files for `tools/compute_idf.py merge`."""

    batch_size: int = 64
    """Sequences of a background batch, over all ranks. The paper is silent; with larger ones more
    slots count as common."""

    seq_len: int = 512
    """Tokens of a sequence. The paper is silent."""

    checkpoint_interval: int = 100
    """Batches between two partial files, from which a count that was stopped goes on."""


EvaluationKind = Literal["auto", "questions", "choices", "likelihood", "tokens"]


@dataclass
class EvaluationSet:
    path: str
    """Questions, choices or answers: a jsonl, csv or parquet file, glob or fsspec URL,
    `hf:NAME?config=C&split=S`, or `synthetic:world?set=known_facts&...`. Text to read: token
    shards, a text file, or `synthetic:world?split=validation&...`."""

    name: str = ""
    """What metrics and files are called; "" = after the file."""

    kind: EvaluationKind = "auto"
    """What is measured: F1 and exact match of generated answers, accuracy of choices, negative log
    likelihood of answers, loss on text; "auto" = by the fields of the first row."""

    role: Literal["target", "held_out", "background", "other"] = "other"
    """What the set stands for in reports: to be learned, to be kept, or text as in pretraining."""

    template: str = ""
    """A name in `titan_smf/evaluation/templates.toml`, or `FILE.toml#NAME`; "" = by kind:
    "question" ("world" for the invented world), "hellaswag" or "choice", "gsm8k"."""

    shots: int = -1
    """Examples of the template before each item; -1 = all it has."""

    skip: int = 0
    """Items that are left out at the start of the set; not for text."""

    limit: int = 0
    """Items that are used, after those left out; of text, sequences spread evenly over it;
    0 = all, of text at most 1000."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  a class attribute that pydantic reads


@dataclass
class Evaluation:
    sets: list[EvaluationSet | str] = field(default_factory=list)
    """What to ask: tables, or `PATH` or `NAME=PATH` where all else is as by default."""

    interval: int = 0
    """Steps between two evaluations during training; 0 = none but those before the first and after
    the last step."""

    template: str = ""
    """Template of the sets of questions that name none; "" = by their kind."""

    max_new_tokens: int = 32
    """Longest answer that is generated, in tokens; the end of a line ends it before."""

    batch_size: int = 64
    """Items that a rank works on at once, at most. Has no effect on the results but rounding."""

    seq_len: int | None = None
    """Longest prompt with its answer, and length of the sequences of text; none =
    `training.seq_len`."""

    resamples: int = 1000
    """Draws of the bootstrap that gives the 95% confidence intervals."""


@dataclass
class Analysis:
    limit: int = 100
    """Facts or documents that tools/analyse_accesses.py analyses, from the start of the stream."""

    sizes: list[int] = field(default_factory=lambda: [25, 50, 100, 200, 500, 1000])
    """Numbers of selected slots to compare, beside `selection.top_t`; as the paper sweeps."""
