"""Attention that gives 0 where there is nothing to look at: a list of nothing but padding makes neither NaN
nor the mean of its padding."""

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.layers.dropout import Dropout


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the last dimension among the visible, float32; 0 for the others, also where none is
    visible."""
    # a sum: masked_fill gives the same digits, but takes up to twice as long in both passes
    seen = visible.float()
    return (scores.float() + (1 - seen) * torch.finfo(torch.float32).min).softmax(-1) * seen


def masked_mean(vectors: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real slots: vectors […, N, D], mask […, N] → […, D]; 0 where there is none."""
    total = (vectors * mask[..., None]).sum(-2)
    return total / mask.sum(-1, keepdim=True).clamp(min=1)


def check_heads(name: str, width: int, heads: int) -> None:
    """Raises ConfigError where a width cannot be split evenly among the heads. name: what people call it."""
    if width % heads:
        raise ConfigError(
            f"{name} is no multiple of model.num_heads={heads}. Set model.num_heads to a number that divides "
            f"{width}"
        )


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017): four linear maps with biases, scores / √(width / heads)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        check_heads(f"model.dim={width}", width, heads)
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.dropout = Dropout(dropout)  # of the weights

    def forward(self, x_BQD: Tensor, memory_BKD: Tensor, visible_BQK: Tensor) -> Tensor:
        """visible: bool, may have size 1 where all queries see the same. → [B, Q, D]."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x_BQD), self.key(memory_BKD), self.value(memory_BKD))
        )
        scores_BHQK = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        weights = self.dropout(masked_softmax(scores_BHQK, visible_BQK[:, None]))
        attended: Tensor = self.output((weights.to(value.dtype) @ value).transpose(1, 2).flatten(2))
        return attended


class TargetAttention(nn.Module):
    """What of a history matters to each candidate v: Σ_j softmax_j(x_jᵀ W v) x_j, without scaling or value
    map (SESRec, UniSAR). W: xavier normal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        nn.init.xavier_normal_(self.weight)

    def forward(self, history_BND: Tensor, mask_BN: Tensor, candidates_BCD: Tensor) -> Tensor:
        """→ [B, C, D]; 0 for an empty history."""
        scores_BCN = candidates_BCD @ (history_BND @ self.weight).transpose(1, 2)
        weights = masked_softmax(scores_BCN, mask_BN[:, None])
        return weights.to(history_BND.dtype) @ history_BND


class AdditivePooling(nn.Module):
    """One vector of a list: Σ_j softmax_j(v · tanh(U x_j + b)) x_j (Bahdanau et al. 2015, as NRHUB uses
    it)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, hidden)
        self.query = nn.Linear(hidden, 1, bias=False)

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """vectors […, N, D], mask […, N] → […, D]; 0 where all is padding."""
        scores = self.query(self.projection(vectors).tanh())[..., 0]
        weights = masked_softmax(scores, mask).to(vectors.dtype)
        return (weights[..., None] * vectors).sum(-2)
