"""Is a P(click) of .3 followed by a click in three of ten cases? Reliability of probabilities.

The base rate is that of training: the clicked item among as many negatives as a training event has. A model
that was trained on 4 negatives says .2 where it knows nothing, and would be far off on 99.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.errors import DataError
from trainer.evaluation.bootstrap import UNIT, mean_interval

NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Pairs of similar probability."""

    probability: float  # mean
    share: float  # of clicked ones, with a 95 % bootstrap interval over users
    low: float
    high: float
    num_pairs: int


@dataclass(frozen=True)
class Reliability:
    """error: mean distance of probability and share over the pairs (expected calibration error). brier: mean
    squared error of the probability; of a constant at the base rate it is base_rate · (1 − base_rate)."""

    bins: tuple[Bin, ...]
    error: float
    brier: float
    base_rate: float
    num_pairs: int


def reliability(probabilities: ArrayLike, labels: ArrayLike, users: ArrayLike) -> Reliability:
    """probabilities, labels (0, 1) and users [n]; bins hold equally many pairs. Equal probabilities stay in
    one bin. Raises DataError for no pairs and for numbers outside 0 … 1."""
    p, y, owners = (np.asarray(values) for values in (probabilities, labels, users))
    p, y = p.astype(np.float64), y.astype(np.float64)
    if not len(p) or not (len(p) == len(y) == len(owners)):
        raise DataError(
            f"{len(p)} probabilities, {len(y)} labels, {len(owners)} users: they must be equally many"
        )
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError("probabilities must lie between 0 and 1")
    bins = tuple(_bin(p[rows], y[rows], owners[rows]) for rows in _rows(p, NUM_BINS))
    distances = [abs(found.probability - found.share) * found.num_pairs for found in bins]
    return Reliability(
        bins=bins,
        error=float(sum(distances) / len(p)),
        brier=float(((p - y) ** 2).mean()),
        base_rate=float(y.mean()),
        num_pairs=len(p),
    )


def _rows(p: NDArray[np.float64], num_bins: int) -> list[NDArray[np.int64]]:
    edges = np.unique(np.quantile(p, np.linspace(0, 1, num_bins + 1)[1:-1]))
    place = np.searchsorted(edges, p, side="left")
    return [np.flatnonzero(place == number) for number in np.unique(place)]


def _bin(p: NDArray[np.float64], y: NDArray[np.float64], users: NDArray[np.generic]) -> Bin:
    found = mean_interval(y, users, UNIT)
    return Bin(float(p.mean()), found.value, found.low, found.high, len(p))
