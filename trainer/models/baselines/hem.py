"""HEM, the hierarchical embedding model (Ai, Zhang, Bi, Chen & Croft, "Learning a Hierarchical Embedding
Model for Personalized Product Search", SIGIR 2017).

    q = tanh(W · mean of the query's word vectors + b)
    M = λ q + (1 − λ) u;  s = M · e + b_e
    L = L_rank + L_text + nce(u; word): item and user both predict words of the clicked item's text

Departs from public code (a re-implementation that the oracle runs, and the authors' own): the query's mean
counts real words only (count_query_padding=true brings the other back), no norms of tables in the loss (l2),
AdamW in the place of SGD, and what layers/product_search.py says. A user who is not in the table (a history
given by hand) has u = 0.
Shapes: query words [B, Q], users [B] with 0 = unknown, M [B, D].
"""

from typing import Literal

from torch import Tensor

from data_shards import settings as s
from trainer.batch import Batch
from trainer.config import Share
from trainer.models.contract import World
from trainer.models.layers.embedding import ItemTable
from trainer.models.layers.history import clicked_ids
from trainer.models.layers.product_search import ProductSearchCore, WithNorms, WithTableNorms, norm_of


@s.settings
class HemSettings(WithTableNorms):
    name: Literal["hem"] = "hem"
    """query and user in one space with words and items"""
    query_weight: Share = 0.5
    """λ: how much of M is the query, the rest the user"""


class HemCore(ProductSearchCore):
    """Query words and users → M."""

    def __init__(self, world: World, settings: HemSettings) -> None:
        super().__init__(world.num_items, world.num_terms, settings, item_bias=True)
        self.query_weight = settings.query_weight
        self.users = ItemTable(world.num_users, settings.dim, std=0.0)

    def forward(self, words_BQ: Tensor, users_B: Tensor) -> Tensor:
        user_BD: Tensor = self.users(users_B)
        return self.query_weight * self.encode_query(words_BQ) + (1 - self.query_weight) * user_BD

    def user_text_loss(self, users_B: Tensor, words_BW: Tensor, noise_BWK: Tensor) -> Tensor:
        """nce(u; word), [B]."""
        return self.words.text_loss(self.users(users_B), words_BW, noise_BWK)

    def norms(self) -> list[Tensor]:
        """Of the words, and of users and items together: one table in public code."""
        return [norm_of(self.words.vectors.weight), norm_of(self.users.weight, self.items.weight)]


class Hem(WithNorms):
    """Search only."""

    Settings = HemSettings
    Core = HemCore
    title = "HEM"

    def question(self, batch: Batch) -> Tensor:
        question_BD: Tensor = self.core(self.query_words(batch.query), batch.user + 1)
        return question_BD

    def text_loss(self, batch: Batch) -> Tensor:
        """User and item predict the same words against the same noise."""
        items_B = clicked_ids(batch)
        drawn = self.drawn_words(items_B)
        losses_B: Tensor = self.core.text_loss(items_B, *drawn)
        return losses_B + self.core.user_text_loss(batch.user + 1, *drawn)


MODEL = Hem
