"""DIN (Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018).

    a_j = MLP([v, h_j, v − h_j, v ⊙ h_j]);  u = Σ a_j h_j over the real history, without softmax
    s = MLP([…u, v…]), log-odds of a click;  L = BCE, mean over the candidates

Two forms are in use, `variant`:
    recbole (default)   a: Linear, σ for each width, Linear; divided by √D. Head on [u, v, u ⊙ v]: Linear,
                        norm, x·σ(x) for each width, Linear. RecBole's Dice has α = 0 and no norm of its own.
    group               of the authors of SESRec and UniSAR: a: Linear, Dice, Linear, Linear, not scaled. Head
                        on [v, u]: Linear, Dice, Linear, Dice, Linear. Dice(x) = α(1 − p)x + px,
                        p = σ(BN(x)) (Eq. 3).
din_search.py is the group's form with a history of search.

The norms are of the batch: gradients of micro-batches do not add up to exactly those of a whole batch.
Padding of a history is left out of the statistics, where the published code counts it
(norm_over_padding=true). Statistics are those of all ranks, and scoring uses the running ones.
Shapes: ids [B, N] padded at the end with 0, candidates [B, C], attention [B, C, N], scores [B, C].
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import REC
from trainer.batch import Batch
from trainer.config import Fraction, Positive
from trainer.models.contract import GatherRows, Ranker, World
from trainer.models.layers.batch_norm import BatchNorm
from trainer.models.layers.dropout import Dropout
from trainer.models.layers.embedding import ItemTable
from trainer.models.layers.history import HistorySettings, history_ids
from trainer.models.layers.mlp import init_xavier

DICE_EPS = 1e-8

DinVariant = Literal["recbole", "group"]


@s.settings
class DinSettings(HistorySettings):
    name: Literal["din"] = "din"
    """attention of the candidate to the clicked items"""
    variant: DinVariant = "recbole"
    """which of the two forms in use"""
    dim: Positive = 64
    """width of item vectors"""
    attention_dims: tuple[int, ...] = (64, 16)
    """inner widths of the attention unit"""
    head_dims: tuple[int, ...] = (200, 80)
    """inner widths of the head"""
    dropout: Fraction = 0.0
    """dropout of each input of the head's linear maps (variant recbole)"""
    norm_over_padding: bool = False
    """variant group: padding of a history counts in the norm's statistics, as published"""


