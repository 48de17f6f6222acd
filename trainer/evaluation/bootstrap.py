"""Bootstrap over users: the interval of a mean, and of the difference of two systems on the same events.

Events of one user are alike, so they carry less information than as many independent events. Resampling
events hides that and gives intervals that are too narrow. The cluster bootstrap resamples whole users with
all their events (Davison & Hinkley 1997, section 3.8; Field & Welsh 2007).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.errors import DataError

NUM_RESAMPLES = 1000
ROUNDING = 1e-12  # of a mean difference: what sums of equal metrics in another order leave of 0
_MAX_DRAWS_AT_ONCE = 4_000_000  # int64 held at once: 32 MB

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean of b − a over events, with a 95 % interval and a two-sided p-value over users."""

    value: float
    low: float
    high: float
    p_value: float  # never below 2 / (resamples + 1), nor 2^(1 − num_users)
    num_users: int
    num_events: int


def cluster_means(
    values: ArrayLike, users: ArrayLike, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Floats:
    """Means over the events of bootstrap samples of users. values [n] or [n, M], users [n] → [R] or [R, M].

    A sample draws as many users as there are, with replacement. A user drawn twice brings all its events
    twice, so samples differ in their number of events and the mean is a ratio of two sums. Raises DataError
    when there are no events or the lengths differ.
    """
    values = np.asarray(values, dtype=np.float64)
    users = np.asarray(users)
    if len(values) == 0 or len(values) != len(users):
        raise DataError(f"{len(values)} values and {len(users)} users: give one user an event, at least one")
    _, place = np.unique(users, return_inverse=True)
    num_users = int(place.max()) + 1
    columns = np.column_stack([values, np.ones(len(values))])
    sums = np.zeros((num_users, columns.shape[1]))  # per user: sum of each metric, number of events
    np.add.at(sums, place, columns)
    generator = np.random.default_rng(seed)
    at_once = max(1, _MAX_DRAWS_AT_ONCE // num_users)
    parts = []
    for start in range(0, num_resamples, at_once):
        parts.append(_times_drawn(generator, min(at_once, num_resamples - start), num_users) @ sums)
    totals = np.concatenate(parts)
    means = totals[:, :-1] / totals[:, -1:]
    return means[:, 0] if values.ndim == 1 else means


def mean_interval(
    values: ArrayLike, users: ArrayLike, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of values [n] over events, with the percentile interval of the bootstrap over users [n]."""
    return mean_intervals(np.asarray(values, dtype=np.float64)[:, None], users, num_resamples, seed)[0]


def mean_intervals(
    values: ArrayLike, users: ArrayLike, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> list[Interval]:
    """mean_interval() of each column of values [n, M], all on the same resamples of users [n]."""
    columns = np.asarray(values, dtype=np.float64)
    low, high = np.quantile(cluster_means(columns, users, num_resamples, seed), [0.025, 0.975], axis=0)
    means = (float(columns[:, i].mean()) for i in range(columns.shape[1]))
    return [Interval(mean, float(low[i]), float(high[i])) for i, mean in enumerate(means)]


def paired_difference(
    a: ArrayLike, b: ArrayLike, users: ArrayLike, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Difference:
    """Does b differ from a on the same events? a, b and users [n], in the same order of events.

    The p-value is twice the smaller share of resamples on either side of 0, where both shares count the
    observed sample once (Davison & Hinkley 1997, section 4.2), so it is never 0. Resamples of a few users
    hardly differ and would prove anything: p is no smaller than if the signs of n users' gains were tossed,
    which all agree in 2 of 2^n cases. One user proves nothing: 1.
    """
    before, after = (np.asarray(values, dtype=np.float64)[:, None] for values in (a, b))
    return paired_differences(before, after, users, num_resamples, seed)[0]


def paired_differences(
    a: ArrayLike, b: ArrayLike, users: ArrayLike, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> list[Difference]:
    """paired_difference() of each column of a and b [n, M], all on the same resamples of users [n]."""
    gain = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    means = cluster_means(gain, users, num_resamples, seed)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    smaller = np.minimum((means <= ROUNDING).sum(axis=0), (means >= -ROUNDING).sum(axis=0))
    num_users = len(np.unique(np.asarray(users)))
    tossed = 2.0 ** (1 - num_users)
    return [
        Difference(
            value=float(gain[:, i].mean()),
            low=float(low[i]),
            high=float(high[i]),
            p_value=min(1.0, max(tossed, 2 * (int(smaller[i]) + 1) / (num_resamples + 1))),
            num_users=num_users,
            num_events=len(gain),
        )
        for i in range(gain.shape[1])
    ]


def _times_drawn(generator: np.random.Generator, num_resamples: int, num_users: int) -> Floats:
    """How often each resample draws each user, [R, num_users]."""
    draws = generator.integers(num_users, size=(num_resamples, num_users))
    draws += num_users * np.arange(num_resamples)[:, None]  # a range of cells of its own for every resample
    counts = np.bincount(draws.ravel(), minlength=num_resamples * num_users)
    return counts.reshape(num_resamples, num_users).astype(np.float64)
