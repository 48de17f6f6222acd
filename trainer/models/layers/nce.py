"""Losses of a positive against a few sampled negatives, each judged alone by a sigmoid, and where noise words
come from."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.batch import term_counts

NOISE_EXPONENT = 0.75  # word2vec's (Mikolov et al. 2013), which product search took over


def sampled_bce(scores_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """Binary cross-entropy summed over an event's candidates, float32 [B]. With one positive it is `nce`."""
    return F.binary_cross_entropy_with_logits(scores_BC.float(), labels_BC, reduction="none").sum(-1)


def nce(positive: Tensor, negatives: Tensor) -> Tensor:
    """−log σ(s⁺) − Σ_k log σ(−s⁻_k), float32: positive […], negatives […, K] → […]."""
    return F.softplus(-positive.float()) + F.softplus(negatives.float()).sum(-1)


def balanced(losses_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """The clicked item's loss + the mean of the negatives' losses, [B]."""
    negative_BC = 1 - labels_BC
    of_negatives_B = (losses_BC * negative_BC).sum(1) / negative_BC.sum(1).clamp(min=1)
    return (losses_BC * labels_BC).sum(1) + of_negatives_B


class NoiseWords(nn.Module):
    """Draws words in proportion to frequency^0.75; uniformly before they are counted."""

    cumulative: Tensor  # [num_terms] float64, unnormalised: float32 cannot add up 400,000 words

    def __init__(self, num_terms: int) -> None:
        super().__init__()
        uniform = torch.arange(1, num_terms + 1, dtype=torch.float64)
        self.register_buffer("cumulative", uniform)

    def count(self, item_terms: Tensor) -> None:
        """Frequency: occurrences in the texts of the catalogue, item_terms [num_items, T], 0 = padding."""
        counts = term_counts(item_terms, len(self.cumulative) + 1)[1:]
        if counts.any():
            self.cumulative.copy_(counts.double().pow(NOISE_EXPONENT).cumsum(0))

    def draw(self, *shape: int) -> Tensor:
        """Ids of words, int64 in 1 … num_terms."""
        draws = torch.rand(shape, dtype=torch.float64, device=self.cumulative.device) * self.cumulative[-1]
        # right: a word that never occurs has no interval of its own
        found = torch.searchsorted(self.cumulative, draws, right=True)
        return found.clamp(max=len(self.cumulative) - 1) + 1
