"""BERT4Rec (Sun et al., "BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from
Transformer", CIKM 2019), in RecBole's form.

    x = drop(LN(E[seq] + P));  two blocks in which every real position sees every other (Eqs. 1–6)
    o = LN(gelu(W x + b));  s = o · e + b_item (Eq. 7)
    L = cross-entropy over all items at the predicted [MASK]s, their mean over the batch (Eq. 8)

A row of training is the history with the clicked item at its end. A coin for each micro-batch: with
probability last_ratio only the clicked item is masked (what scoring asks for), else each item with
probability mask_ratio; of these the last ⌊mask_ratio · L⌋ are predicted, L = data.history_max. Scoring:
[MASK] stands behind the history.

Differs from the published code: RecBole never predicts a [MASK] at the first position
(skip_first_position=true), drops the oldest item of every list at scoring, also of one that is short
enough, and has a column for padding in its softmax (softmax_over_padding=true). The table of [MASK] is the
last row of the items' table. Shapes: ids [B, N] padded at the end with 0, o [B, N, D], scores [B, C].
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from trainer.batch import Batch
from trainer.config import Fraction, Positive, Share
from trainer.models.contract import World
from trainer.models.layers.dropout import Dropout
from trainer.models.layers.embedding import ItemTable, Positions
from trainer.models.layers.history import clicked_ids, newest
from trainer.models.layers.sequence import RECBOLE_EPS, init_normal, last_step, recbole_layer, run_layers
from trainer.models.next_item import NextItemRanker, NextItemSettings


@s.settings
class Bert4RecSettings(NextItemSettings):
    name: Literal["bert4rec"] = "bert4rec"
    """attention to both sides over the clicked items, trained to fill gaps"""
    dim: Positive = 64
    """width of item vectors and layers"""
    num_layers: Positive = 2
    """blocks"""
    num_heads: Positive = 2
    """attention heads of a block"""
    ffn_dim: Positive = 256
    """inner width of the feed-forward layers"""
    dropout: Fraction = 0.2
    """dropout of the input and of both halves of a block"""
    attention_dropout: Fraction = 0.2
    """dropout of attention weights"""
    mask_ratio: Fraction = 0.2
    """probability that an item is masked, and share of a list that is predicted at most"""
    last_ratio: Share = 0.5
    """share of the micro-batches in which only the clicked item is masked"""
    skip_first_position: bool = False
    """a [MASK] at the first position is not predicted, as published"""


class Bert4RecCore(nn.Module):
    """ids [B, N], with [MASK] = num_items + 1 → a vector of each step [B, N, D]."""

    def __init__(self, num_items: int, length: int, settings: Bert4RecSettings) -> None:
        super().__init__()
        dim = settings.dim
        self.items = ItemTable(num_items, dim, extra=1)
        self.item_bias = ItemTable(num_items, 1, std=0.0)
        self.positions = Positions(length, dim)
        self.norm = nn.LayerNorm(dim, eps=RECBOLE_EPS)
        self.dropout = Dropout(settings.dropout)
        shape = (dim, settings.num_heads, settings.ffn_dim, settings.dropout, settings.attention_dropout)
        self.layers = nn.ModuleList(recbole_layer(*shape) for _ in range(settings.num_layers))
        self.output, self.output_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=RECBOLE_EPS)
        self.apply(init_normal)

    @property
    def mask(self) -> int:
        """The id of [MASK]."""
        return self.items.num_items + 1

    def forward(self, ids_BN: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.positions(self.items(ids_BN))))
        x = run_layers(self.layers, x, (ids_BN != 0)[:, None])
        steps_BND: Tensor = self.output_norm(F.gelu(self.output(x)))
        return steps_BND

    def all_scores(self, hidden_BD: Tensor, with_padding: bool = False) -> Tensor:
        """[B, num_items], float32; with_padding: a column for padding in front."""
        ones_B1 = hidden_BD.new_ones((len(hidden_BD), 1))
        scores: Tensor = self.items(scores_of=hidden_BD, with_padding=with_padding)
        return scores + self.item_bias(scores_of=ones_B1, with_padding=with_padding)


class Bert4Rec(NextItemRanker):
    """Recommendation only."""

    Settings = Bert4RecSettings
    title = "BERT4Rec"
    settings: Bert4RecSettings

    def __init__(self, settings: Bert4RecSettings, world: World) -> None:
        super().__init__(settings, world)
        self.core = Bert4RecCore(world.num_items, world.data.history_max, settings)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        ids_BN = self._with_next(batch, clicked_ids(batch))
        masked_BN = self.draw_masks(ids_BN)
        steps_BND = self.core(ids_BN.masked_fill(masked_BN, self.core.mask))
        return self.mask_loss(steps_BND, masked_BN, ids_BN), {}

    def draw_masks(self, ids_BN: Tensor) -> Tensor:
        """Which positions are hidden, [B, N]. The coin stays on the device."""
        real_BN = ids_BN != 0
        last_BN = real_BN & (real_BN.cumsum(1) == real_BN.sum(1, keepdim=True))
        drawn_BN = real_BN & (torch.rand(ids_BN.shape, device=ids_BN.device) < self.settings.mask_ratio)
        last_only = torch.rand((), device=ids_BN.device) < self.settings.last_ratio
        return torch.where(last_only, last_BN, drawn_BN)

    def mask_loss(self, steps_BND: Tensor, masked_BN: Tensor, ids_BN: Tensor) -> Tensor:
        """Mean cross-entropy over the predicted positions of the batch; 0 without any."""
        most = max(int(self.settings.mask_ratio * self.world.data.history_max), 1)
        following_BN = masked_BN.flip(1).cumsum(1).flip(1)
        predicted_BN = masked_BN & (following_BN <= most)
        if self.settings.skip_first_position:
            predicted_BN = predicted_BN & (torch.arange(ids_BN.shape[1], device=ids_BN.device) > 0)
        # this waits for the GPU once a micro-batch: logits of all positions would cost far more
        hidden_PD, target_P = steps_BND[predicted_BN], ids_BN[predicted_BN]
        with_padding = self.settings.softmax_over_padding
        logits = self.core.all_scores(hidden_PD, with_padding)
        target_P = target_P if with_padding else target_P - 1
        return F.cross_entropy(logits, target_P, reduction="sum") / max(len(target_P), 1)

    def score(self, batch: Batch) -> Tensor:
        return super().score(batch) + self.core.item_bias(batch.candidates + 1)[..., 0].float()

    def score_catalogue(self, batch: Batch) -> Tensor:
        return self.core.all_scores(self.hidden(batch))

    def hidden(self, batch: Batch) -> Tensor:
        """The vector of a [MASK] behind the history."""
        ids_BN = self._with_next(batch, torch.full_like(batch.user, self.core.mask))
        return last_step(self.core(ids_BN), (ids_BN != 0).sum(1))

    def _with_next(self, batch: Batch, next_B: Tensor) -> Tensor:
        """The history and what comes after it, the newest history_max of them."""
        ids_BN = torch.cat([self.history(batch), next_B[:, None]], 1)
        return newest(ids_BN, ids_BN != 0, self.world.data.history_max)


MODEL = Bert4Rec
