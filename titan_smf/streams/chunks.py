"""Cut text into sentences, and into chunks of whole sentences; nothing is lost or changed."""

import re

BOUNDARY = re.compile(r"[.!?][\"')\]\u2019\u201d]*\s+|\n\s*")
"""The end of a sentence or a line, with the space after it."""
NO_END = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|cf|e\.g|i\.e|No|Vol|approx|ca|Gen|Col|Capt|Lt|Sgt)"
    r"|\b[A-Z])\.$"
)
"""Abbreviations and initials, whose full stop ends no sentence."""
SMALLEST_TAIL = 0.25
"""A last chunk shorter than this share is added to the one before."""


def split_sentences(text: str) -> list[str]:
    """Return the sentences and lines of a text, with the space after each; joined, the text."""
    starts = [0]
    for match in BOUNDARY.finditer(text):
        before, after = text[starts[-1] : match.start() + 1], text[match.end() : match.end() + 1]
        is_line = match.group()[0] == "\n" or "\n\n" in match.group()
        if after and (is_line or not (NO_END.search(before) or after.islower())):
            starts.append(match.end())
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def split_chunks(text: str, num_words: int) -> list[str]:
    """Return chunks of about `num_words` words (split at white space) of whole sentences.

    A chunk ends where its length is nearest to `num_words`. Only a sentence of more than twice
    that is cut, between words. Joined, the chunks are the text; a blank text has none.
    """
    chunks: list[str] = []
    words = num_words  # of the last chunk; full, so that the first sentence begins one
    for sentence in split_sentences(text):
        for piece in _cut(sentence, num_words):
            more = len(piece.split())
            if chunks and words + more - num_words <= num_words - words:
                chunks[-1] += piece
                words += more
            else:
                chunks.append(piece)
                words = more
    if len(chunks) > 1 and words < SMALLEST_TAIL * num_words:
        tail = chunks.pop()
        chunks[-1] += tail
    return chunks if text.strip() else []


def _cut(sentence: str, num_words: int) -> list[str]:
    words = re.findall(r"\s*\S+\s*$|\s*\S+", sentence)
    if len(words) <= 2 * num_words:
        return [sentence]
    return ["".join(words[i : i + num_words]) for i in range(0, len(words), num_words)]
