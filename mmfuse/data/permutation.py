"""Shuffles without a table: where an element goes in a keyed permutation of `range(size)`, for any size at once.

A Feistel network over just enough bits for `size`, walked again while it lands outside (Mitchell et al. 2021,
"Bandwidth-optimal random shuffling for GPUs"; Black and Rogaway 2002 for the walk). So a window of a million samples
costs no memory and a resumed run starts in the middle of one at once.
"""

import numpy as np

_ROUNDS = 8
_SMALLEST_BITS = 6
"""Below this there are too few round functions to reach every order equally often."""
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele et al. 2014) on uint64 of any shape. `mmfuse.randomness` has it in torch."""
    x = x + _GAMMA
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def permute(position: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Element by element, the place of `position` in the permutation of `range(size)` that `key` names.

    Args:
        position: int64 `(n,)`, `0 <= position < size`.
        size: int64 `(n,)`.
        key: uint64 `(n,)`.
    Returns:
        int64 `(n,)`.
    """
    bits = np.maximum(np.frexp(size - 1)[1], _SMALLEST_BITS).astype(np.uint64)
    result = position.astype(np.uint64)
    outside = np.arange(len(position))
    while len(outside):
        result[outside] = _network(result[outside], bits[outside], key[outside])
        outside = outside[result[outside] >= size[outside].astype(np.uint64)]
    return result.astype(np.int64)


def _network(x: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A keyed bijection of `bits`-bit numbers."""
    low_bits = bits >> np.uint64(1)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (bits - low_bits)) - np.uint64(1)
    low, high = x & low_mask, x >> low_bits
    for _ in range(0, _ROUNDS, 2):
        key = key + _GAMMA
        high = high ^ (_scramble(low, key) & high_mask)
        key = key + _GAMMA
        low = low ^ (_scramble(high, key) & low_mask)
    return high << low_bits | low


def _scramble(x: np.ndarray, key: np.ndarray) -> np.ndarray:
    x = (x ^ key) * _MIX_1
    x = (x ^ (x >> np.uint64(32))) * _MIX_2
    return x >> np.uint64(32)  # the upper half: in a product only upper bits depend on all of the factor
