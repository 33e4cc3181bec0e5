"""The analysis of accesses equals plain set arithmetic, the sparse step's choice, and itself on any
number of ranks."""

import dataclasses
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.launch import run_on_ranks
from tests.support.report_runs import SPARSE, notes, report, scores, table, write_lines, write_run
from tests.support.training_runs import EXACT, ROOT, SPARSE_FT, arguments, count, train
from titan_smf.analysis import access_report
from titan_smf.analysis.coloured_texts import coloured_texts
from titan_smf.analysis.entity_spans import entity_tokens, names_in, pieces
from titan_smf.analysis.measures import NOWHERE, auc, core_set, places
from titan_smf.config.sections import Stream
from titan_smf.data.tokenizer import Tokenizer, load_tokenizer
from titan_smf.errors import ConfigError
from titan_smf.storage import read_lines
from titan_smf.streams.records import Fact, open_stream

WORLD = "synthetic:world?facts=300&new_facts=5"
SIZES, TOP_T, BATCH = [10, 60, 400], 60, 8
SETTINGS: dict[str, Any] = {
    "analysis.sizes": SIZES,
    "selection.top_t": TOP_T,
    "selection.ranking": "tfidf",
    "metrics.enable_tensorboard": "false",
    "training.global_batch_size": BATCH,
    "debug.seed": 3,
}
TWO_TABLES = {"memory.layers": "[1, 2]", "memory.share_values": "false"}
MODELS: dict[str, dict[str, Any]] = {"one layer": {}, "two tables": TWO_TABLES}
TEXTS = {"one layer": 6, "two tables": BATCH}  # the first one replays two rows of background
PROMPT = {"one layer": "Q: {}\nA:", "two tables": "Question: {}\nAnswer:"}
"""As templates.toml has them: that of the target set, and that of questions from a file."""
SPREAD = ("two tables", "documents")


def analyse(rank: int, ranks: int, folder: str, runs: dict[str, dict[str, Any]]) -> None:
    """Analyses one after another."""
    from titan_smf.analysis.access_analysis import analyse_accesses
    from titan_smf.analysis.analysis_config import analysis_config
    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.training.trainer import run

    for name, settings in runs.items():
        config = analysis_config(load_config(arguments(Path(folder) / name, SPARSE_FT | settings)))
        check(config, ranks)
        assert run(config, analyse_accesses) == 0


def prepare(rank: int, ranks: int, folder: str) -> None:
    """Weights and counts of each model, and all that is compared on one rank."""
    for name, model in MODELS.items():
        one_step = {"training.steps": 1, "metrics.enable_tensorboard": "false", "debug.seed": 3}
        train(rank, ranks, folder, {f"base {name}": model | EXACT | one_step})
        counted = {"idf.num_batches": 5, "checkpoint.initial_load_path": f"{folder}/base {name}"}
        count(rank, ranks, f"{folder}/idf {name}", model | EXACT | counted | {"debug.seed": 3})
    analyse(rank, ranks, f"{folder}/1", runs_of(folder))
    sparse = runs_of(folder)["one layer"] | {"training.steps": 5, "evaluation.sets": "[]"}
    train(rank, ranks, folder, {"learned": SPARSE_FT | sparse})
    for name in MODELS:
        expected = plain_analysis(folder, name)
        (Path(folder) / f"plain {name}.json").write_text(json.dumps(expected))


def runs_of(folder: str) -> dict[str, dict[str, Any]]:
    runs: dict[str, dict[str, Any]] = {}
    for name, model in MODELS.items():
        given = {
            "checkpoint.initial_load_path": f"{folder}/base {name}",
            "selection.idf_path": f"{folder}/idf {name}/idf.safetensors",
        }
        runs[name] = model | EXACT | SETTINGS | {"stream.path": f"{folder}/facts.jsonl"} | given
    documents = {"stream.path": WORLD, "stream.kind": "documents", "analysis.limit": 1}
    runs["documents"] = runs["one layer"] | documents | {"selection.ranking": "tf"}
    replay = {"replay.share": 0.25, "replay.sources": '[{path = "synthetic:world?facts=300"}]'}
    target = f'[{{path = "{WORLD}&set=new_facts", role = "target"}}]'
    runs["one layer"] |= replay | {"evaluation.sets": target}
    return runs


