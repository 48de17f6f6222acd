"""Recall, NDCG and MRR against ir_measures on scores without ties."""

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


@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_equal_ir_measures(seed):
    generator = np.random.default_rng(seed)
    num_events, num_candidates = 60, 100
    scores = np.stack([generator.permutation(num_candidates) for _ in range(num_events)]) / 7.0
    place = generator.integers(num_candidates, size=num_events)
    labels = np.eye(num_candidates)[place]
    qrels = [ir_measures.Qrel(str(event), str(place[event]), 1) for event in range(num_events)]
    run = [
        ir_measures.ScoredDoc(str(event), str(c), float(scores[event, c]))
        for event in range(num_events)
        for c in range(num_candidates)
    ]
    reference = ir_measures.calc_aggregate(MEASURES.values(), qrels, run)

    ranks, tied = expected_ranks(
        torch.tensor(scores, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)
    )
    ours = summarise(ranks, tied)
    assert not tied.any()
    for name, measure in MEASURES.items():
        assert ours[name] == pytest.approx(reference[measure], abs=1e-9), name
