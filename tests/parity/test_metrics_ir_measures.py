"""Recall, NDCG and MRR against ir_measures: without ties on the scores themselves; with ties on the mean over
many random orders of the tied."""

import ir_measures
import numpy as np
import pytest
import torch
from ir_measures import RR, R, nDCG

from trainer.evaluation.metrics import CUTOFFS, expected_ranks, summarise

MEASURES = {
    **{f"recall@{k}": R @ k for k in CUTOFFS},
    **{f"ndcg@{k}": nDCG @ k for k in CUTOFFS},
    "mrr": RR,
    "mrr@10": RR @ 10,
}


def by_ir_measures(scores: np.ndarray, place: np.ndarray) -> dict[object, float]:
    """Means over events; scores [n, C] without ties, place [n] of the clicked item."""
    qrels = [ir_measures.Qrel(str(event), str(item), 1) for event, item in enumerate(place)]
    run = [
        ir_measures.ScoredDoc(str(event), str(item), float(score))
        for event, row in enumerate(scores)
        for item, score in enumerate(row)
    ]
    found: dict[object, float] = ir_measures.calc_aggregate(MEASURES.values(), qrels, run)
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_equal_ir_measures(seed):
    generator = np.random.default_rng(seed)
    num_events, num_candidates = 60, 100
    scores = np.stack([generator.permutation(num_candidates) for _ in range(num_events)]) / 7.0
    place = generator.integers(num_candidates, size=num_events)
    labels = np.eye(num_candidates)[place]
    reference = by_ir_measures(scores, place)
    ranks, num_tied = expected_ranks(
        torch.tensor(scores, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)
    )
    ours = summarise(ranks, num_tied, np.arange(num_events))
    assert ours["tie_rate"] == 0
    for name, measure in MEASURES.items():
        assert ours[name] == pytest.approx(reference[measure], abs=1e-9), name


def test_ties_equal_the_mean_over_random_orders():
    """Ten levels of score among 30 candidates, and 300 orders: the standard error of each figure is below
    .01."""
    generator = np.random.default_rng(5)
    num_events, num_candidates, num_orders = 12, 30, 300
    scores = generator.integers(10, size=(num_events, num_candidates)).astype(float)
    place = generator.integers(num_candidates, size=num_events)
    # every order is an event of its own: noise below the difference of two levels breaks the ties
    noise = generator.random((num_orders, num_events, num_candidates)) / 2
    orders = (scores + noise).reshape(-1, num_candidates)
    reference = by_ir_measures(orders, np.tile(place, num_orders))
    labels = torch.tensor(np.eye(num_candidates)[place], dtype=torch.float32)
    ours = summarise(*expected_ranks(torch.tensor(scores), labels), np.arange(num_events))
    assert ours["tie_rate"] > 0.5
    for name, measure in MEASURES.items():
        assert ours[name] == pytest.approx(reference[measure], abs=0.02), name
