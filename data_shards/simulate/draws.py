"""Random draws as hashes of what they are for, so that a user's log does not depend on how many users are
simulated at once."""

import numpy as np

from data_shards.hashing import U64, mix64

_MASK21 = U64((1 << 21) - 1)


def keys_for(parents: np.ndarray, purpose: int, count: int | None = None) -> np.ndarray:
    """Child keys of each parent key: same shape, or with a new last axis of `count`. uint64."""
    hashed = mix64(parents, purpose)
    return hashed if count is None else mix64(hashed[..., None] + np.arange(count, dtype=np.uint64), purpose)


def uniform(keys: np.ndarray, purpose: int) -> np.ndarray:
    """One number in (0, 1) for each key, float64, same shape."""
    return (mix64(keys, purpose) >> U64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54


def uniform3(keys: np.ndarray, purpose: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three independent numbers in (0, 1) from one hash (21 bits each), float32: for draws made by the
    hundred million."""
    bits = mix64(keys, purpose)
    parts = (bits >> U64(43), (bits >> U64(22)) & _MASK21, bits & _MASK21)
    first, second, third = ((p.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-21) for p in parts)
    return first, second, third


def below(keys: np.ndarray, purpose: int, limit: int | np.ndarray) -> np.ndarray:
    """An integer in [0, limit) for each key, int64; `limit` may be an array."""
    return np.minimum((uniform(keys, purpose) * limit).astype(np.int64), np.asarray(limit) - 1)


def normal(keys: np.ndarray, purpose: int) -> np.ndarray:
    """About standard normal (sum of four uniforms), float32: integer arithmetic on hash bits, the same on
    every machine."""
    bits = mix64(keys, purpose)
    total = sum(((bits >> U64(16 * i)) & U64(0xFFFF)).astype(np.float32) for i in range(4))
    return (np.asarray(total, np.float32) * np.float32(2.0**-16) - np.float32(2)) * np.float32(3**0.5)


_GUMBEL = (-np.log(-np.log((np.arange(1 << 16) + 0.5) * 2.0**-16))).astype(np.float32)


def gumbel(u: np.ndarray) -> np.ndarray:
    """Uniform → Gumbel noise, float32: the arg-top-k of (log-weight + noise) is k draws without replacement.

    A table, because float32 log differs in the last bit with an element's place in the array, hence with the
    chunking.
    """
    return _GUMBEL[(u * np.float32(1 << 16)).astype(np.int64)]


def pick(u: np.ndarray, cumulative: np.ndarray) -> np.ndarray:
    """Uniform → index, by a cumulative distribution that ends with 1."""
    return np.minimum(np.searchsorted(cumulative, u, side="right"), len(cumulative) - 1)
