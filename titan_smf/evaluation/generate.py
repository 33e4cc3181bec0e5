"""Greedy answers to prompts from a model on all ranks, with a key-value cache."""

from collections.abc import Sequence

import torch

from titan_smf.data.tokenizer import Tokenizer
from titan_smf.evaluation.evaluated_model import EvaluatedModel
from titan_smf.model.key_value_cache import KeyValueCache
from titan_smf.runtime import on_any_rank


def generate(
    model: EvaluatedModel,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    what: str = "prompts",
) -> list[str] | None:
    """Generate the most likely continuation of each prompt, token by token; None if asked to stop.

    A text ends before the end token, before the first of the strings `stop`, or after
    `max_new_tokens`; space around it is dropped. It does not depend on the other prompts, nor on
    the number of ranks, but for rounding. Collective, inside `model.open()`.
    """

    def continue_batch(batch: list[int]) -> list[str]:
        return _continue_batch(model, [prompts[item] for item in batch], stop, max_new_tokens)

    # The cache of a batch has the room of its longest text.
    lengths = [len(tokens) + max_new_tokens for tokens in prompts]
    return model.map_batches(continue_batch, lengths, batch_size, f"evaluation of {what}")


def _continue_batch(
    model: EvaluatedModel,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Continue this rank's prompts together with the other ranks' batches.

    A rank without prompts runs a stand-in, for the collectives' sake.
    """
    tokenizer = model.tokenizer
    tokens = model.padded(prompts or [[tokenizer.pad_id]])
    new: list[list[int]] = [[] for _ in tokens]
    texts: list[str | None] = [None for _ in prompts] or [""]  # of what has ended
    lengths = torch.tensor([len(prompt) for prompt in prompts] or [1], device=tokens.device)
    cache = KeyValueCache(lengths, tokens.shape[1] + max_new_tokens)
    rows = list(range(len(texts)))  # of the batch that are still in the cache
    for position in range(max_new_tokens):
        logits = model.logits(tokens, cache)
        # Ids above the tokenizer's only round the vocabulary up.
        best = logits[:, : tokenizer.n_vocab].argmax(-1)
        for row, token in zip(rows, best.tolist(), strict=True):
            if texts[row] is None:
                new[row].append(token)
                texts[row] = _text_if_ended(tokenizer, new[row], stop)
        going = [place for place, row in enumerate(rows) if texts[row] is None]
        last = position + 1 == max_new_tokens
        if last or not on_any_rank(bool(going), model.device):
            break
        tokens = best[:, None]
        if 0 < 2 * len(going) <= len(rows):
            kept = torch.tensor(going, device=tokens.device)
            cache.keep(kept)
            tokens, rows = tokens[kept], [rows[place] for place in going]
    return [
        tokenizer.decode(new[row]).strip() if text is None else text
        for row, text in enumerate(texts[: len(prompts)])
    ]


def _text_if_ended(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str]) -> str | None:
    """Return the text before the end token or the first stop string; None if there is neither."""
    if tokens[-1] == tokenizer.eos_id:
        return tokenizer.decode(tokens[:-1]).strip()
    text = tokenizer.decode(tokens)
    places = [place for string in stop if (place := text.find(string)) >= 0]
    return text[: min(places)].strip() if places else None
