"""Mutual information from distances to nearest neighbours, in nats. Nothing is trained.

    ksg       both sides continuous: Kraskov, Stögbauer & Grassberger 2004, estimator 1 (their Eq. 8)
    ross      x continuous, y a label: Ross 2014

Both are right on average for independent data, and sharp for a few dimensions. With many they fall far short
of the truth (table in mutual_information.py): project first. The intervals resample each sample's own term,
whole users at a time, with the neighbours as they are; they hold the spread of the samples, not this bias.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree
from scipy.special import digamma
from torch import Tensor

from trainer.analysis.mutual_information import Estimate, as_columns, check_samples, standardised
from trainer.errors import DataError
from trainer.evaluation.bootstrap import ANY, mean_interval

NUM_NEIGHBOURS = 3  # as the authors suggest: 2 to 4
JITTER = 1e-8  # in units of a column's deviation: parts equal values, too small to matter otherwise

Floats = NDArray[np.float64]


def ksg(
    x: Tensor, y: Tensor, users: ArrayLike | None = None, k: int = NUM_NEIGHBOURS, seed: int = 0
) -> Estimate:
    """I(X; Y) of two continuous variables: x [n, d] or [n], y [n, e] or [n], users [n] or None.

    `ceiling` is ψ(n) − ψ(k), about log(n / k): what a y that determines x would give. Raises DataError as
    mine() does. Values that repeat often are labels: use ross().
    """
    x, y = as_columns(x), as_columns(y)
    owners = np.arange(len(x)) if users is None else np.asarray(users)
    check_samples(x, y, owners)
    generator = np.random.default_rng(seed)
    points_x, points_y = _prepared(x, generator), _prepared(y, generator)
    joint = np.hstack([points_x, points_y])
    # The distance to the k-th neighbour in the joint space, maximum norm; the point itself comes first.
    distance = cKDTree(joint).query(joint, k=[k + 1], p=np.inf)[0][:, 0]
    near_x, near_y = _num_nearer(points_x, distance), _num_nearer(points_y, distance)
    terms = digamma(k) + digamma(len(x)) - digamma(near_x) - digamma(near_y)
    return _estimate("ksg", terms, owners, float(digamma(len(x)) - digamma(k)), seed)


def ross(
    x: Tensor, labels: Tensor, users: ArrayLike | None = None, k: int = NUM_NEIGHBOURS, seed: int = 0
) -> Estimate:
    """I(X; Y) of a continuous x, [n, d] or [n], and a label, [n] integers or booleans; users [n] or None.

    `ceiling` is the largest value for these labels, about their entropy (log 2 for balanced Yes and No).
    Labels that occur once have no neighbour and are left out. Raises DataError as mine() does, and for labels
    that are not whole numbers or all alike.
    """
    x, kinds = as_columns(x), labels.detach().cpu().numpy().reshape(-1)
    owners = np.arange(len(x)) if users is None else np.asarray(users)
    check_samples(x, as_columns(labels), owners)
    if labels.is_floating_point() or labels.ndim != 1:
        raise DataError(
            f"labels must be whole numbers, [n], got {tuple(labels.shape)} {labels.dtype}: use ksg()"
        )
    _, place, counts = np.unique(kinds, return_inverse=True, return_counts=True)
    kept = counts[place] > 1
    if len(np.unique(place[kept])) < 2:
        raise DataError("fewer than two labels occur more than once: nothing to inform about")
    points, place, owners = _prepared(x, np.random.default_rng(seed))[kept], place[kept], owners[kept]
    same, neighbours, distance = counts[place], np.empty(len(place)), np.empty(len(place))
    for label in np.unique(place):
        rows = np.flatnonzero(place == label)
        neighbours[rows] = num = min(k, len(rows) - 1)
        distance[rows] = cKDTree(points[rows]).query(points[rows], k=[num + 1], p=np.inf)[0][:, 0]
    terms = digamma(len(points)) - digamma(same) + digamma(neighbours)
    terms -= digamma(_num_nearer(points, distance))
    ceiling = float(digamma(len(points)) - digamma(same).mean())
    return _estimate("ross", terms, owners, ceiling, seed)


def _estimate(name: str, terms: Floats, owners: NDArray[np.generic], ceiling: float, seed: int) -> Estimate:
    interval = mean_interval(terms, owners, ANY, seed=seed)
    return Estimate(interval.value, interval.low, interval.high, name, len(terms), ceiling)


def _prepared(values: Tensor, generator: np.random.Generator) -> Floats:
    """Columns of deviation 1, float64, with jitter. A constant column becomes jitter alone."""
    scaled = standardised(values.cpu().double()).numpy()
    jittered: Floats = scaled + JITTER * generator.standard_normal(scaled.shape)
    return jittered


def _num_nearer(points: Floats, distance: Floats) -> NDArray[np.int64]:
    """How many points lie strictly nearer than `distance` to each point, in the maximum norm, itself included
    (the n + 1 of the papers' formulas)."""
    counts: NDArray[np.int64] = cKDTree(points).query_ball_point(
        points, np.nextafter(distance, 0), p=np.inf, return_length=True
    )
    return counts
