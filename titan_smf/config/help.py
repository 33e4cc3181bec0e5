"""What `--help` prints. `--help` alone imports no torch and is immediate."""

import ast
import difflib
import inspect
import json
import sys
import textwrap
from collections.abc import Sequence

SECTIONS = {
    "job": "folder and description of the run",
    "model": "flavor (a named set of sizes), single sizes, attention",
    "memory": "which blocks are memory layers, their slots and keys, learning rate of the values",
    "tokenizer": "encoding by name or rank file",
    "data": "sources and their weights, validation text",
    "finetune": "what learns: all weights, sparsely chosen memory slots, or adapters",
    "selection": "how the slots of a sparse step are chosen",
    "lora": "rank, scale and place of the adapters",
    "stream": "facts or documents to learn one a step",
    "replay": "background text in each batch beside what is learned",
    "idf": "counting how background data uses the slots",
    "analysis": "which slots hold a fact, and what each ranking finds of them",
    "evaluation": "question sets and text that a model is asked about, and when",
    "training": "steps, batch sizes, sequence length, types, gradient clipping",
    "optimizer": "optimizer, learning rate, weight decay of everything but the values",
    "lr_scheduler": "warmup, stable and decay phases",
    "validation": "validation loss during training",
    "checkpoint": "saving, resuming, starting from another run's weights",
    "metrics": "progress lines, TensorBoard",
    "parallelism": "shards (FSDP) and replicas (HSDP)",
    "activation_checkpoint": "recomputing activations to save memory",
    "compile": "torch.compile",
    "profiling": "traces and memory snapshots",
    "comm": "timeouts and traces of communication",
    "debug": "seed, deterministic algorithms",
}

_USAGE = """\
usage: python -m titan_smf.train --job.config FILE [--section.key value ...]
       python -m titan_smf.train --help [SECTION]

Train a Llama with memory layers as a TOML file says.

  one process       python -m titan_smf.train --job.config train_configs/debug_pretrain.toml
  two processes     torchrun --nproc_per_node 2 -m titan_smf.train \\
                        --job.config train_configs/debug_pretrain.toml
  SLURM             sbatch slurm/pretrain_1b.sh

Settings come from the command line, then the file, then the defaults:

  --training.steps 20  --training.steps=20     a value
  --compile.enable                             true; or --compile.enable false
  --memory.layers 4,12,20                      a list, also [4, 12, 20]; [] is empty
  --data.sources '[{path = "a.txt", weight = 2}, {path = "shards/"}]'
                                               a list of tables, in TOML or JSON
  --lr_scheduler.decay_ratio none              none, where a setting allows it

A run writes config.toml, all its settings, to job.dump_folder; it can be given to --job.config.
Exit codes: 0 done, 2 a mistake in what was given, 75 stopped on request with a checkpoint.

Sections (--help SECTION lists the settings of one):
"""


def usage() -> str:
    """Return the help of training, which lists the sections."""
    width = max(map(len, SECTIONS)) + 2
    return _USAGE + "\n".join(f"  {name:<{width}}{what}" for name, what in SECTIONS.items())


def print_help(argv: Sequence[str], usage: str | None) -> bool:
    """Print what `argv` asks for by `--help [SECTION]`: a section's settings, or else the usage.

    Returns:
        whether it asks for any.

    Raises:
        SystemExit: with code 2, for a section that does not exist.
    """
    asked = [place for place, word in enumerate(argv) if word in ("--help", "-h")]
    if not asked:
        return False
    section = "".join(argv[asked[0] + 1 : asked[0] + 2])
    if not section or section.startswith("-"):
        print(usage)
    elif section in SECTIONS:
        print(_describe_section(section))
    else:
        near = difflib.get_close_matches(section, SECTIONS, n=1) or SECTIONS
        print(f"error: --help: got {section!r}; allowed: {', '.join(near)}", file=sys.stderr)
        raise SystemExit(2)
    return True


def _describe_section(section: str) -> str:
    """Each setting of a section: key, what it allows, default, docstring."""
    from titan_smf.config.job import JobConfig
    from titan_smf.config.parsing import describe, get, settings_of
    from titan_smf.config.unsupported import unsupported

    default = JobConfig()
    lines = [f"[{section}]  {SECTIONS[section]}"]
    documents = _field_docstrings(type(get(default, section)))
    for name, annotation in settings_of(JobConfig).items():
        if not name.startswith(section + ".") or unsupported(name):
            continue
        value = get(default, name)
        shown = "none" if value is None else json.dumps(value)
        lines += ["", f"  --{name}  {describe(annotation)}; default {shown}"]
        document = documents.get(name.removeprefix(section + "."), "")
        lines.append(textwrap.indent(document, " " * 6))
    return "\n".join(lines)


def _field_docstrings(section: type) -> dict[str, str]:
    """The string that stands under each field of a dataclass, its base classes' included."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for line, after in zip(body.body, body.body[1:], strict=False):
            match line, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = inspect.cleandoc(text)
    return found
