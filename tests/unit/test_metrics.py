"""Expected ranks, summaries and bootstrap intervals."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.bootstrap import cluster_means, paired_difference
from trainer.evaluation.metrics import METRICS, expected_ranks, fewest_tied, metric_values, summarise
from trainer.training.schedule import chance

NAN = float("nan")


def ranks_of(scores: list[list[float]], positives: list[int]) -> tuple[list[float], list[int]]:
    labels = torch.zeros(len(scores), len(scores[0]))
    labels[torch.arange(len(scores)), torch.tensor(positives)] = 1
    ranks, num_tied = expected_ranks(torch.tensor(scores), labels)
    return ranks.tolist(), num_tied.tolist()


def slow_metrics(rank: int) -> list[float]:
    """The definitions, in the order of METRICS."""
    cutoffs = (5, 10, 20)
    discounted = [1 / np.log2(1 + rank) if rank <= k else 0.0 for k in cutoffs]
    recall = [float(rank <= k) for k in cutoffs]
    return [*recall, *discounted, 1 / rank, 1 / rank if rank <= 10 else 0.0]


def test_ties_count_their_expected_rank():
    assert ranks_of([[3.0, 3.0, 3.0, 1.0]], [0]) == ([2.0], [3])  # places 1, 2 and 3 are equally likely
    # a constant model is at chance, wherever the positive stands
    assert ranks_of([[0.0] * 100], [7]) == ([50.5], [100])
    assert ranks_of([[5.0, 2.0, 2.0], [1.0, 2.0, 3.0]], [1, 0]) == ([2.5, 3.0], [2, 1])


def test_nan_scores_rank_last():
    assert ranks_of([[NAN, 1.0, 2.0]], [0]) == ([3.0], [1])
    assert ranks_of([[1.0, NAN, NAN]], [0]) == ([1.0], [1])
    assert ranks_of([[NAN, NAN, NAN, 0.0]], [1]) == ([3.0], [3])
    assert ranks_of([[-float("inf"), NAN]], [0]) == ([1.0], [1])


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.data())
def test_rank_is_the_mean_over_tie_breaks_and_ignores_candidate_order(scores, data):
    positive = data.draw(st.integers(0, len(scores) - 1))
    order = data.draw(st.permutations(range(len(scores))))
    rank = ranks_of([[float(s) for s in scores]], [positive])[0][0]
    greater, equal = sum(s > scores[positive] for s in scores), scores.count(scores[positive])
    assert rank == np.mean([greater + place for place in range(1, equal + 1)])
    assert ranks_of([[float(scores[o]) for o in order]], [order.index(positive)])[0][0] == rank


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.data())
def test_metrics_are_means_over_all_orders_of_tied_candidates(scores, data):
    positive = data.draw(st.integers(0, len(scores) - 1))
    ranked = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    slow = np.mean([slow_metrics(1 + order.index(positive)) for order in ranked], axis=0)
    ranks, num_tied = ranks_of([[float(s) for s in scores]], [positive])
    ours = metric_values(torch.tensor(ranks, dtype=torch.float64), torch.tensor(num_tied))
    assert ours[0].tolist() == pytest.approx(slow.tolist(), abs=1e-12)


def test_metrics_of_ties_across_the_cutoffs():
    """Every first place up to 30 with up to 40 tied, against the mean of the definitions."""
    cases = [(first, tied) for first in range(1, 31) for tied in range(1, 41)]
    slow = [
        np.mean([slow_metrics(place) for place in range(first, first + tied)], axis=0)
        for first, tied in cases
    ]
    ranks = torch.tensor([first + (tied - 1) / 2 for first, tied in cases], dtype=torch.float64)
    ours = metric_values(ranks, torch.tensor([tied for _, tied in cases]))
    np.testing.assert_allclose(ours.numpy(), np.array(slow), atol=1e-12)


@pytest.mark.parametrize("num_candidates", [100, 1_000_001])
def test_a_constant_model_is_at_chance(num_candidates):
    rank = torch.tensor([(num_candidates + 1) / 2], dtype=torch.float64)
    ours = dict(zip(METRICS, metric_values(rank, torch.tensor([num_candidates]))[0].tolist(), strict=True))
    for metric in METRICS:
        mean = (
            chance(f"mean/{metric}", num_candidates)[0]
            if metric != "mrr@10"
            else sum(1 / r for r in range(1, 11))
        )
        assert ours[metric] == pytest.approx(mean if metric != "mrr@10" else mean / num_candidates)
    assert ours["recall@10"] == pytest.approx(10 / num_candidates)


def test_a_missed_item_counts_nothing():
    values = metric_values(torch.tensor([np.inf, 2.0], dtype=torch.float64), torch.tensor([1, 1]))
    assert values[0].tolist() == [0.0] * len(METRICS)
    assert values[1].tolist() == pytest.approx(slow_metrics(2))
    assert metric_values(torch.tensor([np.inf]).double(), torch.tensor([1])).sum() == 0


def test_a_half_integer_rank_without_its_ties_is_a_tie_of_two():
    assert fewest_tied(np.array([1.0, 10.5, np.inf])).tolist() == [1, 2, 1]


def test_summary_of_known_ranks():
    ranks, num_tied = torch.tensor([1.0, 3.0, 10.0, 10.5, 30.0]), torch.tensor([1, 1, 1, 2, 1])
    summary = summarise(ranks.double(), num_tied, [0, 0, 1, 2, 3])
    assert summary["recall@5"] == pytest.approx(2 / 5)
    assert summary["recall@10"] == pytest.approx((3 + 0.5) / 5)  # place 10 or 11, equally likely
    assert summary["recall@20"] == pytest.approx(4 / 5)
    assert summary["ndcg@5"] == pytest.approx((1 + 0.5) / 5)
    assert summary["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 10 + (1 / 10 + 1 / 11) / 2 + 1 / 30) / 5)
    assert (summary["num_events"], summary["num_users"]) == (5, 4)
    assert summary["tie_rate"] == pytest.approx(0.2)


def test_intervals_resample_users_with_all_their_events():
    generator = np.random.default_rng(3)
    users = np.repeat(np.arange(40), 10)
    ranks = np.where(generator.random(40)[users] < 0.5, 1.0, 50.0)  # all events of a user are alike
    summary = summarise(torch.from_numpy(ranks), torch.ones(400, dtype=torch.int64), users, seed=1)
    values = metric_values(torch.from_numpy(ranks), torch.ones(400, dtype=torch.int64)).numpy()
    by_user = values.reshape(40, 10, -1).mean(axis=1)
    naive = np.stack([by_user[generator.integers(40, size=40)].mean(0) for _ in range(1000)])
    for i, name in enumerate(METRICS):
        low, high = summary["ci95"][name]
        assert low <= summary[name] <= high
        assert [low, high] == pytest.approx(np.quantile(naive[:, i], [0.025, 0.975]), abs=0.04), name
    by_event = summarise(torch.from_numpy(ranks), torch.ones(400, dtype=torch.int64), np.arange(400))
    width, narrow = (np.ptp(one["ci95"]["mrr"]) for one in (summary, by_event))
    assert width == pytest.approx(narrow * np.sqrt(10), rel=0.15)


def test_bootstrap_is_seeded():
    few = torch.tensor([1.0, 50.0] * 50).double(), torch.ones(100, dtype=torch.int64), np.arange(100)
    assert summarise(*few, seed=4) == summarise(*few, seed=4) != summarise(*few, seed=5)


def test_an_interval_leaves_out_two_and_a_half_percent_at_either_end():
    """By hand: one metric, means over resampled users sorted, interpolated between the nearest; of 20 users,
    each end 1.0956 times as far from the mean (t(.975, 19) = 2.0930 and √(20 / 19), over 1.9600)."""
    ranks, users = torch.arange(1, 41).double(), np.arange(40) // 2
    summary = summarise(ranks, torch.ones(40, dtype=torch.int64), users, seed=3)
    low, high = summary["ci95"]["mrr"]
    means = sorted(cluster_means(1 / ranks.numpy(), users, seed=3))
    for end, share in ((low, 0.025), (high, 0.975)):
        place = share * (len(means) - 1)
        below, above = means[int(place)], means[int(place) + 1]
        percentile = below + (place - int(place)) * (above - below)
        far = (end - summary["mrr"]) / (percentile - summary["mrr"])
        assert far == pytest.approx(2.093024 / 1.959964 * (20 / 19) ** 0.5, rel=1e-6)


def test_a_p_value_counts_both_sides():
    """A gain that half of the users have and the other half lose: either sign is as likely, so p is 1, or
    next to it; half of that would be the chance of one side."""
    gain, users = np.tile([1.0, -1.0], 100), np.arange(200)
    found = paired_difference(np.zeros(200), gain, users, seed=1)
    means = cluster_means(gain, users, seed=1)
    smaller = min((means <= 0).sum(), (means >= 0).sum())
    assert found.value == 0 and found.p_value == min(1.0, 2 * (smaller + 1) / (len(means) + 1)) > 0.9
