"""AEM, the attentive embedding model (Ai, Hill, Vishwanathan & Croft, "A Zero Attention Model for
Personalized Product Search", CIKM 2019). zam.py is the model of the title.

    f_j = Σ_h r_h (e_j · tanh(W_h q + b_h));  a = softmax over the newest items;  u = Σ_j a_j e_j
    M = (q + u) / 2;  s = M · e + b_e;  q as in HEM
    L = L_rank + L_text (layers/product_search.py)

form=multihead is what the public code of TEM calls AEM: u = multi-head attention with q as query, s = M · e
without bias; an empty history is one zero vector there.

Departs from public code in the ways of hem.py. The softmax is shifted by the maximum of the real f_j, not of
padding too: the same numbers without its underflow. An empty history gives u = 0.
Shapes: query words [B, Q], history ids [B, N] padded at the end with 0, M [B, D].
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from trainer.batch import Batch
from trainer.config import Positive
from trainer.models.contract import World
from trainer.models.layers.attention import Attention, masked_softmax
from trainer.models.layers.mlp import init_xavier
from trainer.models.layers.product_search import (
    ProductSearchCore,
    WithHistory,
    WithNorms,
    WithTableNorms,
    norm_of,
)


@s.settings
class AemSettings(WithHistory, WithTableNorms):
    name: Literal["aem"] = "aem"
    """attention of the query over the history"""
    form: Literal["projected", "multihead"] = "projected"
    """projected: the paper's attention; multihead: that of the public code of TEM"""
    num_heads: Positive = 5
    """projections of the query, or heads, which must divide dim (8 in the public code of TEM)"""
    history_length: Positive = 10
    """newest clicks that are read, at most data.history_max"""


class ProjectedAttention(nn.Module):
    """Several projections of the query look at the history; `zero`: and at a zero vector, where they find
    nothing."""

    def __init__(self, dim: int, num_heads: int, zero: bool) -> None:
        super().__init__()
        self.zero = zero
        # W_h and b_h: entry i·H + h is dimension i of head h
        self.projection = nn.Linear(dim, dim * num_heads)
        self.heads = nn.Linear(num_heads, 1, bias=False)  # r
        nn.init.uniform_(self.projection.weight, -((3 / dim) ** 0.5), (3 / dim) ** 0.5)
        nn.init.uniform_(self.projection.bias, -((6 / (dim + 1)) ** 0.5), (6 / (dim + 1)) ** 0.5)
        nn.init.constant_(self.heads.weight, 3**0.5)

    def forward(self, query_BD: Tensor, items_BND: Tensor, real_BN: Tensor) -> Tensor:
        """→ u [B, D]"""
        projected_BDH = self.projection(query_BD).tanh().unflatten(1, (query_BD.shape[1], -1))
        scores_BN = self.heads(items_BND @ projected_BDH)[..., 0]
        if self.zero:
            scores_BN, real_BN = F.pad(scores_BN, (1, 0)), F.pad(real_BN, (1, 0), value=True)
        weights_BN = masked_softmax(scores_BN, real_BN)[:, -items_BND.shape[1] :]
        return (weights_BN[:, None].to(items_BND.dtype) @ items_BND)[:, 0]


class MultiHeadAttention(nn.Module):
    """The same by multi-head attention. A zero vector is not silent here: the value map has a bias."""

    def __init__(self, dim: int, num_heads: int, dropout: float, zero: bool) -> None:
        super().__init__()
        self.zero = zero
        self.attention = Attention(dim, num_heads, dropout)
        self.apply(init_xavier)

    def forward(self, query_BD: Tensor, items_BND: Tensor, real_BN: Tensor) -> Tensor:
        """→ u [B, D]"""
        if self.zero:
            items_BND, real_BN = F.pad(items_BND, (0, 0, 1, 0)), F.pad(real_BN, (1, 0), value=True)
        empty_B1 = ~real_BN.any(1, keepdim=True)
        visible_BN = torch.cat([real_BN[:, :1] | empty_B1, real_BN[:, 1:]], 1)  # padding is a zero vector
        user_BD: Tensor = self.attention(query_BD[:, None], items_BND, visible_BN[:, None])[:, 0]
        return user_BD


class AemCore(ProductSearchCore):
    """Query words and history → M."""

    zero: ClassVar[bool] = False

    def __init__(self, world: World, settings: AemSettings) -> None:
        dim, heads, projected = settings.dim, settings.num_heads, settings.form == "projected"
        super().__init__(world.num_items, world.num_terms, settings, item_bias=projected)
        self.attention: nn.Module
        if projected:
            self.attention = ProjectedAttention(dim, heads, self.zero)
        else:
            self.attention = MultiHeadAttention(dim, heads, settings.dropout, self.zero)

    def forward(self, words_BQ: Tensor, ids_BN: Tensor) -> Tensor:
        query_BD = self.encode_query(words_BQ)
        return (query_BD + self.user(query_BD, ids_BN)) / 2

    def user(self, query_BD: Tensor, ids_BN: Tensor) -> Tensor:
        """u [B, D]"""
        user_BD: Tensor = self.attention(query_BD, self.items(ids_BN), ids_BN != 0)
        return user_BD

    def norms(self) -> list[Tensor]:
        """Of words, items and all matrices."""
        matrices = [p for p in self.attention.parameters() if p.ndim == 2]
        tables = [self.words.vectors.weight, self.items.weight, self.query.projection.weight]
        return [norm_of(table) for table in (*tables, *matrices)]


class Aem(WithNorms):
    """Search only."""

    Settings: ClassVar[type[AemSettings]] = AemSettings
    Core = AemCore
    title = "AEM"

    def question(self, batch: Batch) -> Tensor:
        question_BD: Tensor = self.core(self.query_words(batch.query), self.history(batch))
        return question_BD


MODEL = Aem
