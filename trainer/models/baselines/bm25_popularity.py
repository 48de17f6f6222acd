"""BM25 with popularity: s(q, i) = BM25(q, text of i) + weight · log(1 + training clicks of i).

Queries of a synthetic log give a category, and most of its items have the same words: popularity decides
between them. Counted, not trained. Search only. Events without a query are ranked by popularity.
"""

from typing import Literal

import torch
from torch import Tensor

from data_shards import settings as s
from trainer.batch import Batch
from trainer.config import NonNegativeFloat, Share
from trainer.models.baselines.bm25 import Bm25, Bm25Settings
from trainer.models.contract import World


@s.settings
class Bm25PopularitySettings(Bm25Settings):
    name: Literal["bm25_popularity"] = "bm25_popularity"  # type: ignore[assignment]
    """words of the query in the item's text, and clicks of the item"""
    k1: NonNegativeFloat = 0.5
    """how far a repeated word still counts; with b tuned on validation of Scientific, where item texts are
    short and lengths say little"""
    b: Share = 0.25
    """how much a long text is discounted: 0 not at all, 1 in proportion"""
    weight: NonNegativeFloat = 0.75
    """weight of log(1 + clicks) beside BM25; clicks of both tasks count"""


class Bm25Popularity(Bm25):
    Settings = Bm25PopularitySettings  # type: ignore[assignment]
    title = "BM25 + popularity"
    settings: Bm25PopularitySettings
    log_clicks: Tensor  # [I] float32

    def __init__(self, settings: Bm25PopularitySettings, world: World) -> None:
        super().__init__(settings, world)
        self.register_buffer("log_clicks", torch.zeros(world.num_items))

    def fit(self) -> None:
        clicks = torch.bincount(self.world.clicks().item, minlength=self.world.num_items)
        self.log_clicks.copy_(clicks.float().log1p())

    def score(self, batch: Batch) -> Tensor:
        return super().score(batch) + self.settings.weight * self.log_clicks[batch.candidates]

    def score_catalogue(self, batch: Batch) -> Tensor:
        return super().score_catalogue(batch) + self.settings.weight * self.log_clicks


MODEL = Bm25Popularity
