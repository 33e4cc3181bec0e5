"""Greedy answers to prompts from a model on all ranks, with a key-value cache."""

from collections.abc import Sequence

import torch

from titan_smf.evaluation.rounds import EvaluatedModel
from titan_smf.model.key_value_cache import KeyValueCache


def generate(
    model: EvaluatedModel,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    what: str = "prompts",
) -> list[str] | None:
    """The most likely continuation of each prompt, token by token; None if asked to stop.

    A text ends before the end token, before the first of the strings `stop`, or after
    `max_new_tokens`; space around it is dropped. It does not depend on the other prompts, nor on
    the number of ranks, but for rounding. Collective, inside `model.open()`.
    """

    def work(batch: list[int]) -> list[str]:
        return _Batch(model, [prompts[item] for item in batch], stop, max_new_tokens).texts()

    # The cache of a batch has the room of its longest text.
    lengths = [len(tokens) + max_new_tokens for tokens in prompts]
    return model.in_rounds(work, lengths, batch_size, what)


class _Batch:
    """The prompts of one rank in a round; may be none, for the collectives' sake."""

    def __init__(
        self,
        model: EvaluatedModel,
        prompts: Sequence[Sequence[int]],
        stop: Sequence[str],
        max_new_tokens: int,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.stop = stop
        self.max_new_tokens = max_new_tokens
        self.new: list[list[int]] = [[] for _ in prompts]
        self.found: list[str | None] = [None] * len(prompts)

    def texts(self) -> list[str]:
        """Run the batch to its end on every rank."""
        prompts = self.prompts or [[self.model.tokenizer.pad_id]]
        tokens = self.model.padded(prompts)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
        cache = KeyValueCache(lengths, tokens.shape[1] + self.max_new_tokens)
        rows = list(range(len(prompts)))  # of the batch that are still in the cache
        for position in range(self.max_new_tokens):
            logits = self.model.logits(tokens, cache)
            # Ids above the tokenizer's only round the vocabulary up.
            best = logits[:, : self.model.tokenizer.n_vocab].argmax(-1)
            for row, token in zip(rows, best.tolist(), strict=True):
                self._add(row, token)
            going = [place for place, row in enumerate(rows) if self._goes_on(row)]
            last = position + 1 == self.max_new_tokens
            if last or not self.model.any_rank(bool(going)):
                break
            tokens = best[:, None]
            if 0 < 2 * len(going) <= len(rows):
                kept = torch.tensor(going, device=tokens.device)
                cache.keep(kept)
                tokens, rows = tokens[kept], [rows[place] for place in going]
        return [
            self._decode(new) if text is None else text
            for new, text in zip(self.new, self.found, strict=True)
        ]

    def _goes_on(self, row: int) -> bool:
        return row < len(self.found) and self.found[row] is None

    def _add(self, row: int, token: int) -> None:
        """Take a new token, unless the text has ended; see whether it ends the text."""
        if not self._goes_on(row):
            return
        if token == self.model.tokenizer.eos_id:
            self.found[row] = self._decode(self.new[row])
            return
        self.new[row].append(token)
        text = self.model.tokenizer.decode(self.new[row])
        if places := [place for string in self.stop if (place := text.find(string)) >= 0]:
            self.found[row] = text[: min(places)].strip()

    def _decode(self, tokens: list[int]) -> str:
        return self.model.tokenizer.decode(tokens).strip()
