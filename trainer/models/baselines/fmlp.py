"""FMLP-Rec (Zhou, Yu, Zhao, Wen, "Filter-enhanced MLP is All You Need for Sequential Recommendation", WWW
2022).

    x = drop(LN(E[seq] + P)), lists padded in front to L = data.history_max (Eq. 1)
    block: y = LN(x + drop(irfft(rfft(x) ⊙ W))) over time, orthonormal, W complex [L//2 + 1, D] (Eqs. 2–5)
           z = LN(y + drop(W₂ gelu(W₁ y))) (Eqs. 6–7)
    s = z[last] · e
    L = −log σ(s⁺) − mean −log(1 − σ(s⁻)) over the event's negatives (Eq. 9); the paper has one

As published, padding is not masked: padded steps carry their position's vector through the filter, and an
empty history is a list of padding. Every list has the length L, so a score does not depend on the batch.
The published logarithms have + 1e-24 inside; these are stable without.
Shapes: ids [B, L] padded in front with 0, z [B, L, D], scores [B, C].
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from trainer.batch import Batch
from trainer.config import Fraction, Positive
from trainer.models.contract import World
from trainer.models.layers.dropout import Dropout
from trainer.models.layers.embedding import ItemTable, Positions
from trainer.models.layers.history import HistorySettings, left_padded
from trainer.models.layers.nce import balanced
from trainer.models.layers.sequence import RECBOLE_EPS, init_normal
from trainer.models.next_item import NextItemRanker

STD = 0.02  # of every weight at the start


@s.settings
class FmlpSettings(HistorySettings):
    name: Literal["fmlp"] = "fmlp"
    """learned filters over the clicked items"""
    dim: Positive = 64
    """width of item vectors and layers"""
    num_layers: Positive = 2
    """blocks"""
    ffn_dim: Positive = 256
    """inner width of the feed-forward layers"""
    dropout: Fraction = 0.5
    """dropout of the input and of both halves of a block"""


class FilterBlock(nn.Module):
    """A learned filter over time, then a feed-forward layer."""

    def __init__(self, length: int, settings: FmlpSettings) -> None:
        super().__init__()
        dim = settings.dim
        self.length = length
        # the last dimension is real, imaginary: optimizers and ZeRO know no complex numbers
        self.filter = nn.Parameter(torch.randn(length // 2 + 1, dim, 2) * STD)
        self.filter_norm = nn.LayerNorm(dim, eps=RECBOLE_EPS)
        self.inner, self.outer = nn.Linear(dim, settings.ffn_dim), nn.Linear(settings.ffn_dim, dim)
        self.norm = nn.LayerNorm(dim, eps=RECBOLE_EPS)
        self.dropout = Dropout(settings.dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        y = self.filter_norm(x_BLD + self.dropout(self._filtered(x_BLD)))
        z: Tensor = self.norm(y + self.dropout(self.outer(F.gelu(self.inner(y)))))
        return z

    def _filtered(self, x_BLD: Tensor) -> Tensor:
        """In float32: Fourier transforms know no bf16."""
        spectrum = torch.fft.rfft(x_BLD.float(), dim=1, norm="ortho")
        spectrum = spectrum * torch.view_as_complex(self.filter.float())
        return torch.fft.irfft(spectrum, n=self.length, dim=1, norm="ortho")


class FmlpCore(nn.Module):
    """ids [B, L] → a vector of each step [B, L, D]."""

    def __init__(self, num_items: int, length: int, settings: FmlpSettings) -> None:
        super().__init__()
        self.items = ItemTable(num_items, settings.dim, std=STD)
        self.positions = Positions(length, settings.dim, std=STD)
        self.norm = nn.LayerNorm(settings.dim, eps=RECBOLE_EPS)
        self.dropout = Dropout(settings.dropout)
        self.blocks = nn.ModuleList(FilterBlock(length, settings) for _ in range(settings.num_layers))
        self.apply(init_normal)

    def forward(self, ids_BL: Tensor) -> Tensor:
        x: Tensor = self.dropout(self.norm(self.positions(self.items(ids_BL))))
        for block in self.blocks:
            x = block(x)
        return x


class Fmlp(NextItemRanker):
    """Recommendation only."""

    Settings = FmlpSettings
    title = "FMLP-Rec"
    settings: FmlpSettings

    def __init__(self, settings: FmlpSettings, world: World) -> None:
        super().__init__(settings, world)
        self.core = FmlpCore(world.num_items, world.data.history_max, settings)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return balanced_bce(self.score(batch), batch.labels), {}

    def hidden(self, batch: Batch) -> Tensor:
        steps_BLD: Tensor = self.core(left_padded(self.history(batch), self.world.data.history_max))
        return steps_BLD[:, -1]


def balanced_bce(scores_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """−log σ(s⁺) − mean of log(1 − σ(s⁻)), mean over events."""
    return balanced(F.softplus(scores_BC * (1 - 2 * labels_BC)), labels_BC).mean()


MODEL = Fmlp
