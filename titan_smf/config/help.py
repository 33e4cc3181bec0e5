"""Print the help of settings. `--help` alone imports no torch and is immediate."""

import ast
import difflib
import inspect
import json
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path

_HELP = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
SECTIONS: dict[str, str] = _HELP["sections"]


def usage() -> str:
    """Return the help of training, which lists the sections."""
    width = max(map(len, SECTIONS)) + 2
    return _HELP["usage"] + "\n".join(f"  {name:<{width}}{what}" for name, what in SECTIONS.items())


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
    """Return the help of a section: each setting's key, type, default and docstring."""
    from titan_smf.config.job import JobConfig
    from titan_smf.config.parsing import describe_type, get, settings_of
    from titan_smf.config.refused import refusal

    default = JobConfig()
    lines = [f"[{section}]  {SECTIONS[section]}"]
    documents = _field_docstrings(type(get(default, section)))
    for name, annotation in settings_of(JobConfig).items():
        if not name.startswith(section + ".") or refusal(name):
            continue
        value = get(default, name)
        shown = "none" if value is None else json.dumps(value)
        lines += ["", f"  --{name}  {describe_type(annotation)}; default {shown}"]
        document = documents.get(name.removeprefix(section + "."), "")
        lines.append(textwrap.indent(document, " " * 6))
    return "\n".join(lines)


def _field_docstrings(section: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, its base classes' included."""
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
