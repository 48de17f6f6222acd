"""Models of sequences whose score is h · e: a vector of the history times the vector of an item."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from data_shards import settings as s
from data_shards.schema import REC
from trainer.batch import Batch
from trainer.models.contract import Ranker
from trainer.models.layers.embedding import inner_products
from trainer.models.layers.history import HistorySettings, history_ids


@s.settings
class NextItemSettings(HistorySettings):
    """Of models whose loss is a softmax over all items."""

    softmax_over_padding: bool = False
    """the softmax over all items has a column for padding, as published"""


class NextItemRanker(Ranker):
    """Recommendation only. Required: `core` with a table `items`, and hidden()."""

    tasks = (REC,)
    settings: Any  # of the subclass
    core: Any

    def hidden(self, batch: Batch) -> Tensor:
        """The vector of each event's history, [B, D]."""
        raise NotImplementedError

    def score(self, batch: Batch) -> Tensor:
        return inner_products(self.hidden(batch), self.core.items(batch.candidates + 1))

    def score_catalogue(self, batch: Batch) -> Tensor:
        scores_BI: Tensor = self.core.items(scores_of=self.hidden(batch))
        return scores_BI

    def next_item(self, hidden_BD: Tensor, target_B: Tensor) -> Tensor:
        """Mean cross-entropy over all items. target: ids. For models with NextItemSettings."""
        with_padding = self.settings.softmax_over_padding
        logits = self.core.items(scores_of=hidden_BD, with_padding=with_padding)
        return F.cross_entropy(logits, target_B if with_padding else target_B - 1)

    def history(self, batch: Batch) -> Tensor:
        """Ids of the clicks that are read [B, N], for models with HistorySettings."""
        return history_ids(batch, self.settings.history, self.world.data.history_max)
