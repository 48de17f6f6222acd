"""Bootstrap over users: the interval of a mean, and of the difference of two systems on the same events.

Events of one user are alike, so they carry less information than as many independent events. Resampling
events hides that and gives intervals that are too narrow. The cluster bootstrap resamples whole users with
all their events (Davison & Hinkley 1997, section 3.8; Field & Welsh 2007).

Resamples of n users vary by √((n − 1) / n) too little, and a percentile interval of them is as narrow as if
their variance were known (Hesterberg 2015). Both ends are moved away from the mean by what a t interval has
over that: they are 1.58 times as far for 5 users, 1.06 for 30, 1.002 for 1,000.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.errors import DataError

NUM_RESAMPLES = 1000
UNIT = (0.0, 1.0)  # where metrics and shares lie
ANY = (-np.inf, np.inf)
_NORMAL = 1.959963984540054  # the normal distribution's 97.5 % quantile
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


def interval_ends(
    value: Floats, resampled: Floats, num_users: int, within: tuple[float, float]
) -> tuple[Floats, Floats]:
    """value [M] of the sample and resampled [R, M] of resamples of its users → both ends of the 95 % interval
    [M]. `within`: what the value can be; all of it is the interval of one user, which says nothing."""
    from scipy.special import stdtrit  # half a second; most commands make no interval

    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    if num_users < 2:
        return np.full_like(low, within[0]), np.full_like(high, within[1])
    stretch = np.sqrt(num_users / (num_users - 1)) * stdtrit(num_users - 1, 0.975) / _NORMAL
    return np.clip(value + stretch * (low - value), *within), np.clip(
        value + stretch * (high - value), *within
    )


def mean_interval(
    values: ArrayLike,
    users: ArrayLike,
    within: tuple[float, float],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of values [n] over events, with the interval of the bootstrap over users [n] (interval_ends)."""
    columns = np.asarray(values, dtype=np.float64)[:, None]
    return mean_intervals(columns, users, within, num_resamples, seed)[0]


def mean_intervals(
    values: ArrayLike,
    users: ArrayLike,
    within: tuple[float, float],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """mean_interval() of each column of values [n, M], all on the same resamples of users [n]."""
    columns = np.asarray(values, dtype=np.float64)
    means, num_users = columns.mean(axis=0), len(np.unique(np.asarray(users)))
    low, high = interval_ends(means, cluster_means(columns, users, num_resamples, seed), num_users, within)
    return [Interval(*map(float, ends)) for ends in zip(means, low, high, strict=True)]


def paired_difference(
    a: ArrayLike, b: ArrayLike, users: ArrayLike, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Difference:
    """Does b differ from a on the same events? Metrics a and b between 0 and 1 and users [n], in the same
    order of events.

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
    num_users = len(np.unique(np.asarray(users)))
    low, high = interval_ends(gain.mean(axis=0), means, num_users, (-1.0, 1.0))
    smaller = np.minimum((means <= ROUNDING).sum(axis=0), (means >= -ROUNDING).sum(axis=0))
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