class Dice(nn.Module):
    """α(1 − p)x + px with p = σ(BN(x)); α is learned from 0."""

    def __init__(self, width: int, gather: GatherRows | None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.norm = BatchNorm(width, DICE_EPS, gather)

    def forward(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        p = self.norm(x, counted).sigmoid()
        return torch.addcmul(self.alpha, 1 - self.alpha, p) * x


class PairLinear(nn.Linear):
    """Linear([v, h, v − h, v ⊙ h]) of every pair of a candidate v and a click h. The map of v and h alone is
    computed once each, so that a pair costs a quarter, in time and in memory."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__(4 * dim, width)

    def forward(self, v_BCD: Tensor, h_BND: Tensor) -> Tensor:  # type: ignore[override]  # of two inputs
        """→ [B, C, N, width]"""
        of_v, of_h, of_difference, of_product = self.weight.chunk(4, 1)
        v = F.linear(v_BCD, of_v + of_difference, self.bias)
        h = F.linear(h_BND, of_h - of_difference)
        products = F.linear(v_BCD[:, :, None] * h_BND[:, None], of_product)
        return products.add_(v[:, :, None]).add_(h[:, None])


class InterestUnit(nn.Module):
    """u of one history for each candidate: Σ_j a_j h_j."""

    def __init__(
        self,
        dim: int,
        widths: Sequence[int],
        variant: DinVariant,
        gather: GatherRows | None = None,
        norm_over_padding: bool = False,
    ) -> None:
        super().__init__()
        self.scale = dim**-0.5 if variant == "recbole" else 1.0
        self.norm_over_padding = norm_over_padding
        first = PairLinear(dim, widths[0])
        self.maps = nn.ModuleList([first, *(nn.Linear(a, b) for a, b in pairwise(widths))])
        self.dice = Dice(widths[0], gather) if variant == "group" else None
        self.output = nn.Linear(widths[-1], 1)

    def forward(self, history_BND: Tensor, mask_BN: Tensor, candidates_BCD: Tensor) -> Tensor:
        """→ [B, C, D]; 0 for an empty history."""
        mask_BCN = mask_BN[:, None].expand(-1, candidates_BCD.shape[1], -1)
        first, *others = self.maps
        x = first(candidates_BCD, history_BND)
        x = x.sigmoid() if self.dice is None else self.dice(x, None if self.norm_over_padding else mask_BCN)
        for linear in others:
            x = linear(x)
            if self.dice is None:  # variant group has no activation here
                x = x.sigmoid()
        weights_BCN = self.output(x)[..., 0] * mask_BCN * self.scale
        return weights_BCN.to(history_BND.dtype) @ history_BND


class Head(nn.Module):
    """[B, C, X] → log-odds [B, C], float32."""

    def __init__(
        self,
        width: int,
        widths: Sequence[int],
        variant: DinVariant,
        gather: GatherRows | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([width, *widths]))
        recbole = variant == "recbole"
        # variant recbole: a norm in front of x·σ(x), group: the activation itself
        self.norms = nn.ModuleList(
            BatchNorm(w, gather=gather) if recbole else Dice(w, gather) for w in widths
        )
        self.gated = recbole
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.maps, self.norms, strict=True):
            x = norm(linear(self.dropout(x)))
            if self.gated:
                x = F.silu(x)
        scores_BC: Tensor = self.output(x)[..., 0].float()
        return scores_BC


class DinCore(nn.Module):
    """History ids [B, N] and candidate ids [B, C] → log-odds [B, C]."""

    def __init__(self, num_items: int, settings: DinSettings, gather: GatherRows | None = None) -> None:
        super().__init__()
        dim, variant = settings.dim, settings.variant
        self.variant = variant
        self.items = ItemTable(num_items, dim)
        self.interest = InterestUnit(
            dim, settings.attention_dims, variant, gather, settings.norm_over_padding
        )
        width = 3 * dim if variant == "recbole" else 2 * dim
        self.head = Head(width, settings.head_dims, variant, gather, settings.dropout)
        self.apply(init_xavier)
        nn.init.xavier_normal_(self.items.weight)
        self.items.zero_padding()

    def user(self, ids_BN: Tensor, candidates_BC: Tensor) -> Tensor:
        """u for each candidate, [B, C, D]."""
        users: Tensor = self.interest(self.items(ids_BN), ids_BN != 0, self.items(candidates_BC))
        return users

    def forward(self, ids_BN: Tensor, candidates_BC: Tensor) -> Tensor:
        u, v = self.user(ids_BN, candidates_BC), self.items(candidates_BC)
        scores_BC: Tensor = self.head(torch.cat([u, v, u * v] if self.variant == "recbole" else [v, u], -1))
        return scores_BC


class Din(Ranker):
    """Recommendation only."""

    Settings = DinSettings
    title = "DIN"
    tasks = (REC,)
    in_batch = True  # its norms
    settings: DinSettings

    def __init__(self, settings: DinSettings, world: World) -> None:
        super().__init__(settings, world)
        self.core = DinCore(world.num_items, settings, world.ranks.gather)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return F.binary_cross_entropy_with_logits(self.score(batch), batch.labels), {}

    def score(self, batch: Batch) -> Tensor:
        ids_BN = history_ids(batch, self.settings.history, self.world.data.history_max)
        scores_BC: Tensor = self.core(ids_BN, batch.candidates + 1)
        return scores_BC


MODEL = Din
