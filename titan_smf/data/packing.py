"""Samples of a packed stream, their order and their mixture: pure functions of integers.

A *sample* of a source is a window of `seq_len + 1` tokens of its packed stream: documents one after
another, `[begin] text [end]` each. Windows step by `seq_len`, so inputs and labels (the same tokens
one later) cover each token once. The last partial window is dropped. A window may hold parts of
several documents; the end tokens mark where attention within documents has to stop.

    stream   d0 d0 d0 d0 d1 d1 d2 d2 d2 d2 d2       seq_len 4
    window 0 [...........]                          inputs d0 d0 d0 d0, labels d0 d0 d0 d1
    window 1             [...........]              inputs d1 d1 d2 d2, labels d1 d2 d2 d2
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_smf.data.token_shards import TokenShards
from titan_smf.storage import sha256_hex

FEISTEL_ROUNDS = 8
WEIGHT_UNIT = 1 << 32


def num_windows(num_tokens: int, seq_len: int) -> int:
    return max(0, (num_tokens - 1) // seq_len)


def read_windows(shards: TokenShards, windows: Sequence[int], seq_len: int) -> npt.NDArray[Any]:
    """Return the tokens of the given windows, int64 (windows, seq_len + 1)."""
    tokens = np.empty((len(windows), seq_len + 1), dtype=np.int64)
    for row, window in enumerate(windows):
        start = int(window) * seq_len
        tokens[row] = shards.tokens(start, start + seq_len + 1)
    return tokens


def permute(positions: npt.ArrayLike, size: int, key: str) -> npt.NDArray[np.int64]:
    """Apply to `positions` the permutation of `range(size)` that `key` chooses.

    Any position costs the same and nothing is stored. A Feistel network permutes the integers of
    the smallest power of two that holds `size`; a result outside `range(size)` is sent through
    again until it is inside, at most two rounds on average.
    """
    bits = max(2, (size - 1).bit_length())
    left_bits, right_bits = bits // 2, bits - bits // 2
    digest = int(sha256_hex(key.encode()), 16)
    round_keys = [np.uint64((digest >> (32 * i)) & 0xFFFFFFFF) for i in range(FEISTEL_ROUNDS)]

    result = np.array(positions, dtype=np.uint64, ndmin=1)
    assert (result < size).all(), "positions within the permuted range"
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        result[outside] = _feistel(result[outside], left_bits, right_bits, round_keys)
        outside = result >= size
    return result.astype(np.int64)


def _feistel(
    values: npt.NDArray[np.uint64], left_bits: int, right_bits: int, round_keys: list[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Permute the integers of `left_bits + right_bits` bits; the halves swap every round."""
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for key in round_keys:
        mask = np.uint64((1 << left_bits) - 1)
        left, right = right, left ^ (_scramble(right, key) & mask)
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _scramble(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """Hash 64-bit values under a key: the finaliser of splitmix64."""
    mixed = values + (key << np.uint64(32)) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Return weights as integers, so that the mixture is exact and the same on every platform."""
    total = sum(weights)
    return [max(1, round(weight / total * WEIGHT_UNIT)) for weight in weights]


def mix(drawn: Sequence[int], weights: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """Return the sources of the next `count` samples, and the number drawn from each afterwards.

    After any number `n` of samples every source has given less than one sample more or fewer than
    its share `n * weight / sum(weights)`. Each unit of a source has a first step at which it does
    not run ahead of the share and a last step at which it does not fall behind; among those that
    may be drawn the earliest last step wins, then the lower source. The result depends on `drawn`
    alone, so that is the whole state.
    """
    drawn = list(drawn)
    total = sum(weights)
    # the last step of the next unit of each source: ceil((drawn + 1) * total / weight)
    last_step = [-(-(d + 1) * total // w) for d, w in zip(drawn, weights, strict=True)]
    first = sum(drawn)
    chosen = []
    for step in range(first + 1, first + count + 1):
        source = min(
            (s for s, w in enumerate(weights) if w * step > drawn[s] * total),
            key=last_step.__getitem__,
        )
        chosen.append(source)
        drawn[source] += 1
        last_step[source] = -(-(drawn[source] + 1) * total // weights[source])
    return chosen, drawn
