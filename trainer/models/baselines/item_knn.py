"""Item-to-item nearest neighbours (Sarwar et al., WWW 2001): what the people who clicked this also clicked.

    sim(i, j) = |U_i ∩ U_j| / (√(|U_i| |U_j|) + shrink)      U_i: users who clicked i in the training split
    s(u, i)   = Σ_j decay^age(j) · sim(j, i)                    j over the history, age 0 = the newest

Each item keeps its nearest neighbours only. Nothing is trained: it is counted once. An item nobody clicked
has no neighbours, and an empty history scores 0 everywhere. Recommendation only.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data_shards import settings as s
from data_shards.schema import REC
from trainer.batch import Batch
from trainer.config import ModelSettings, NonNegativeFloat, Positive, Share
from trainer.models.contract import Ranker, World
from trainer.models.layers.history import ages
from trainer.models.layers.neighbours import click_matrix, common_users, keep_nearest, looked_up


@s.settings
class ItemKnnSettings(ModelSettings):
    name: Literal["item_knn"] = "item_knn"
    """neighbours by common users"""
    shrink: NonNegativeFloat = 30.0
    """added to the denominator: how much a similarity of few users is distrusted"""
    decay: Share = 0.8
    """weight of a history item for each newer one"""
    num_neighbours: Positive = 200
    """nearest items that each item keeps"""
    clicks: Literal["rec", "all"] = "all"
    """clicks that are counted: of recommendations only, or of searches, too"""


class ItemKnn(Ranker):
    """Counted, not trained. I items, M neighbours."""

    Settings = ItemKnnSettings
    title = "item-kNN"
    tasks = (REC,)
    trained = False
    settings: ItemKnnSettings
    neighbours: Tensor  # [I, M] int32, ascending, num_items = none
    similarity: Tensor  # [I, M] float32

    def __init__(self, settings: ItemKnnSettings, world: World) -> None:
        super().__init__(settings, world)
        shape = (world.num_items, min(settings.num_neighbours, max(world.num_items - 1, 1)))
        self.register_buffer("neighbours", torch.full(shape, world.num_items, dtype=torch.int32))
        self.register_buffer("similarity", torch.zeros(shape))

    def fit(self) -> None:
        clicked_IU = click_matrix(self.world.clicks(), self.settings.clicks, self.world).T.tocsr()
        users_I = np.asarray(clicked_IU.sum(1)).ravel()
        for row, other, common in common_users(clicked_IU, self.world.report):
            norm = np.sqrt(users_I[row] * users_I[other]) + self.settings.shrink
            self._keep_nearest(row, other, common / norm)

    def _keep_nearest(self, row: np.ndarray, other: np.ndarray, similarity: np.ndarray) -> None:
        keep_nearest(self.neighbours, self.similarity, row, other, similarity, similarity)

    def score(self, batch: Batch) -> Tensor:
        similarity_BNC = looked_up(self.neighbours, self.similarity, batch.history_items, batch.candidates)
        return (similarity_BNC * self._weights(batch)[..., None]).sum(1)

    def score_catalogue(self, batch: Batch) -> Tensor:
        neighbours_BNM = self.neighbours[batch.history_items].long()
        weighted_BNM = self.similarity[batch.history_items] * self._weights(batch)[..., None]
        scores = weighted_BNM.new_zeros((batch.num_events, self.world.num_items + 1))
        return scores.scatter_add_(1, neighbours_BNM.flatten(1), weighted_BNM.flatten(1))[:, :-1]

    def _weights(self, batch: Batch) -> Tensor:
        """decay^age, [B, N] float32; 0 for padding."""
        return self.settings.decay ** ages(batch.history_mask) * batch.history_mask

    def probability(self, scores: Tensor) -> Tensor:
        """Not a probability: similarity mass / (1 + mass), so that answers lie in [0, 1)."""
        return scores / (1 + scores)


MODEL = ItemKnn
