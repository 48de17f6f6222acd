"""TEM (Bi, Ai & Croft, "A Transformer-based Embedding Model for Personalized Product Search", SIGIR 2020).

    x = [q, e_1 … e_m] + c · sinusoids, q as in QEM, items oldest first
    pre-norm transformer layers, the first of which attends to x without a norm; a last LayerNorm
    M = x at q;  s = M · e
    L = L_rank + L_text (layers/product_search.py)

Departs from the public code: LayerNorm gains start at 1 (there N(0, 1), by an initialiser that takes them for
something else), in c, and in what layers/product_search.py says. The public code has c = 1 and vectors from
N(0, 1). With vectors from init_std = .1, sinusoids of length √(dim / 2) would drown q, and M would be the
same for every query; so the presets keep the proportion, c = .1.
Shapes: query words [B, Q], history ids [B, N] padded at the end with 0, M [B, D].
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from data_shards import settings as s
from trainer.batch import Batch
from trainer.config import Positive, PositiveFloat
from trainer.models.contract import World
from trainer.models.layers.mlp import init_xavier
from trainer.models.layers.prenorm import PreNormLayer, sinusoids
from trainer.models.layers.product_search import ProductSearch, ProductSearchCore, WithHistory

EPS = 1e-6  # of every LayerNorm


@s.settings
class TemSettings(WithHistory):
    name: Literal["tem"] = "tem"
    """a transformer over the query and the history"""
    num_layers: Positive = 1
    """transformer layers"""
    num_heads: Positive = 8
    """attention heads of a layer"""
    ffn_dim: Positive = 512
    """inner width of the feed-forward layers"""
    position_scale: PositiveFloat = 1.0
    """c, the size of the sinusoids. In the public code it equals init_std (both are 1), as in the preset"""


class TemCore(ProductSearchCore):
    """Query words and history → M."""

    def __init__(self, world: World, settings: TemSettings) -> None:
        super().__init__(world.num_items, world.num_terms, settings)
        shape = (settings.dim, settings.num_heads, settings.ffn_dim, settings.dropout, EPS)
        self.layers = nn.ModuleList(
            PreNormLayer(*shape, norm_first=number > 0) for number in range(settings.num_layers)
        )
        self.norm = nn.LayerNorm(settings.dim, eps=EPS)
        self.position_scale = settings.position_scale
        self.apply(init_xavier)

    def forward(self, words_BQ: Tensor, ids_BN: Tensor) -> Tensor:
        x_BSD = torch.cat([self.encode_query(words_BQ)[:, None], self.items(ids_BN)], 1)
        places_SD = sinusoids(x_BSD.shape[1], x_BSD.shape[2], x_BSD.device)
        x_BSD = x_BSD + self.position_scale * places_SD
        real_BS = torch.cat([torch.ones_like(ids_BN[:, :1], dtype=torch.bool), ids_BN != 0], 1)
        for number, layer in enumerate(self.layers, start=1):
            x_BSD = layer(x_BSD, real_BS[:, None], num_read=1 if number == len(self.layers) else None)
        question_BD: Tensor = self.norm(x_BSD[:, 0])
        return question_BD


class Tem(ProductSearch):
    """Search only."""

    Settings: ClassVar[type[TemSettings]] = TemSettings
    Core = TemCore
    title = "TEM"

    def question(self, batch: Batch) -> Tensor:
        question_BD: Tensor = self.core(self.query_words(batch.query), self.history(batch))
        return question_BD


MODEL = Tem
