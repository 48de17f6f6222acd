"""QEM, the query embedding model: what product search reaches without the user. A baseline of Ai et al. ("A
Zero Attention Model for Personalized Product Search", CIKM 2019), in the form of the public code of Bi et al.
("A Transformer-based Embedding Model for Personalized Product Search", SIGIR 2020).

    q = tanh(W · mean of the query's word vectors + b);  s = q · e
    L = L_rank + L_text (layers/product_search.py)

Departs from the public code in what layers/product_search.py says.
"""

from typing import Literal

from torch import Tensor

from data_shards import settings as s
from trainer.batch import Batch
from trainer.models.contract import World
from trainer.models.layers.product_search import ProductSearch, ProductSearchCore, ProductSearchSettings


@s.settings
class QemSettings(ProductSearchSettings):
    name: Literal["qem"] = "qem"
    """the query alone: no user, no history"""


class QemCore(ProductSearchCore):
    """Query words [B, Q] → M = q [B, D]."""

    def __init__(self, world: World, settings: QemSettings) -> None:
        super().__init__(world.num_items, world.num_terms, settings)

    def forward(self, words_BQ: Tensor) -> Tensor:
        return self.encode_query(words_BQ)


class Qem(ProductSearch):
    """Search only."""

    Settings = QemSettings
    Core = QemCore
    title = "QEM"

    def question(self, batch: Batch) -> Tensor:
        question_BD: Tensor = self.core(self.query_words(batch.query))
        return question_BD


MODEL = Qem
