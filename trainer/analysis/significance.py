"""Is a difference more than chance? Holm's correction and t intervals over seeds, beside the bootstrap over
users (trainer/evaluation/bootstrap.py)."""

from collections.abc import Mapping, Sequence

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.bootstrap import Interval


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of several comparisons (Holm 1979): name → p-value, in the order given.

    Rejecting where the adjusted value is at most α keeps the chance of any false rejection below α, whatever
    the dependence of the comparisons.
    """
    if wrong := {name: p for name, p in p_values.items() if not 0 <= p <= 1}:
        raise DataError(f"p-values lie between 0 and 1, got {wrong}")
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def seed_interval(values: Sequence[float], within: tuple[float, float]) -> Interval:
    """Mean over runs that differ in their seed alone, with the 95 % t interval of that mean.

    It says how well the mean is known, not how far a single run may lie from it. `within`: what a value can
    be; an end beyond it is moved there. Raises DataError for fewer than two runs.
    """
    from scipy import stats  # seconds; a plan of runs needs none

    if len(values) < 2:
        raise DataError(f"{len(values)} run(s) have no interval over seeds: train at least two seeds")
    runs = np.asarray(values, dtype=np.float64)
    half = float(stats.t.ppf(0.975, len(runs) - 1) * runs.std(ddof=1) / np.sqrt(len(runs)))
    mean = float(runs.mean())
    return Interval(mean, max(mean - half, within[0]), min(mean + half, within[1]))
