"""Ranking metrics, expected over ties, with intervals by the bootstrap over users.

Each event has one clicked item, so with rank r among the candidates:

    recall@K = [r ≤ K],  ndcg@K = [r ≤ K] / log2(1 + r),  mrr = 1 / r,  mrr@10 = [r ≤ 10] / r

A clicked item that shares its score with others may stand at any of their places, equally likely. It counts
the mean of the metric over these places (McSherry & Najork 2008), not the metric of the mean place: a model
that scores all of 100 candidates alike has recall@10 = .10.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from trainer.evaluation.bootstrap import NUM_RESAMPLES, UNIT, mean_intervals

CUTOFFS = (5, 10, 20)
METRICS = (*(f"recall@{k}" for k in CUTOFFS), *(f"ndcg@{k}" for k in CUTOFFS), "mrr", "mrr@10")
FIGURES = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr")  # of every table of this project
INTERVALS = f"95 % bootstrap over users, {NUM_RESAMPLES:,} resamples"


def expected_ranks(scores_BC: Tensor, labels_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Where each event's positive stands when ties are broken at random: around 1 + #greater + #others / 2.

    scores_BC any float type, labels_BC with exactly one 1 in a row. A NaN score ranks below every number, and
    ties with other NaNs. → ranks_B float64, the expected rank (half-integers possible), and num_tied_B int64,
    candidates with the positive's score, itself among them (1 = no tie).
    """
    assert scores_BC.shape == labels_BC.shape, (scores_BC.shape, labels_BC.shape)
    positive_B1 = labels_BC.argmax(dim=1, keepdim=True)
    nan_BC = scores_BC.isnan()
    score_B1, nan_B1 = scores_BC.gather(1, positive_B1), nan_BC.gather(1, positive_B1)
    greater_BC = torch.where(nan_B1, ~nan_BC, scores_BC > score_B1)  # a comparison with NaN is False
    num_tied_B = torch.where(nan_B1, nan_BC, scores_BC == score_B1).sum(1)
    return 1.0 + greater_BC.sum(1).double() + (num_tied_B - 1).double() / 2, num_tied_B


def fewest_tied(ranks: np.ndarray) -> np.ndarray:
    """Expected ranks [n] of an evaluation that did not store num_tied → the smallest num_tied that explains
    each: 1, or 2 for a half-integer."""
    return np.where(ranks != np.floor(ranks), 2, 1)


def metric_values(ranks: Tensor, num_tied: Tensor) -> Tensor:
    """Expected ranks [n] float64 and num_tied [n] int64 → [n, len(METRICS)] float64, in the order of METRICS:
    each metric's mean over the tied places.

    The places are first … first + num_tied − 1 with their middle at the expected rank, so the mean is a
    difference of two running sums. An infinite rank (not among the candidates) counts 0.
    """
    missed = ranks.isinf()
    before = (
        torch.where(missed, 0.0, ranks - (num_tied + 1).double() / 2).round().long()
    )  # places before the first
    last = before + num_tied
    place = torch.arange(1, int(last.max()) + 1, dtype=torch.float64) if len(ranks) else torch.ones(1)
    found, discounted, reciprocal = torch.ones_like(place), 1.0 / torch.log2(1.0 + place), 1.0 / place

    def mean_gain(gain: Tensor) -> Tensor:
        """gain of place 1, 2, …; 0 beyond its end."""
        sums = torch.cat([gain.new_zeros(1), gain.cumsum(0)])
        end = len(gain)
        return (sums[last.clamp(max=end)] - sums[before.clamp(max=end)]) / num_tied

    gains = (
        *(found[:k] for k in CUTOFFS),
        *(discounted[:k] for k in CUTOFFS),
        reciprocal,
        reciprocal[:10],
    )
    values = torch.stack([mean_gain(gain) for gain in gains], dim=1)
    return torch.where(missed[:, None], 0.0, values)


def summarise(ranks: Tensor, num_tied: Tensor, users: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Means over events, with 95 % intervals (mean_intervals).

    → {"recall@5": …, "mrr": …, "num_events": n, "num_users": …, "tie_rate": share of events with a tie,
    "ci95": {metric: [low, high]}}. ranks [n] float64, num_tied [n] int64, users [n], n ≥ 1.
    """
    assert len(ranks) == len(num_tied) > 0
    values = metric_values(ranks, num_tied).numpy()
    found = dict(zip(METRICS, mean_intervals(values, users, UNIT, seed=seed), strict=True))
    return {
        **{name: interval.value for name, interval in found.items()},
        "num_events": len(ranks),
        "num_users": len(np.unique(np.asarray(users))),
        "tie_rate": float((num_tied > 1).double().mean()),
        "ci95": {name: [interval.low, interval.high] for name, interval in found.items()},
    }
