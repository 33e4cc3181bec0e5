"""Sets are read, named and put into words as a user would expect; mistakes say what to do."""

import json
from pathlib import Path
from typing import Any

import pytest

from titan_smf.config.job import load_config, save_resolved
from titan_smf.config.sections import Evaluation, EvaluationSet
from titan_smf.data.tokenizer import load_tokenizer
from titan_smf.errors import ConfigError, DataError
from titan_smf.evaluation.results import ResultsFile
from titan_smf.evaluation.sets import open_sets
from titan_smf.evaluation.tasks import AnswerTask, ChoiceTask, QuestionTask, Task, TokenTask
from titan_smf.evaluation.templates import load_template
from titan_smf.storage import read_lines

NQ = {"question": "who wrote it", "answer": ["Bobby Scott", "Bob Russell"]}
GSM8K = {"question": "2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}
HELLASWAG = {
    "activity_label": "Baking",
    "ctx": "A man [header] stirs.  He",
    "endings": ["eats it. [step] Done", "flies off."],
    "label": "0",
}
TOKENIZER = load_tokenizer("bytes")


def written(folder: Path, name: str, *rows: dict[str, Any]) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(*sets: EvaluationSet | str, max_seq_len: int = 2000, **settings: Any) -> list[Task]:
    evaluation = Evaluation(sets=list(sets), **settings)
    return open_sets(evaluation, TOKENIZER, max_seq_len, 64)


def test_kinds_names_and_templates_follow_from_the_files(tmp_path: Path) -> None:
    text = tmp_path / "notes.v2.txt"
    text.write_text("word " * 100)
    fact = {"id": "a", "statements": ["x"], "question": "who?", "answers": ["me"]}
    plain = {key: value for key, value in HELLASWAG.items() if key != "activity_label"}
    sets = opened(
        written(tmp_path, "nq_open/dev.jsonl", NQ),
        written(tmp_path, "gsm8k/test.jsonl", GSM8K),
        written(tmp_path, "hellaswag.jsonl", HELLASWAG),
        written(tmp_path, "plain.jsonl", plain),
        written(tmp_path, "my facts.jsonl", fact),
        f"prose={text}",
        "synthetic:world?facts=300&new_facts=50&set=known_facts",
        "background=synthetic:world?facts=300&new_facts=50&split=validation",
    )
    assert [(each.name, each.given.kind, each.given.template) for each in sets] == [
        ("nq_open_dev", "questions", "question"),
        ("gsm8k_test", "likelihood", "gsm8k"),
        ("hellaswag", "choices", "hellaswag"),
        ("plain", "choices", "choice"),
        ("my_facts", "questions", "question"),
        ("prose", "tokens", ""),
        ("known_facts", "questions", "world"),
        ("background", "tokens", ""),
    ]
    kinds = [QuestionTask, AnswerTask, ChoiceTask, ChoiceTask]
    kinds += [QuestionTask, TokenTask, QuestionTask, TokenTask]
    assert [type(each) for each in sets] == kinds
    settings = {"path": sets[0].given.path, "max_new_tokens": 32}
    assert sets[0].settings == settings | {"template": "question", "shots": 5}
    assert sets[5].count == (100 * 5 + 2 - 1) // 64  # with the begin and end tokens


def test_items_become_the_text_of_their_template(tmp_path: Path) -> None:
    nq = EvaluationSet(written(tmp_path, "nq.jsonl", NQ), shots=1)
    questions, answers, choices, world = opened(
        nq,
        written(tmp_path, "gsm.jsonl", GSM8K),
        written(tmp_path, "hellaswag.jsonl", HELLASWAG),
        EvaluationSet(written(tmp_path, "facts.jsonl", NQ), template="world"),
    )
    assert isinstance(questions, QuestionTask)
    assert [TOKENIZER.decode(prompt[1:]) for prompt in questions.prompts] == [
        "Question: what is the capital city of australia\nAnswer: Canberra\n\n"
        "Question: who wrote it\nAnswer:"
    ]
    assert isinstance(answers, AnswerTask)
    text = answers.texts[0]
    assert TOKENIZER.decode(text.tokens[text.start :]) == " " + GSM8K["answer"]
    assert TOKENIZER.decode(text.tokens[1 : text.start]) == "Question: 2 and 3?\nAnswer:"
    assert isinstance(choices, ChoiceTask)
    assert [TOKENIZER.decode(text.tokens[1:]) for text in choices.texts] == [
        "Baking: A man stirs. He eats it. Done",
        "Baking: A man stirs. He flies off.",
    ]
    assert isinstance(world, QuestionTask)
    assert TOKENIZER.decode(world.prompts[0][1:]) == "Q: who wrote it\nA:"
    assert world.stop == ["\n"]


def test_no_template_cuts_answers_at_a_full_stop_or_comma() -> None:
    for name in ("world", "question", "gsm8k", "hellaswag", "choice"):
        assert not {".", ","} & set(load_template(name).stop)


def test_a_user_can_bring_templates_and_set_shots_and_limits(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(
        '[short]\nprompt = "{question}?"\nanswer = " {answer}"\nseparator = " | "\n'
        'examples = [{ question = "a", answer = "b" }, { question = "c", answer = "d" }]\n'
    )
    path = written(tmp_path, "q.jsonl", NQ, NQ | {"question": "when"}, NQ | {"question": "why"})
    (each,) = opened(EvaluationSet(path, template=f"{tmp_path}/my.toml#short", limit=2))
    assert isinstance(each, QuestionTask)
    assert [TOKENIZER.decode(prompt[1:]) for prompt in each.prompts] == [
        "a? b | c? d | who wrote it?",
        "a? b | c? d | when?",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("missing.jsonl", "missing.jsonl: does not exist"),
        ("synthetic:world?sets=x", "evaluation.sets: got 'synthetic:world?sets=x'; allowed: synth"),
        (EvaluationSet("q.jsonl", template="quiz"), "got 'quiz'; allowed: world, question"),
        (EvaluationSet("q.jsonl", template="no.toml#a"), "a TOML file of templates (no.toml"),
        (EvaluationSet("q.jsonl", shots=9), "at most 5, the examples of template question (q)"),
        (EvaluationSet("q.jsonl", shots=-2), "0 or more, or -1 for all (q)"),
        (EvaluationSet("q.jsonl", limit=-1), "1 or more, or 0 for all (q)"),
        (EvaluationSet("q.jsonl", name="a/b"), "a name of letters, digits, _, - and ."),
        (EvaluationSet("q.jsonl", kind="choices"), "q.jsonl:1: has no 'ctx', but question, answer"),
        (EvaluationSet("c.jsonl"), "c.jsonl:2: label is '7', not an index of its 2 endings"),
        (EvaluationSet("marks.jsonl"), "marks.jsonl:1: answer 2 is nothing but marks"),
        (EvaluationSet("c.jsonl", kind="likelihood"), "c.jsonl:1: question is null, not a text"),
        (EvaluationSet("other.jsonl"), "fields colour, which are those of no known set"),
        ("empty.jsonl", "empty.jsonl: holds no item"),
        ('[{path = "q.jsonl", kind = "quiz"}]', "allowed: a table {path = a string, name ="),
        (EvaluationSet("q.jsonl", name="same"), "one set of the name same; name the others"),
    ],
)
def test_a_mistake_says_what_is_allowed(
    given: EvaluationSet | str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "q.jsonl", NQ)
    written(tmp_path, "c.jsonl", HELLASWAG, HELLASWAG | {"label": "7"})
    written(tmp_path, "marks.jsonl", HELLASWAG | {"endings": ["eats it.", "[step] "]})
    written(tmp_path, "other.jsonl", {"colour": "red"})
    written(tmp_path, "empty.jsonl")
    with pytest.raises((ConfigError, DataError)) as error:
        opened(given, "same=q.jsonl")
    assert message in str(error.value)


def test_a_prompt_that_is_too_long_names_the_length_that_would_do(tmp_path: Path) -> None:
    path = written(tmp_path, "q.jsonl", NQ)
    length = 1 + len("Q: who wrote it\nA:") + 32
    with pytest.raises(ConfigError, match=f"evaluation.seq_len: got 40; allowed: {length} or more"):
        opened(path, max_seq_len=40, template="world")
    assert opened(path, max_seq_len=length, template="world")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt = "Q: {question} "\nanswer = ""', "the space belongs to the answer"),
        ('prompt = "Q"\nanswer = ""\nstop = [""]', "texts that are not empty"),
        ('prompt = "Q"\nanswer = ""\nreplace = [["(", ""]]', "[regular expression, replacement]"),
        ('prompt = "Q"\nanswer = ""\nstops = []', "a table {prompt = a string"),
        ('prompt = "{question}"\nanswer = ""\nexamples = [{q = "a"}]', "has no 'question'"),
    ],
)
def test_a_template_that_cannot_work_says_why(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(f"[mine]\n{text}\n")
    with pytest.raises(ConfigError) as error:
        load_template(f"{tmp_path}/t.toml#mine")
    assert message in str(error.value)
    assert "t.toml: mine" in str(error.value)


def test_sets_come_from_the_command_line_and_survive_saving(tmp_path: Path) -> None:
    short = load_config(["--evaluation.sets", "a.jsonl,b=c.jsonl"])
    assert short.evaluation.sets == ["a.jsonl", "b=c.jsonl"]
    mixed = load_config(["--evaluation.sets", '["a.jsonl", {path = "b", role = "target"}]'])
    assert mixed.evaluation.sets == ["a.jsonl", EvaluationSet("b", role="target")]
    save_resolved(mixed, tmp_path / "config.toml")
    saved = load_config(["--job.config", str(tmp_path / "config.toml")])
    assert saved.evaluation == mixed.evaluation


def test_a_run_that_goes_on_keeps_the_results_up_to_its_step(tmp_path: Path) -> None:
    def add(step: int, mean: float, checkpoint: str | None = None) -> None:
        result = {"set": "new", "step": step, "checkpoint": checkpoint}
        file.add(result | {"metrics": {"f1": {"mean": mean}}}, [{"f1": mean}])

    def kept() -> list[tuple[int, float, str | None]]:
        lines = read_lines(file.path)
        return [(line["step"], line["metrics"]["f1"]["mean"], line["checkpoint"]) for line in lines]

    file = ResultsFile(tmp_path)
    file.start(0)
    for step in (0, 10, 20):
        add(step, step / 100)
    add(10, 0.5)
    add(30, 0.6, "checkpoints/step-30")
    of_the_run = [(0, 0.0, None), (20, 0.2, None), (10, 0.5, None)]
    assert kept() == [*of_the_run, (30, 0.6, "checkpoints/step-30")]
    assert json.loads((tmp_path / "predictions/new.jsonl").read_text()) == {"f1": 0.6}
    assert file.sets_at(10) == {"new"}
    assert file.sets_at(30) == set(), "a result of the tool is none of the run"
    file.start(10)
    assert [step for step, _, _ in kept()] == [0, 10]
    file.start(0)  # it ended before it saved a checkpoint
    assert not file.path.exists()
    assert len((tmp_path / "results.previous.jsonl").read_text().splitlines()) == 2
