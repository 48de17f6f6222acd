"""SASRec (Kang & McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018), in RecBole's form.

    x = drop(LN(E[seq] + P)),  position of the oldest item first (Eq. 1)
    two blocks of causal attention and feed-forward, each LN(x + ·) (Eqs. 2–5)
    s = h · e, h at the last item (Eq. 6: the table of the input is the table of the output)

loss=ce (default, RecBole's): cross-entropy over all items at the last step, one row a prefix. loss=bce (the
paper's Eq. 7): every step predicts the next item against one random item.

Differs from the published code: RecBole's softmax has a column for padding (softmax_over_padding=true
brings it back). An empty history is read as position 0 alone, a learned vector of "nothing yet", where
RecBole has no such rows. The negatives of bce are uniform; one that the user clicked does not count.
Shapes: ids [B, N] padded at the end with 0, h [B, D], scores [B, C].
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
from trainer.models.layers.history import clicked_ids
from trainer.models.layers.sequence import (
    RECBOLE_EPS,
    causal,
    init_normal,
    last_step,
    recbole_layer,
    run_layers,
)
from trainer.models.next_item import NextItemRanker, NextItemSettings


@s.settings
class SasRecSettings(NextItemSettings):
    name: Literal["sasrec"] = "sasrec"
    """self-attention over the clicked items"""
    dim: Positive = 64
    """width of item vectors and layers"""
    num_layers: Positive = 2
    """blocks"""
    num_heads: Positive = 2
    """attention heads of a block"""
    ffn_dim: Positive = 256
    """inner width of the feed-forward layers"""
    dropout: Fraction = 0.5
    """dropout of the input and of both halves of a block"""
    attention_dropout: Fraction = 0.5
    """dropout of attention weights"""
    loss: Literal["ce", "bce"] = "ce"
    """ce: softmax over all items at the last step; bce: the paper's, every step against one random item"""


class SasRecCore(nn.Module):
    """ids [B, N] → a vector of each step [B, N, D]."""

    def __init__(self, num_items: int, length: int, settings: SasRecSettings) -> None:
        super().__init__()
        dim = settings.dim
        self.items = ItemTable(num_items, dim)
        self.positions = Positions(length, dim)
        self.norm = nn.LayerNorm(dim, eps=RECBOLE_EPS)
        self.dropout = Dropout(settings.dropout)
        shape = (dim, settings.num_heads, settings.ffn_dim, settings.dropout, settings.attention_dropout)
        self.layers = nn.ModuleList(recbole_layer(*shape) for _ in range(settings.num_layers))
        self.apply(init_normal)

    def forward(self, ids_BN: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.positions(self.items(ids_BN))))
        return run_layers(self.layers, x, causal(ids_BN != 0))


class SasRec(NextItemRanker):
    """Recommendation only."""

    Settings = SasRecSettings
    title = "SASRec"
    settings: SasRecSettings

    def __init__(self, settings: SasRecSettings, world: World) -> None:
        super().__init__(settings, world)
        self.core = SasRecCore(world.num_items, world.data.history_max, settings)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        ids_BN, target_B = self.history(batch), clicked_ids(batch)
        steps_BND = self.core(ids_BN)
        if self.settings.loss == "bce":
            return self.every_step(ids_BN, steps_BND, target_B), {}
        return self.next_item(last_step(steps_BND, (ids_BN != 0).sum(1)), target_B), {}

    def every_step(self, ids_BN: Tensor, steps_BND: Tensor, target_B: Tensor) -> Tensor:
        """Eq. 7: −log σ(s⁺) − log(1 − σ(s⁻)), mean over the steps of an event, then over events."""
        length_B = (ids_BN != 0).sum(1)
        next_BN = torch.cat([ids_BN[:, 1:], torch.zeros_like(ids_BN[:, :1])], 1)
        last_B1 = (length_B - 1).clamp(min=0)[:, None]
        next_BN = next_BN.scatter(1, last_B1, target_B[:, None])
        negative_BN = torch.randint_like(ids_BN, 1, self.core.items.num_items + 1)
        known_BM = torch.cat([ids_BN, target_B[:, None]], 1)
        unknown_BN = (negative_BN[:, :, None] != known_BM[:, None]).all(2)
        positive = (steps_BND.float() * self.core.items(next_BN).float()).sum(-1)
        negative = (steps_BND.float() * self.core.items(negative_BN).float()).sum(-1)
        losses_BN = F.softplus(-positive) + F.softplus(negative) * unknown_BN
        counted_BN = next_BN != 0
        return ((losses_BN * counted_BN).sum(1) / counted_BN.sum(1)).mean()

    def hidden(self, batch: Batch) -> Tensor:
        ids_BN = self.history(batch)
        return last_step(self.core(ids_BN), (ids_BN != 0).sum(1))


MODEL = SasRec
