"""Models of sequences whose score is h · e: a vector of the history times the vector of an item."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from data_shards.schema import REC
from trainer.batch import Batch
from trainer.models.contract import Ranker
from trainer.models.layers.embedding import ItemTable, inner_products


class NextItemRanker(Ranker):
    """Recommendation only. Must: `core` with a table `items`, and hidden()."""

    tasks = (REC,)
    core: Any

    def hidden(self, batch: Batch) -> Tensor:
        """The vector of each event's history, [B, D]."""
        raise NotImplementedError

    def score(self, batch: Batch) -> Tensor:
        return inner_products(self.hidden(batch), self.core.items(batch.candidates + 1))

    def score_catalogue(self, batch: Batch) -> Tensor:
        scores_BI: Tensor = self.core.items(scores_of=self.hidden(batch))
        return scores_BI


def next_item_loss(
    items: ItemTable, hidden_BD: Tensor, target_B: Tensor, with_padding: bool = False
) -> Tensor:
    """Mean cross-entropy over all items, target_B: ids. with_padding: the padding row takes part in the
    softmax, as RecBole has it."""
    logits = items(scores_of=hidden_BD, with_padding=with_padding)
    return F.cross_entropy(logits, target_B if with_padding else target_B - 1)
