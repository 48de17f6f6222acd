"""GRU4Rec (Hidasi, Karatzoglou, Baltrunas, Tikk, "Session-based Recommendations with Recurrent Neural
Networks", ICLR 2016), in the form of Tan et al. (DLRS 2016) that RecBole has.

    x = drop(E[seq]);  one GRU without biases;  h = W x + b at the last item
    s = h · e (the table of the input)
    L = cross-entropy over all items, one row a prefix

Differs from the published code: RecBole's softmax has a column for padding (softmax_over_padding=true
brings it back). An empty history is one step of padding, so that h = b.
Shapes: ids [B, N] padded at the end with 0, h [B, D], scores [B, C].
"""

from typing import Literal

import torch
from torch import Tensor, nn

from data_shards import settings as s
from trainer.batch import Batch
from trainer.config import Fraction, Positive
from trainer.models.contract import World
from trainer.models.layers.dropout import Dropout
from trainer.models.layers.embedding import ItemTable
from trainer.models.layers.history import clicked_ids
from trainer.models.layers.sequence import last_step
from trainer.models.next_item import NextItemRanker, NextItemSettings


@s.settings
class Gru4RecSettings(NextItemSettings):
    name: Literal["gru4rec"] = "gru4rec"
    """a recurrent net over the clicked items"""
    dim: Positive = 64
    """width of item vectors"""
    hidden_dim: Positive = 128
    """width of the GRU"""
    num_layers: Positive = 1
    """layers of the GRU"""
    dropout: Fraction = 0.3
    """dropout of the item vectors that the GRU reads"""


class Gru4RecCore(nn.Module):
    """ids [B, N] → a vector of each step [B, N, D]."""

    def __init__(self, num_items: int, settings: Gru4RecSettings) -> None:
        super().__init__()
        dim, hidden = settings.dim, settings.hidden_dim
        self.items = ItemTable(num_items, dim)
        self.dropout = Dropout(settings.dropout)
        self.gru = nn.GRU(dim, hidden, settings.num_layers, bias=False, batch_first=True)
        self.output = nn.Linear(hidden, dim)
        nn.init.xavier_normal_(self.items.weight)
        self.items.zero_padding()
        for weight in self.gru.parameters():
            nn.init.xavier_uniform_(weight)

    def forward(self, ids_BN: Tensor) -> Tensor:
        x_BND = self.dropout(self.items(ids_BN))
        # on a GPU autocast's type for recurrent nets is float16, also where bf16 was asked for
        with torch.autocast(x_BND.device.type, enabled=False):
            states, _ = self.gru(x_BND)
        steps_BND: Tensor = self.output(states)
        return steps_BND


class Gru4Rec(NextItemRanker):
    """Recommendation only."""

    Settings = Gru4RecSettings
    title = "GRU4Rec"
    settings: Gru4RecSettings

    def __init__(self, settings: Gru4RecSettings, world: World) -> None:
        super().__init__(settings, world)
        self.core = Gru4RecCore(world.num_items, settings)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.next_item(self.hidden(batch), clicked_ids(batch)), {}

    def hidden(self, batch: Batch) -> Tensor:
        ids_BN = self.history(batch)
        return last_step(self.core(ids_BN), (ids_BN != 0).sum(1))


MODEL = Gru4Rec
