"""Popularity: an item's number of training recommendation clicks, the same for every user."""

from typing import Literal

import torch
from torch import Tensor

from data_shards import settings as s
from data_shards.schema import REC
from trainer.batch import Batch
from trainer.config import ModelSettings
from trainer.models.contract import Ranker, World


@s.settings
class PopularitySettings(ModelSettings):
    name: Literal["popularity"] = "popularity"
    """training recommendation clicks of an item"""


class Popularity(Ranker):
    """Counted, not trained. Recommendation only."""

    Settings = PopularitySettings
    title = "popularity"
    tasks = (REC,)
    trained = False
    clicks: Tensor

    def __init__(self, settings: PopularitySettings, world: World) -> None:
        super().__init__(settings, world)
        self.register_buffer("clicks", torch.zeros(world.num_items))  # float32: exact up to 2^24 clicks

    def fit(self) -> None:
        clicks = self.world.clicks()
        self.clicks += torch.bincount(clicks.item[clicks.task == REC], minlength=self.world.num_items)

    def score(self, batch: Batch) -> Tensor:
        return self.clicks[batch.candidates]

    def score_catalogue(self, batch: Batch) -> Tensor:
        return self.clicks.expand(batch.num_events, -1)

    def probability(self, scores: Tensor) -> Tensor:
        """Share of the most popular item's clicks."""
        return scores / self.clicks.max().clamp(min=1)


MODEL = Popularity
