"""A report as blocks of text, tables and pictures, written as markdown and as one HTML page.

Whatever text comes in is shown as it is: names from configurations cannot become markup.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from titan_smf.errors import UserError


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
    """Cells are text; the first column names the row, numbers follow. `folded` starts closed."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG, written beside the markdown and into the HTML."""

    name: str
    """Its file becomes `name.png`, made of letters, digits and hyphens."""
    png: bytes
    caption: str


@dataclass(frozen=True)
class Fragment:
    """HTML that a section made and escaped itself, with styles inline; `text` in the markdown."""

    html: str
    text: str


Block = Text | Points | Table | Picture | Fragment


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    level: int = 2
    """Of the heading; the document's own is 1."""


def write_document(folder: Path, title: str, sections: Sequence[Section]) -> list[Path]:
    """Writes `report.md`, `report.html` and the pictures; returns their paths.

    The HTML holds its pictures and forbids the browser to fetch anything.

    Raises:
        UserError: the folder cannot be written.
    """
    files = _file_names(sections)
    contents = {
        "report.md": _markdown(title, sections, files).encode(),
        "report.html": _page(title, sections).encode(),
        **{name: picture.png for picture, name in files.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}; give another folder") from error
    return [folder / name for name in contents]


def plain(text: str) -> str:
    """Text on one line, without characters that cannot be seen or that turn its direction."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _file_names(sections: Sequence[Section]) -> dict[Picture, str]:
    names: dict[Picture, str] = {}
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Picture):
                stem = re.sub(r"[^a-z0-9]+", "-", block.name.lower()).strip("-")[:60] or "picture"
                taken = set(names.values())
                number = next(n for n in count(1) if _numbered(stem, n) not in taken)
                names[block] = _numbered(stem, number)
    return names


def _numbered(stem: str, number: int) -> str:
    return f"{stem}.png" if number == 1 else f"{stem}-{number}.png"


def _markdown(title: str, sections: Sequence[Section], files: dict[Picture, str]) -> str:
    parts = [f"# {_escaped(title)}"]
    for section in sections:
        parts.append(f"{'#' * section.level} {_escaped(section.title)}")
        parts += [_markdown_block(block, files) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Block, files: dict[Picture, str]) -> str:
    if isinstance(block, Text):
        return f"**{_escaped(block.text)}**" if block.strong else _escaped(block.text)
    if isinstance(block, Points):
        return "\n".join(f"- {_escaped(item)}" for item in block.items)
    if isinstance(block, Picture):
        caption = _escaped(block.caption)
        return f"![{caption}]({files[block]})\n\n*{caption}*"
    if isinstance(block, Fragment):
        return _escaped(block.text)
    rules = ["---", *["---:"] * (len(block.columns) - 1)]
    cells = [map(_escaped, block.columns), rules, *(map(_escaped, row) for row in block.rows)]
    rows = map(" | ".join, cells)
    table = "\n".join(f"| {row} |" for row in rows)
    return f"{_escaped(block.caption)}\n\n{table}"


def _escaped(text: str) -> str:
    """Text in which markdown finds no markup."""
    entities = html.escape(plain(text), quote=False)
    # Within a word _ is no markup, and brackets are none unless a link's end follows.
    marked = r"[\\`*|~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])"
    entities = re.sub(marked, r"\\\g<0>", entities)
    return re.sub(r"^(\d*)([-+=#.)])(?=\W|$)", r"\1\\\2", entities)  # a list, a rule, a heading


def _page(title: str, sections: Sequence[Section]) -> str:
    body = [f"<h1>{_text(title)}</h1>"]
    for section in sections:
        body.append(f"<h{section.level}>{_text(section.title)}</h{section.level}>")
        body += [_html_block(block) for block in section.blocks]
    return _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(body))


def _html_block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p{' class=warning' if block.strong else ''}>{_text(block.text)}</p>"
    if isinstance(block, Points):
        return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Picture):
        caption = _text(block.caption)
        content = base64.b64encode(block.png).decode()
        image = f'<img alt="{caption}" src="data:image/png;base64,{content}">'
        caption = f"<figcaption>{caption}</figcaption>"
        return f'<figure><div class="wide">{image}</div>{caption}</figure>'
    if isinstance(block, Fragment):
        return block.html
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in block.columns)
    rows = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in block.rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    table = f'<div class="wide">{table}</div>'
    caption = _text(block.caption)
    if block.folded:
        return f"<details><summary>{caption}</summary>{table}</details>"
    return f'<p class="caption">{caption}</p>{table}'


def _cell(text: str) -> str:
    """A cell of numbers; an interval at its end stands below, so that more columns can be seen."""
    return re.sub(r" (\[[^\]]*\])$", r"<br><small>\1</small>", _text(text))


def _text(text: str) -> str:
    return html.escape(plain(text), quote=True)


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --line: #d5d9de; --soft: #f3f5f7; --back: #fff; --ink: #1b1f24;
  --quiet: #57606a; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --line: #3b424b; --soft: #22272e; --back: #16191d;
  --ink: #e3e7eb; --quiet: #9aa4af; --warn: #41360f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
main { max-width: 80rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.35rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.15rem; margin-top: 2.2rem; }
p, li { max-width: 46rem; }
.warning { background: var(--warn); padding: .6rem .8rem; border-radius: 6px; font-weight: 600; }
.caption, summary { font-weight: 600; margin: 1.2rem 0 .4rem; }
summary { cursor: pointer; }
.wide { width: fit-content; max-width: 100%; overflow-x: auto;
  border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { border-top: 0; background: var(--soft); white-space: normal; min-width: 3rem;
  vertical-align: bottom; }
tr > th:first-child { position: sticky; left: 0; background: var(--soft); text-align: left;
  font-weight: 500; white-space: normal; width: min(15rem, 38vw); min-width: min(15rem, 38vw); }
small { color: var(--quiet); font-size: .8rem; }
figure { margin: 1.2rem 0; }
img { display: block; width: 100%; min-width: 44rem; max-width: 64rem; height: auto;
  background: #fff; }
figcaption { color: var(--quiet); font-size: .875rem; max-width: 46rem; margin-top: .4rem; }
"""