def write_facts(path: Path) -> None:
    """The world's new facts, with fewer statements than a batch has rows, and with more."""
    rows = [
        dataclasses.asdict(fact) | {"statements": fact.texts[:number]}
        for fact, number in zip(open_stream(WORLD, "facts"), (3, 12, 1, 8, 5), strict=True)
    ]
    write_lines(path, rows)


def plain_analysis(folder: str, name: str) -> dict[str, Any]:
    """Core sets and the measures of the tf ranking: one text at a time, with Python's sets; and
    the slots that the analysis takes a step of tfidf to select."""
    from titan_smf.analysis.access_analysis import AccessAnalysis
    from titan_smf.analysis.analysis_config import analysis_config
    from titan_smf.config.job import load_config
    from titan_smf.training.trainer import Trainer

    words = arguments(Path(folder) / "plain", SPARSE_FT | runs_of(folder)[name])
    config = analysis_config(load_config(words))
    trainer = Trainer(config)
    trainer.load_weights(config.checkpoint.initial_load_path or "")
    memory = trainer.model.model_args.memory

    def reads(text: str) -> list[list[tuple[int, float]]]:
        """For each token, the slots and their weights."""
        layers: list[Any] = []
        tokens = torch.tensor([trainer.tokenizer.encode(text, bos=True)[:128]])
        with torch.no_grad():
            trainer.model(tokens, observe=layers.append)
        return [
            [
                (number * (memory.num_tables > 1) * memory.num_slots + slot, weight)
                for number, layer in enumerate(layers)
                for slot, weight in zip(
                    layer.slots[place].tolist(), layer.weights[place].tolist(), strict=True
                )
            ]
            for place in range(tokens.shape[1])
        ]

    names = names_in(config.stream)
    results = []
    for record in open_stream(config.stream.path, "facts"):
        assert isinstance(record, Fact)
        question = PROMPT[name].format(record.question)
        whole = [reads(text) for text in (question, *record.texts[: TEXTS[name]])]
        counts: Counter[int] = Counter()
        for row in range(TEXTS[name]):
            read_in_row = whole[1 + row % len(record.texts)]
            counts.update(slot for token in read_in_row for slot, _ in token)
        asked, *texts = (text[1:] for text in whole)  # a begin token is only counted
        read = [{slot for token in text for slot, _ in token} for text in (asked, *texts)]
        core = set.intersection(*read)
        order = sorted(counts, key=lambda slot: (-counts[slot], slot))
        weights = [pair for token in asked for pair in token]
        total = sum(weight for _, weight in weights)
        tf: dict[str, list[Any]] = {"recall": [], "weight": [], "auc": []}
        for size in SIZES:
            chosen = set(order[:size])
            tf["recall"].append(len(core & chosen) / len(core) if core else None)
            tf["weight"].append(sum(weight for slot, weight in weights if slot in chosen) / total)
            scores: dict[bool, list[int]] = {True: [], False: []}
            for text, one in zip(record.texts, texts, strict=False):
                tokens = trainer.tokenizer.encode(text)[: len(one)]
                flags = entity_tokens(text, tokens, trainer.tokenizer, names(record))
                for token, is_entity in zip(one, flags, strict=True):
                    scores[is_entity].append(sum(slot in chosen for slot, _ in token))
            won = [(a > b) + (a == b) / 2 for a in scores[True] for b in scores[False]]
            tf["auc"].append(sum(won) / len(won))
        of_core = sum(weight for slot, weight in weights if slot in core) / total
        sizes = {"core": len(core), "touched": len(counts), "core_weight": of_core}
        results.append(sizes | {"tf": tf})
    selected: list[list[int]] = []

    class Recording(AccessAnalysis):
        def order(self, *args: Any) -> torch.Tensor:
            order = super().order(*args)
            if args[1] == "tfidf":
                selected.append(order[:TOP_T].tolist())
            return order

    Recording(trainer).run("")
    trainer.close()
    return {"records": results, "selected": selected}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything on one rank, and the analyses on 2 and 4."""
    folder = tmp_path_factory.mktemp("analyses")
    write_facts(folder / "facts.jsonl")
    run_on_ranks(prepare, 1, str(folder))
    runs = {name: runs_of(str(folder))[name] for name in SPREAD}
    for ranks in (2, 4):
        run_on_ranks(analyse, ranks, str(folder / f"{ranks}"), runs)
    return folder


def analysis_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "access_analysis.json").read_text())


def assert_close(got: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key in expected:
            assert_close(got[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert_close(dict(enumerate(got)), dict(enumerate(expected)), where)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=0, abs=1e-12), where
    else:
        assert got == expected, where


@pytest.mark.parametrize("ranks", ["2", "4"])
def test_same_numbers_on_any_ranks(folder: Path, ranks: str) -> None:
    for name in SPREAD:
        assert_close(analysis_of(folder / ranks, name), analysis_of(folder / "1", name), name)
        assert len(list((folder / ranks / name).glob("access_*.png"))) == 3


@pytest.mark.parametrize("name", MODELS)
def test_measures_equal_plain_sets(folder: Path, name: str) -> None:
    records = analysis_of(folder / "1", name)["records"]
    plain = json.loads((folder / f"plain {name}.json").read_text())
    assert len(records) == 5
    for got, expected in zip(records, plain["records"], strict=True):
        found = {key: got[key] for key in ("core", "touched", "core_weight")}
        assert_close(found | {"tf": got["rankings"]["tf"]}, expected, name)
        assert 0 < expected["core"] < expected["touched"]


def test_the_selected_slots_are_those_of_the_sparse_step(folder: Path) -> None:
    """With one memory layer learning changes no address, so every step can be compared."""
    steps = read_lines(folder / "learned/selections.jsonl")
    plain = json.loads((folder / "plain one layer.json").read_text())
    assert [step["slots"] for step in steps] == plain["selected"]
    records = analysis_of(folder / "1", "one layer")["records"]
    assert [step["accessed"] for step in steps] == [record["touched"] for record in records]


def test_core_places_and_auc_equal_plain_loops() -> None:
    draws = random.Random(0)
    for _ in range(200):
        texts = [
            [draws.randrange(12) for _ in range(draws.randint(1, 30))]
            for _ in range(draws.randint(1, 4))
        ]
        core = core_set([torch.tensor(text) for text in texts])
        assert core.tolist() == sorted(set.intersection(*map(set, texts)))
        order = draws.sample(range(12), draws.randint(0, 12))
        slots = torch.tensor(texts[0])
        expected = [order.index(slot) if slot in order else NOWHERE for slot in texts[0]]
        assert places(slots, torch.tensor(order, dtype=torch.int64)).tolist() == expected
        positive = [draws.random() < 0.4 for _ in texts[0]]
        inside = [slot for slot, flag in zip(texts[0], positive, strict=True) if flag]
        outside = [slot for slot, flag in zip(texts[0], positive, strict=True) if not flag]
        won = [(a > b) + (a == b) / 2 for a in inside for b in outside]
        got = auc(slots, torch.tensor(positive))
        assert got == (pytest.approx(sum(won) / len(won)) if won else None)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return load_tokenizer(name="bytes")


def marked(text: str, tokenizer: Tokenizer, names: list[str], cut: int | None = None) -> str:
    """The tokens that belong to a name, the bytes of the others as dots."""
    tokens = tokenizer.encode(text, bos=True, eos=True)[:cut]
    flags = entity_tokens(text, tokens, tokenizer, names)
    assert len(flags) == len(tokens)
    kept = [token if flag else ord(".") for token, flag in zip(tokens, flags, strict=True)]
    return tokenizer.decode(kept)


def test_names_are_found_as_whole_words_in_any_case(tokenizer: Tokenizer) -> None:
    text = "Böhm, said BÖHM to Böhmer (C++)."
    begin, end = ".", "."
    assert marked(text, tokenizer, ["böhm", "C++"]) == (
        begin + "Böhm" + "." * 7 + "BÖHM" + "." * 4 + "." * 7 + ".." + "C++" + ".." + end
    )
    assert marked(text, tokenizer, ["böhm"], cut=3) == ".B" + "\N{REPLACEMENT CHARACTER}"
    assert marked(text, tokenizer, []) == "." * (len(text.encode()) + 2)


def test_pieces_make_the_text_and_split_no_character(tokenizer: Tokenizer) -> None:
    text = "aß\N{GRINNING FACE}<b>"
    found = pieces(tokenizer.encode(text, bos=True, eos=True), tokenizer)
    assert "".join(found) == text
    assert found[:4] == ["", "a", "", "ß"]


def test_names_of_the_synthetic_world_and_of_files(tmp_path: Path) -> None:
    names = names_in(Stream(path=WORLD))
    for fact in open_stream(WORLD, "facts"):
        answer, subject = names(fact)
        assert all(answer.casefold() in text.casefold() for text in fact.texts)
        assert all(subject in text for text in fact.texts)
    (document,) = open_stream(WORLD, "documents")
    found = names_in(Stream(path=WORLD, kind="documents"))(document)
    assert {answer.casefold() in document.texts[0].casefold() for answer in found} == {True}
    assert len(found) >= 5
    file = tmp_path / "facts.jsonl"
    row = {"id": "birthplace-0001", "statements": ["a"], "question": "q", "answers": ["x", "y"]}
    file.write_text(json.dumps(row))
    stream = Stream(path=str(file))
    assert names_in(stream)(open_stream(stream.path, "facts")[0]) == ["x", "y"]


def test_html_is_escaped_ascii_without_scripts(folder: Path) -> None:
    analysis = analysis_of(folder / "1", "one layer")
    example = analysis["examples"][0]
    example["id"] = "<script>alert('ß')</script>"
    example["texts"][0][1][0] = '<img src="x">\N{RIGHT-TO-LEFT OVERRIDE}'
    html = coloured_texts(analysis)
    assert html.isascii()
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;img src=&quot;x&quot;&gt;&#65533;" in html
    assert html.count("<div") == html.count("</div>")


def test_a_stream_without_names_is_reported_without_auc(folder: Path, tmp_path: Path) -> None:
    from titan_smf.analysis.access_analysis import write_analysis

    analysis = analysis_of(folder / "1", "one layer")
    analysis["summary"]["core_auc"] = None
    for found in analysis["summary"]["rankings"].values():
        found["auc"] = [None] * len(SIZES)
    write_analysis(analysis, tmp_path)
    assert "nan" not in access_report.text_summary(analysis)
    assert access_report.table(analysis)[1][0][-1] == "-"


def test_the_report_has_a_section_for_each_analysis(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "runs/sparse", SPARSE, 0.1, 0, scores(0.7, 0.8))
    analysis = analysis_of(folder / "1", "one layer")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        content = json.dumps(analysis)
        file = tmp_path / name / "access_analysis.json"
        file.write_text(content if name == "a" else content[:-9])
    text = report(tmp_path / "runs", tmp_path / "a", tmp_path / "b", tmp_path)
    assert "tfidf" in report(tmp_path / "a"), "an analysis alone is reported, too"
    heading = f"Slots that hold facts of {folder}/facts.jsonl"
    assert text.count(f"## {heading}\n") == 1, "the same file is read once"
    rows = table(text, heading)
    mean, low, high = analysis["summary"]["rankings"]["tfidf"]["recall"][1]
    assert rows["tfidf"]["core set found"] == f"{mean:.1%} ({100 * low:.1f} to {100 * high:.1f})"
    assert coloured_texts(analysis) in (tmp_path / "report/report.html").read_text()
    torn = f"{tmp_path}/b/access_analysis.json: not used, it is torn"
    assert torn in notes(text).replace("\\", "")


@pytest.mark.parametrize(
    "key", ["stream.path", "checkpoint.initial_load_path", "selection.idf_path", "memory.layers"]
)
def test_what_is_missing_is_named(key: str, tmp_path: Path) -> None:
    from titan_smf.analysis.analysis_config import analysis_config
    from titan_smf.config.job import load_config

    given = {"stream.path": WORLD, "selection.idf_path": "i", "checkpoint.initial_load_path": "c"}
    given |= {key: "[]" if key == "memory.layers" else ""}
    with pytest.raises(ConfigError, match=f"^command line: {key}: got"):
        analysis_config(load_config(arguments(tmp_path, SPARSE_FT | given)))


def test_the_tool_ends_with_one_message_and_code_2(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "tools/analyse_accesses.py")]
    given = {"selection.idf_path": "nowhere", "checkpoint.initial_load_path": "nowhere"}
    words += arguments(tmp_path, SPARSE_FT | given)
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr == (
        "error: checkpoint.initial_load_path: nowhere: no complete checkpoint there; "
        "give a run's folder, its checkpoints folder, or one step-N folder\n"
    )
