"""NRHUB (Wu et al., "Neural News Recommendation with Heterogeneous User Behavior", EMNLP-IJCNLP 2019), in the
form of Si et al., "A Model-Agnostic Causal Learning Framework for Recommendation using Search Data" (WWW
2022), which works without texts.

    pool(X) = Σ_j softmax_j(v · tanh(U x_j + b)) x_j
    three views of a user: queries, items clicked in search, items clicked in recommendation, a pool each
    y = tanh(W pool + b), the same map for the three;  user = pool(y_1, y_2, y_3)
    item = tanh(W' e + b');  s = item · user

loss=bce (default): mean over the clicked item and the negatives. loss=softmax: the 2019 paper's, the clicked
item among the event's candidates.

Differs from the public code: the tables of items and queries are learned, not taken from elsewhere and
frozen. They start from N(0, .01), maps xavier normal and biases at 0 (there uniform): next to vectors of .02,
such biases made all users alike. A view without clicks pools to 0, where the code takes the mean of padding
vectors. A query that the folder does not know is in no view.
Shapes: ids [B, N] with 0 = padding anywhere, user [B, U], items [B, C, U], scores [B, C] (log-odds).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import REC
from trainer.batch import Batch
from trainer.config import ModelSettings, Positive
from trainer.models.contract import Ranker, World
from trainer.models.layers.attention import AdditivePooling
from trainer.models.layers.embedding import ItemTable, inner_products
from trainer.models.layers.history import slot_ids
from trainer.models.layers.mlp import init_xavier

CATALOGUE_SLICE = 65_536  # items mapped at once for the whole catalogue: 52 MB at a width of 200


@s.settings
class NrhubSettings(ModelSettings):
    name: Literal["nrhub"] = "nrhub"
    """three views of a user's clicks and queries"""
    dim: Positive = 64
    """width of item and query vectors"""
    hidden_dim: Positive = 200
    """width of the user, of mapped items, and inside the pool of each view"""
    view_dim: Positive = 100
    """width inside the pool over the three views"""
    loss: Literal["bce", "softmax"] = "bce"
    """bce: each candidate alone; softmax: the clicked one among an event's candidates, as in 2019"""


class NrhubCore(nn.Module):
    """Queries, search clicks and browsed items of a user by id → user; ids of items → items."""

    def __init__(self, num_items: int, num_queries: int, settings: NrhubSettings) -> None:
        super().__init__()
        dim, hidden = settings.dim, settings.hidden_dim
        self.items, self.queries = ItemTable(num_items, dim, std=0.1), ItemTable(num_queries, dim, std=0.1)
        self.query_pool, self.click_pool, self.browse_pool = (AdditivePooling(dim, hidden) for _ in range(3))
        self.view_map, self.item_map = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.view_pool = AdditivePooling(hidden, settings.view_dim)
        self.apply(init_xavier)

    def forward(self, queries_BN: Tensor, clicks_BN: Tensor, browsed_BN: Tensor) -> Tensor:
        """→ user [B, U]. The three lists may differ in length."""
        views = [
            self.query_pool(self.queries(queries_BN), queries_BN != 0),
            self.click_pool(self.items(clicks_BN), clicks_BN != 0),
            self.browse_pool(self.items(browsed_BN), browsed_BN != 0),
        ]
        views_B3U = self.view_map(torch.stack(views, 1)).tanh()
        # also a view without clicks is looked at: its y = tanh(b) says that there are none
        everything = torch.ones(views_B3U.shape[:2], dtype=torch.bool, device=views_B3U.device)
        user_BU: Tensor = self.view_pool(views_B3U, everything)
        return user_BU

    def item_vectors(self, ids: Tensor) -> Tensor:
        """[…] → […, U]"""
        vectors: Tensor = self.item_map(self.items(ids)).tanh()
        return vectors


class Nrhub(Ranker):
    """Recommendation, with searches in the history."""

    Settings = NrhubSettings
    title = "NRHUB"
    tasks = (REC,)
    needs = frozenset({"history_queries"})
    settings: NrhubSettings

    def __init__(self, settings: NrhubSettings, world: World) -> None:
        super().__init__(settings, world)
        self.core = NrhubCore(world.num_items, world.num_queries, settings)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scores_BC = self.score(batch)
        if self.settings.loss == "softmax":
            return F.cross_entropy(scores_BC, batch.labels.argmax(1)), {}
        return F.binary_cross_entropy_with_logits(scores_BC, batch.labels), {}

    def score(self, batch: Batch) -> Tensor:
        return inner_products(self._users(batch), self.core.item_vectors(batch.candidates + 1))

    def score_catalogue(self, batch: Batch) -> Tensor:
        user_BU, parts = self._users(batch).float(), []
        for ids in torch.arange(1, 1 + self.world.num_items, device=user_BU.device).split(CATALOGUE_SLICE):
            items_IU = self.core.item_vectors(ids).float()
            with torch.autocast(items_IU.device.type, enabled=False):
                parts.append(user_BU @ items_IU.T)
        return torch.cat(parts, 1)

    def _users(self, batch: Batch) -> Tensor:
        items_BN, queries_BN = slot_ids(batch), batch.history_queries + 1  # an unknown query is 0
        clicks_BN, browsed_BN = items_BN * batch.searched, items_BN * batch.browsed
        user_BU: Tensor = self.core(queries_BN * batch.searched, clicks_BN, browsed_BN)
        return user_BU


MODEL = Nrhub
