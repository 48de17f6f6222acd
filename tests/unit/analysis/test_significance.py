"""Cluster bootstrap, Holm's correction and t intervals, against slow and obvious versions."""

import time

import numpy as np
import pytest

from trainer.analysis.significance import holm, seed_interval
from trainer.errors import DataError
from trainer.evaluation.bootstrap import ANY, UNIT, Interval, cluster_means, mean_interval, paired_difference


def clustered(num_users=200, events=10, between=1.0, within=0.3, seed=0):
    """Values whose users differ more than the events of one user: (values [n], users [n])."""
    generator = np.random.default_rng(seed)
    users = np.repeat(np.arange(num_users), events)
    levels = generator.normal(scale=between, size=num_users)
    return levels[users] + generator.normal(scale=within, size=len(users)), users


def slow_cluster_means(values, users, num_resamples, seed):
    """The definition: draw users, glue their events together, take the mean. Draws as cluster_means does."""
    generator = np.random.default_rng(seed)
    names = np.unique(users)
    means = []
    for draw in generator.integers(len(names), size=(num_resamples, len(names))):
        events = np.concatenate([values[users == names[place]] for place in draw])
        means.append(events.mean(axis=0))
    return np.array(means)


def test_cluster_means_equal_the_obvious_loop():
    generator = np.random.default_rng(3)
    users = generator.choice([7, 40, 41, 1000, 5], size=60)  # unsorted, of unequal sizes
    values = generator.normal(size=(60, 2))
    ours = cluster_means(values, users, num_resamples=50, seed=9)
    np.testing.assert_allclose(ours, slow_cluster_means(values, users, 50, 9), rtol=1e-12)
    np.testing.assert_allclose(cluster_means(values[:, 0], users, 50, 9), ours[:, 0], rtol=1e-12)


def test_draws_do_not_depend_on_how_many_fit_in_memory(monkeypatch):
    values, users = clustered(num_users=20)
    whole = cluster_means(values, users, num_resamples=30)
    monkeypatch.setattr("trainer.evaluation.bootstrap._MAX_DRAWS_AT_ONCE", 100)
    np.testing.assert_allclose(cluster_means(values, users, num_resamples=30), whole, rtol=1e-12)


def test_clustered_data_get_a_wider_interval_than_its_events_would():
    values, users = clustered()
    by_user = cluster_means(values, users)
    by_event = cluster_means(values, np.arange(len(values)))
    # In theory √(design effect), here about √(1 + 9 · .92) = 3.0
    assert 2.5 < by_user.std() / by_event.std() < 3.5


@pytest.mark.parametrize(("num_users", "least"), [(2, 0.89), (3, 0.9), (5, 0.91), (10, 0.92), (60, 0.92)])
def test_the_interval_covers_the_truth_about_95_times_in_100(num_users, least):
    """Also of a few users, whose resamples vary too little: percentiles alone cover it 51, 73, 81 and 89
    times in 100 for 2, 3, 5 and 10 users."""
    num_samples, covered = 400, 0
    for seed in range(num_samples):
        values, users = clustered(num_users, events=5, seed=seed)
        interval = mean_interval(values, users, ANY, num_resamples=300)
        covered += interval.low <= 0 <= interval.high
    assert least <= covered / num_samples <= 0.98


def test_percentiles_of_many_users_are_moved_by_less_than_a_five_hundredth():
    values, users = clustered(num_users=1000, events=2)
    interval, means = mean_interval(values, users, ANY), cluster_means(values, users)
    for end, share in ((interval.low, 0.025), (interval.high, 0.975)):
        percentile = np.quantile(means, share)
        assert 1 < (end - values.mean()) / (percentile - values.mean()) < 1.002


def test_one_user_leaves_open_whatever_a_value_can_be():
    alike = np.zeros(7, dtype=int)
    assert mean_interval(np.full(7, 0.25), alike, UNIT) == Interval(0.25, 0, 1)
    found = paired_difference(np.full(7, 0.2), np.full(7, 0.3), alike)
    assert (found.low, found.high, found.p_value) == (-1, 1, 1)


def test_no_interval_leaves_what_a_value_can_be():
    values, users = np.array([0.9, 1.0, 1.0, 0.05]), np.array([0, 0, 1, 2])
    assert mean_interval(values, users, UNIT).high == 1 < mean_interval(values, users, ANY).high
    assert paired_difference(0 * values, values, users).high == 1
    assert seed_interval([0.9, 1.0], UNIT).high == 1 < seed_interval([0.9, 1.0], ANY).high
    assert seed_interval([0.0, 0.1], UNIT).low == 0 > seed_interval([0.0, 0.1], ANY).low


def test_a_difference_is_paired():
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(100), 3)
    a = generator.normal(scale=10, size=300)  # the noise that both systems share drops out
    found = paired_difference(a, a + 0.1 + generator.normal(scale=0.1, size=300), users)
    assert 0.08 < found.low < 0.1 < found.high < 0.12
    assert found.p_value == pytest.approx(2 / 1001)
    assert (found.num_users, found.num_events) == (100, 300)


def test_no_difference_is_no_evidence():
    same = np.ones(10)
    assert paired_difference(same, same, np.arange(10)).p_value == 1.0
    places = 1 / np.log2(np.random.default_rng(0).integers(2, 12, 500))
    seeds = np.mean([places] * 7, axis=0)  # of seven equal runs: rounding moves it by 1e-17 in one direction
    assert not np.array_equal(seeds, places) and paired_difference(places, seeds, np.arange(500)).p_value == 1


@pytest.mark.parametrize(("num_users", "least"), [(1, 1.0), (2, 0.5), (5, 0.0625), (10, 2 / 1001)])
def test_few_users_prove_little(num_users, least):
    """All resamples of one user are alike. If chance gives each gain its sign, those of n users all agree as
    often as n tosses of a coin."""
    users = np.arange(3 * num_users) % num_users
    assert paired_difference(np.zeros(len(users)), np.ones(len(users)), users).p_value == least


def test_twenty_thousand_events_take_less_than_two_seconds():
    users = np.random.default_rng(0).integers(7000, size=20_000)
    start = time.perf_counter()
    paired_difference(np.zeros(20_000), np.ones(20_000), users)
    assert time.perf_counter() - start < 2


def test_holm_by_hand():
    """Sorted .01 .02 .03 .04 times 4 3 2 1 gives .04 .06 .06 .04, and no value is below an earlier one."""
    found = holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02})
    assert list(found) == ["d", "a", "c", "b"]
    assert found == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_seed_interval_by_hand():
    """Values 1 2 3: standard error 1/√3, t(.975, 2) = 4.302653."""
    found = seed_interval([1.0, 2.0, 3.0], ANY)
    assert found.value == 2.0
    assert found.high - 2.0 == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert 2.0 - found.low == pytest.approx(found.high - 2.0)


def test_errors_say_what_to_do():
    with pytest.raises(DataError, match="at least two seeds"):
        seed_interval([0.5], UNIT)
    with pytest.raises(DataError, match="3 values and 2 users"):
        cluster_means(np.ones(3), [1, 2])
    with pytest.raises(DataError, match="between 0 and 1"):
        holm({"a": 1.5})
