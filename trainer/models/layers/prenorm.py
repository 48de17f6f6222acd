"""Pre-norm transformer layers, and the positions of sinusoids."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.layers.attention import Attention
from trainer.models.layers.dropout import Dropout


class PreNormLayer(nn.Module):
    """x + attention(LN x), then x + W₂ gelu(W₁ LN x), gelu by tanh."""

    def __init__(
        self, width: int, heads: int, ffn: int, dropout: float, eps: float, norm_first: bool = True
    ) -> None:
        """norm_first: False lets attention read x as it is."""
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps) if norm_first else None
        self.attention = Attention(width, heads, dropout)
        self.ffn_norm = nn.LayerNorm(width, eps=eps)
        self.inner, self.outer = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.dropout = Dropout(dropout)

    def forward(self, x_BND: Tensor, visible_BNN: Tensor, num_read: int | None = None) -> Tensor:
        """visible: bool, True where the row's position may look at the column's; may have one row for all.
        num_read: only so many positions from the first on are computed; of a last layer no others are read.
        """
        normed = x_BND if self.norm is None else self.norm(x_BND)
        x = x_BND[:, :num_read] + self.dropout(self.attention(normed[:, :num_read], normed, visible_BNN))
        inner = self.dropout(F.gelu(self.inner(self.ffn_norm(x)), approximate="tanh"))
        out: Tensor = x + self.dropout(self.outer(inner))
        return out


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """[length, width] float32 (Vaswani et al. 2017): sines in even columns, cosines in odd ones."""
    position_L1 = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angles = position_L1 * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :width]
