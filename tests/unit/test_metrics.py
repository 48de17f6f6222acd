"""Expected ranks, summaries and bootstrap intervals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.metrics import METRICS, compare, expected_ranks, metric_values, summarise

NAN = float("nan")


def ranks_of(scores: list[list[float]], positives: list[int]) -> tuple[list[float], list[bool]]:
    labels = torch.zeros(len(scores), len(scores[0]))
    labels[torch.arange(len(scores)), torch.tensor(positives)] = 1
    ranks, tied = expected_ranks(torch.tensor(scores), labels)
    return ranks.tolist(), tied.tolist()


def test_ties_count_their_expected_rank():
    assert ranks_of([[3.0, 3.0, 3.0, 1.0]], [0]) == ([2.0], [True])  # places 1, 2 and 3 are equally likely
    # a constant model is at chance, wherever the positive stands
    assert ranks_of([[0.0] * 100], [7]) == ([50.5], [True])
    assert ranks_of([[5.0, 2.0, 2.0], [1.0, 2.0, 3.0]], [1, 0]) == ([2.5, 3.0], [True, False])


def test_nan_scores_rank_last():
    assert ranks_of([[NAN, 1.0, 2.0]], [0]) == ([3.0], [False])
    assert ranks_of([[1.0, NAN, NAN]], [0]) == ([1.0], [False])
    assert ranks_of([[NAN, NAN, NAN, 0.0]], [1]) == ([3.0], [True])
    assert ranks_of([[-float("inf"), NAN]], [0]) == ([1.0], [False])


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.data())
def test_rank_is_the_mean_over_tie_breaks_and_ignores_candidate_order(scores, data):
    positive = data.draw(st.integers(0, len(scores) - 1))
    order = data.draw(st.permutations(range(len(scores))))
    rank = ranks_of([[float(s) for s in scores]], [positive])[0][0]
    greater, equal = sum(s > scores[positive] for s in scores), scores.count(scores[positive])
    assert rank == np.mean([greater + place for place in range(1, equal + 1)])
    assert ranks_of([[float(scores[o]) for o in order]], [order.index(positive)])[0][0] == rank


def test_summary_of_known_ranks():
    summary = summarise(
        torch.tensor([1.0, 3.0, 10.0, 10.5, 30.0]), torch.tensor([False, False, False, True, False])
    )
    assert summary["recall@5"] == pytest.approx(2 / 5)
    assert summary["recall@10"] == pytest.approx(3 / 5)
    assert summary["recall@20"] == pytest.approx(4 / 5)
    assert summary["ndcg@5"] == pytest.approx((1 + 0.5) / 5)
    assert summary["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 10 + 1 / 10.5 + 1 / 30) / 5)
    assert summary["num_events"] == 5
    assert summary["tie_rate"] == pytest.approx(0.2)


def test_bootstrap_agrees_with_resampling_events_one_by_one():
    generator = np.random.default_rng(3)
    ranks = torch.from_numpy(generator.integers(1, 101, size=400).astype(np.float64))
    summary = summarise(ranks, torch.zeros(400, dtype=torch.bool), seed=1)
    values = metric_values(ranks).numpy()
    naive = np.stack([values[generator.integers(400, size=400)].mean(0) for _ in range(1000)])
    for i, name in enumerate(METRICS):
        low, high = summary["ci95"][name]
        assert low <= summary[name] <= high
        assert [low, high] == pytest.approx(np.quantile(naive[:, i], [0.025, 0.975]), abs=0.012), name


def test_bootstrap_is_seeded_and_narrows_with_events():
    few, many = torch.tensor([1.0, 50.0] * 50), torch.tensor([1.0, 50.0] * 50_000)
    no_ties = [torch.zeros(len(r), dtype=torch.bool) for r in (few, many)]
    assert summarise(few, no_ties[0], seed=4) == summarise(few, no_ties[0], seed=4)
    widths = [
        high - low
        for low, high in (summarise(r, t)["ci95"]["mrr"] for r, t in zip((few, many), no_ties, strict=True))
    ]
    assert widths[1] == pytest.approx(widths[0] / np.sqrt(1000), rel=0.2)


def test_paired_comparison_sees_a_small_consistent_gain():
    generator = np.random.default_rng(0)
    a = torch.from_numpy(generator.integers(2, 40, size=500).astype(np.float64))
    better = compare(a, a - 1)["mrr"]
    assert better["difference"] == pytest.approx(better["b"] - better["a"])
    assert better["ci95"][0] > 0
    assert better["p_not_better"] == 0
    same = compare(a, a)["mrr"]
    assert (same["difference"], same["ci95"], same["p_not_better"]) == (0, [0, 0], 1)
    shuffled = compare(a, a[torch.from_numpy(generator.permutation(500))])["mrr"]
    assert shuffled["ci95"][0] < 0 < shuffled["ci95"][1]
