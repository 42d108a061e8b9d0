"""Random numbers for draws, each a function of (random seed, step, token id) alone.

Whoever draws the same step with the same seed has the same number for each token: bare or patched, in another runtime, at another
quantization, in another place of a batch. A token is the one whose log-probability and Gumbel number have the largest sum, so logits
that differ by little give another token only where two sums are as close as that; and where texts have parted, the numbers of the next step
are still the same. Both make comparisons of samples tighter (common random numbers).

The generator is SplitMix64 with a counter: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"; finaliser
of Stafford's variant 13.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WORD = 2**64 - 1
STRIDE = 0x9E3779B97F4A7C15
FACTORS, SHIFTS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB), (30, 27, 31)
BITS = 53  # of a float64
BLOCK = 2**13  # so many numbers at once stay in the processor's cache


def _mixed(word: int) -> int:
    """SplitMix64's finaliser, of one word."""
    for shift, factor in zip(SHIFTS, FACTORS, strict=False):
        word = (word ^ (word >> shift)) * factor & WORD
    return word ^ (word >> SHIFTS[-1])


class Noise:
    """The numbers of one reply.

    Args:
        rng_seed: of any size; ``None`` takes one that nobody knows.
    """

    def __init__(self, rng_seed: int | None) -> None:
        rest = secrets.randbits(64) if rng_seed is None else rng_seed
        self._key = _mixed(STRIDE ^ (rest & WORD))
        while rest := rest >> 64:
            self._key = _mixed(self._key ^ (rest & WORD))

    def key(self, step: int) -> int:
        """What all numbers of a step are made with."""
        return _mixed((self._key + (step + 1) * STRIDE) & WORD)


def exponentials(keys: Sequence[int], ids: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float64]]:
    """Exponential numbers of mean 1: what has weight w and number e, and with it the largest w / e, is drawn with probability w / sum(w).

    -log(e) is the Gumbel number of (key, id).

    Args:
        keys: B, of ``Noise.key``.
        ids: B arrays of token ids, of any lengths.

    Returns:
        B arrays of those lengths, positive.
    """
    lengths = [len(row) for row in ids]
    words = np.concatenate(ids).astype(np.uint64) * np.uint64(STRIDE)
    words += np.repeat(np.array(keys, np.uint64), lengths)
    numbers = np.empty(len(words))
    for start in range(0, len(words), BLOCK):
        numbers[start : start + BLOCK] = _exponentials(words[start : start + BLOCK])
    return np.split(numbers, np.cumsum(lengths)[:-1])


def _exponentials(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """(N,) from (N,) counters, which are overwritten."""
    shifted = np.empty_like(words)
    for place, shift in enumerate(SHIFTS):
        np.right_shift(words, np.uint64(shift), out=shifted)
        words ^= shifted
        if place < len(FACTORS):
            words *= np.uint64(FACTORS[place])
    words >>= np.uint64(64 - BITS)
    uniforms = words.astype(np.float64)
    uniforms += 0.5  # neither 0 nor 1
    uniforms *= 2.0**-BITS
    numbers: NDArray[np.float64] = -np.log(uniforms, out=uniforms)
    return numbers
