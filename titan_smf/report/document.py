"""A report as blocks of text, tables and pictures, written as markdown and as one HTML page.

Text is shown as it is given: a name from a configuration cannot become markup.
"""

import base64
import html
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from titan_smf.errors import UserError

HERE = Path(__file__).parent
EXPLANATIONS = tomllib.loads((HERE / "explanations.toml").read_text(encoding="utf-8"))
"""Paragraphs that say how to read a section, and long captions, by name."""


@dataclass(frozen=True)
class Text:
    """A paragraph; a `strong` one is a warning."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells are text: a name in the first column, numbers in the others."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    """Whether the HTML page shows only the caption until it is clicked."""


@dataclass(frozen=True)
class Picture:
    """A PNG, written beside the markdown and into the HTML."""

    name: str
    """The file is named after it, in lower case with hyphens."""
    png: bytes
    caption: str


@dataclass(frozen=True)
class Fragment:
    """HTML, escaped already and with inline styles; the markdown has `text` in its place."""

    html: str
    text: str


Block = Text | Points | Table | Picture | Fragment


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: Sequence[Block]
    level: int = 2
    """Of the heading; the document's title has level 1."""


def write_document(folder: Path, title: str, sections: Sequence[Section]) -> list[Path]:
    """Write `report.md`, `report.html` and the pictures; return their paths.

    The HTML page contains its pictures and forbids the browser to load anything else.

    Raises:
        UserError: the folder cannot be written.
    """
    files = _file_names(sections)
    contents = {
        f"report.{suffix}": _environment(suffix)
        .get_template(f"report.{suffix}.jinja")
        .render(title=title, sections=sections, files=files)
        .encode()
        for suffix in ("md", "html")
    } | {name: picture.png for picture, name in files.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}; give another folder") from error
    return [folder / name for name in contents]


def plain(text: str) -> str:
    """Return text on one line, without invisible characters and those that change its direction."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _file_names(sections: Sequence[Section]) -> dict[Picture, str]:
    names: dict[Picture, str] = {}
    for picture in (b for section in sections for b in section.blocks if isinstance(b, Picture)):
        stem = re.sub(r"[^a-z0-9]+", "-", picture.name.lower()).strip("-")[:60] or "picture"
        candidates = (f"{stem}-{n}.png" if n > 1 else f"{stem}.png" for n in count(1))
        names[picture] = next(name for name in candidates if name not in names.values())
    return names


def _environment(suffix: str) -> Environment:
    """Jinja that escapes every value for the format, unless a template marks it as safe."""
    final = _escape_markdown if suffix == "md" else plain
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=suffix == "html",
        finalize=lambda value: value if isinstance(value, Markup) else final(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"base64": base64.b64encode, "cell": _two_lines}
    for block in get_args(Block):
        environment.tests[block.__name__] = lambda value, block=block: isinstance(value, block)
    return environment


def _two_lines(cell: str) -> Markup:
    """A cell as HTML: an interval at its end stands below, so that more columns can be seen."""
    return Markup(re.sub(r" (\[[^\]]*\])$", r"<br><small>\1</small>", html.escape(plain(cell))))


def _escape_markdown(text: str) -> str:
    """Return text in which markdown finds no markup."""
    entities = html.escape(plain(text), quote=False)
    # Within a word _ is no markup, and brackets are none unless a link's end follows.
    marked = r"[\\`*|~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])"
    entities = re.sub(marked, r"\\\g<0>", entities)
    return re.sub(r"^(\d*)([-+=#.)])(?=\W|$)", r"\1\\\2", entities)  # a list, a rule, a heading
