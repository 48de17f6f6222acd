"""Ranking metrics with expected rank on ties, and bootstrap intervals.

Each event has one clicked item, so with rank r among the candidates:

    recall@K = [r ≤ K],  ndcg@K = [r ≤ K] / log2(1 + r),  mrr = 1 / r,  mrr@10 = [r ≤ 10] / r
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

CUTOFFS = (5, 10, 20)
METRICS = (*(f"recall@{k}" for k in CUTOFFS), *(f"ndcg@{k}" for k in CUTOFFS), "mrr", "mrr@10")
NUM_RESAMPLES = 1000
_MAX_DRAWS_AT_ONCE = 4_000_000  # int64 counts held at once: 32 MB


def expected_ranks(scores_BC: Tensor, labels_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each event's positive when ties are broken at random: 1 + #greater + #equal others / 2.

    scores_BC any float type, labels_BC with exactly one 1 in a row. A NaN score ranks below every number, and
    ties with other NaNs. → ranks_B float64 (half-integers possible), tied_B bool (another candidate has the
    positive's score).
    """
    assert scores_BC.shape == labels_BC.shape, (scores_BC.shape, labels_BC.shape)
    positive_B1 = labels_BC.argmax(dim=1, keepdim=True)
    nan_BC = scores_BC.isnan()
    score_B1, nan_B1 = scores_BC.gather(1, positive_B1), nan_BC.gather(1, positive_B1)
    greater_BC = torch.where(nan_B1, ~nan_BC, scores_BC > score_B1)  # a comparison with NaN is False
    equal_BC = torch.where(nan_B1, nan_BC, scores_BC == score_B1)
    others_B = equal_BC.sum(1) - 1
    return 1.0 + greater_BC.sum(1).double() + others_B.double() / 2, others_B > 0


def metric_values(ranks: Tensor) -> Tensor:
    """Ranks [n] float64 → [n, len(METRICS)] float64, in the order of METRICS. An expected rank such as 10.5
    is outside the first ten."""
    gain = 1.0 / torch.log2(1.0 + ranks)
    within = [(ranks <= k).double() for k in CUTOFFS]
    return torch.stack(
        [*within, *(w * gain for w in within), 1.0 / ranks, (ranks <= 10).double() / ranks], dim=1
    )


def summarise(ranks: Tensor, tied: Tensor, seed: int = 0) -> dict[str, Any]:
    """Means over events, with 95 % bootstrap intervals (events resampled, percentiles 2.5 and 97.5).

    → {"recall@5": …, "mrr": …, "num_events": n, "tie_rate": …, "ci95": {metric: [low, high]}}. ranks [n]
    float64, n ≥ 1; tied [n] bool.
    """
    assert len(ranks) == len(tied) > 0
    # the bootstrap needs the histogram alone
    distinct, counts = torch.unique(ranks.double().cpu(), return_counts=True)
    values = metric_values(distinct)
    means = (counts.double() @ values) / len(ranks)
    resampled = _resampled_means(values, counts, seed)
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return {
        **{name: float(means[i]) for i, name in enumerate(METRICS)},
        "num_events": len(ranks),
        "tie_rate": float(tied.double().mean()),
        "ci95": {name: [float(low[i]), float(high[i])] for i, name in enumerate(METRICS)},
    }


def compare(ranks_a: Tensor, ranks_b: Tensor, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Paired bootstrap of b − a on the same events in the same order, [n] each.

    → {metric: {"a", "b", "difference", "ci95": [low, high], "p_not_better": share of resamples in which b
    does not exceed a}}.
    """
    assert len(ranks_a) == len(ranks_b) > 0
    pairs, counts = torch.unique(
        torch.stack([ranks_a, ranks_b], dim=1).double().cpu(), dim=0, return_counts=True
    )
    values_a, values_b = metric_values(pairs[:, 0]), metric_values(pairs[:, 1])
    weights = counts.double() / len(ranks_a)
    means_a, means_b = weights @ values_a, weights @ values_b
    differences = _resampled_means(values_b - values_a, counts, seed)
    low, high = torch.quantile(differences, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    not_better = (differences <= 0).double().mean(0)
    return {
        name: {
            "a": float(means_a[i]),
            "b": float(means_b[i]),
            "difference": float(means_b[i] - means_a[i]),
            "ci95": [float(low[i]), float(high[i])],
            "p_not_better": float(not_better[i]),
        }
        for i, name in enumerate(METRICS)
    }


def _resampled_means(values: Tensor, counts: Tensor, seed: int) -> Tensor:
    """Means of NUM_RESAMPLES bootstrap samples, [NUM_RESAMPLES, M].

    Drawing n events with replacement draws multinomial counts of the distinct values [R, M], so the cost
    depends on R (at most 2C − 1), not on n.
    """
    generator = np.random.default_rng(seed)
    num_events = int(counts.sum())
    shares = counts.double().numpy() / num_events
    at_once = max(1, _MAX_DRAWS_AT_ONCE // len(shares))
    parts = []
    for start in range(0, NUM_RESAMPLES, at_once):
        draws = generator.multinomial(num_events, shares, size=min(at_once, NUM_RESAMPLES - start))
        parts.append(torch.from_numpy(draws).double() @ values / num_events)
    return torch.cat(parts)
