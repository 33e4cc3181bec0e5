"""Questions answered by generation, scored by F1 and exact match with the best reference answer."""

from collections.abc import Sequence

from titan_smf.data.tokenizer import Tokenizer
from titan_smf.evaluation.generate import generate
from titan_smf.evaluation.metrics import best, estimate, exact_match, f1
from titan_smf.evaluation.rounds import EvaluatedModel
from titan_smf.evaluation.task import Outcome, Task, check_lengths, prompt_tokens
from titan_smf.evaluation.templates import Template
from titan_smf.streams.question_sets import Question


class QuestionTask(Task):
    """Questions with their prompts.

    Args:
        name: of the set, for messages.
        max_new_tokens: of an answer.
        max_seq_len: tokens that the model can read.

    Raises:
        ConfigError: a prompt is too long.
    """

    def __init__(
        self,
        name: str,
        questions: Sequence[Question],
        template: Template,
        shots: int,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        max_seq_len: int,
    ) -> None:
        self.questions = questions
        self.stop = template.stop
        self.max_new_tokens = max_new_tokens
        self.settings = {"max_new_tokens": max_new_tokens}
        self.prompts = [
            prompt_tokens(tokenizer, template.prompt_of({"question": q.question}, shots))
            for q in questions
        ]
        lengths = (len(prompt) + max_new_tokens for prompt in self.prompts)
        check_lengths(lengths, max_seq_len, f"a question of {name} with its answer")

    @property
    def count(self) -> int:
        return len(self.questions)

    def run(
        self, model: EvaluatedModel, batch_size: int, resamples: int, what: str
    ) -> Outcome | None:
        texts = generate(model, self.prompts, self.stop, self.max_new_tokens, batch_size, what)
        if texts is None:
            return None
        scores = {
            score.__name__: [
                best(score, text, question.answers)
                for text, question in zip(texts, self.questions, strict=True)
            ]
            for score in (f1, exact_match)
        }
        predictions = [
            {
                "id": question.id,
                "question": question.question,
                "prediction": text,
                "answers": question.answers,
                **{name: round(values[item], 4) for name, values in scores.items()},
            }
            for item, (text, question) in enumerate(zip(texts, self.questions, strict=True))
        ]
        metrics = {name: estimate(values, resamples=resamples) for name, values in scores.items()}
        return Outcome(metrics, predictions)
