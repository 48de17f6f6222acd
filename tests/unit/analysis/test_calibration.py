"""Reliability of probabilities against what is known by construction."""

import numpy as np
import pytest

from trainer.analysis.calibration import reliability
from trainer.errors import DataError


def drawn(power: float, num: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels that come with probability p ** power."""
    generator = np.random.default_rng(0)
    p = generator.random(num)
    return p, (generator.random(num) < p**power).astype(float)


def test_probabilities_that_come_true_have_no_error() -> None:
    p, labels = drawn(1)
    found = reliability(p, labels, np.arange(len(p)))
    assert found.error < 0.015 and found.base_rate == labels.mean()
    assert found.brier == pytest.approx(1 / 6, abs=0.005)  # the mean of p (1 − p) over 0 … 1
    assert sum(one.low <= one.probability <= one.high for one in found.bins) >= 8
    assert [one.num_pairs for one in found.bins] == [len(p) // 10] * 10


def test_probabilities_that_are_too_high_are_found() -> None:
    p, labels = drawn(2)
    found = reliability(p, labels, np.arange(len(p)))
    assert found.error == pytest.approx(1 / 6, abs=0.01)  # the mean of p − p²
    assert all(one.share < one.probability for one in found.bins)


def test_equal_probabilities_stay_in_one_bin() -> None:
    found = reliability([0.25] * 8 + [0.75] * 4, [1, 0, 0, 0] * 2 + [1, 1, 1, 0], range(12))
    assert [(one.probability, one.share) for one in found.bins] == [(0.25, 0.25), (0.75, 0.75)]
    assert found.error == 0


def test_what_is_no_probability_is_refused() -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        reliability([0.5, 2.0], [0, 1], [0, 1])
    with pytest.raises(DataError, match="equally many"):
        reliability([0.5], [0, 1], [0, 1])
