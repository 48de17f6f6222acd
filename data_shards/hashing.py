"""Stateless pseudo-random numbers: the same inputs give the same numbers on every machine, rank, worker and
thread count.

Everything random about data (shuffles, negatives, folds, tie-breaks) is a hash of *what it is for*, never of
*when it is drawn*.
"""

import numpy as np

U64 = np.uint64
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """SplitMix64 finaliser (Steele, Lea & Flood 2014) of each value, keyed by `seed`. Any integer array →
    uint64, same shape."""
    offset = U64((_GOLDEN * (2 * int(seed) + 1)) & 0xFFFFFFFFFFFFFFFF)
    with np.errstate(over="ignore"):
        z = np.asarray(values).astype(np.uint64) + offset
        z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
        return z ^ (z >> U64(31))


def uniform_below(bits: np.ndarray, limit: int) -> np.ndarray:
    """Map uint64 random bits to integers in [0, limit). Uses the upper 32 bits (Lemire's multiply-shift):
    limit < 2**32."""
    return (((bits >> U64(32)) * U64(limit)) >> U64(32)).astype(np.int64)


def uniform_float(bits: np.ndarray) -> np.ndarray:
    """Map uint64 random bits to float64 in [0, 1), by their upper 53 bits."""
    return (bits >> U64(11)).astype(np.float64) * 2.0**-53


def derive_seed(seed: int, *parts: int) -> int:
    """A new seed from a seed and the integers that say what it is for (epoch, shard, block, …)."""
    state = int(seed)
    for part in parts:
        state = int(mix64(np.array([int(part) & 0x7FFFFFFFFFFFFFFF]), state & 0x7FFFFFFFFFFFFFFF)[0])
    return state & 0x7FFFFFFFFFFFFFFF


def permutation(size: int, seed: int) -> np.ndarray:
    """A permutation of range(size) that depends on (size, seed) only, on no library's generator."""
    # mix64 is one-to-one: no ties, so every sort gives the same order
    return np.argsort(mix64(np.arange(size), seed))


def click_fold(users: np.ndarray, items: np.ndarray, num_folds: int) -> np.ndarray:
    """Cross-fitting fold of each (user, item) click, in [0, num_folds). A search and a recommendation of one
    item share it."""
    keys = (np.asarray(users).astype(np.uint64) << U64(32)) | np.asarray(items).astype(np.uint64)
    return uniform_below(mix64(keys, seed=71), num_folds)
