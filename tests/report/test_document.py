"""Pages and pictures: one HTML file without markup from names, and the tool that writes it."""

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.support.report_runs import SETS, SPARSE, report, scores, table, write_run
from titan_smf.report.document import Fragment, Section, write_document
from titan_smf.report.methods import Method
from titan_smf.report.pictures import legend, png, styles

TOOL = Path(__file__).parents[2] / "tools/report.py"


class Page(HTMLParser):
    """Elements, their attributes, and what a reader sees."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.seen: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.seen.append(data)


def test_html_is_one_file_and_names_are_no_markup(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = '<script>alert("1")</script> $\\frac{$ | `x` ![a](http://b.c/d.png) *x* &amp;'
    hostile = shown.replace("&amp;", "\u202e\u2028&amp;")
    monkeypatch.setitem(SETS, "../../<b>set</b>", ("held_out", "questions", "f1"))
    write_run(root / "a", hostile, 100.0, 0, scores(0.7, 0.76) | {"../../<b>set</b>": (0.5, 0.4)})
    text = report(root)
    output = tmp_path / "report"
    content = (output / "report.html").read_text()
    page = Page(content)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "b", "link", "iframe", "a", "object"}
    assert shown in page.seen
    sources = [attrs["src"] for tag, attrs in page.elements if tag == "img"]
    pictures = sorted(path.read_bytes() for path in output.glob("*.png"))
    assert len(pictures) == 4
    prefix = "data:image/png;base64,"
    assert all(source and source.startswith(prefix) for source in sources)
    embedded = [base64.b64decode(str(source).removeprefix(prefix)) for source in sources]
    assert sorted(embedded) == pictures
    assert all(not name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert "default-src 'none'" in content
    assert re.search(r"<td>0\.700<br><small>\[0\.600, 0\.800\]</small></td>", content)
    assert not re.search(r"url\(|@import|src=\"http", content)
    assert {path.name for path in tmp_path.iterdir()} == {"root", "report"}, "nothing elsewhere"

    cells = len(table(text, "Learning and forgetting").popitem()[1])
    assert cells == 6 + 2 * 3, "a pipe in a name makes no cell"
    without_pictures = re.sub(r"\]\([a-z0-9-]+\.png\)", "", text)
    assert not re.search(r"<|(?<!\\)`|(?<!\\)\]\(", without_pictures)


def test_a_section_can_bring_html_of_its_own(tmp_path: Path) -> None:
    fragment = Fragment('<p style="color: red">core</p>', "core (in the HTML it is red)")
    write_document(tmp_path, "title", [Section("Accesses", [fragment])])
    assert fragment.html in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.md").read_text() == f"# title\n\n## Accesses\n\n{fragment.text}\n"


def test_a_legend_of_many_methods_stays_on_the_figure() -> None:
    plain, wide = "sparse memory, TF-IDF, t=500, AdamW, with replay ", "WMW" * 9 + " "
    looks = styles([Method(str(number), ()) for number in range(28)])
    assert len(set(map(repr, looks.values()))) == 28
    for name in (plain, wide):
        figure = Figure(figsize=(10, 5), layout="constrained")
        axes = figure.subplots()
        legend(figure, [(look, name + number) for number, look in looks.items()], "method")
        png(figure)
        drawn, box = figure.legends[0].get_window_extent(), axes.get_window_extent()
        assert 0 <= drawn.x0 < drawn.x1 <= figure.bbox.x1
        assert 0 <= drawn.y0 < drawn.y1 < box.y0, "below the panel"
        assert box.height > 0.7 * 5 * figure.dpi, "which keeps its size"


def test_tool_exits_with_2_and_a_message_or_names_what_it_wrote(root: Path, tmp_path: Path) -> None:
    write_run(root / "a", SPARSE, 1.0, 0, scores(0.7, 0.7))
    (tmp_path / "empty").mkdir()
    output = str(tmp_path / "out")
    run_file = str(root / "a/config.toml")

    def tool(folder: str, output: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), str(tmp_path / folder), "--output", output]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for folder, where, message in (
        ("empty", output, f"{tmp_path}/empty: holds no run"),
        ("root", run_file, f"{run_file}: cannot be written: "),
    ):
        failed = tool(folder, where)
        assert (failed.returncode, failed.stdout) == (2, "")
        assert failed.stderr.startswith(f"error: {message}")
        assert len(failed.stderr.splitlines()) == 1
    done = tool("root", output)
    assert (done.returncode, done.stderr) == (0, "")
    pictures = ["known-facts-against-learning", "background-against-learning", "learning-curves"]
    written = ["report.md", "report.html", *(f"{name}.png" for name in pictures)]
    assert done.stdout.split() == [f"{output}/{name}" for name in written]


def test_starts_without_torch() -> None:
    code = "import sys, titan_smf.report.write; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
