"""The items of the category that a query names: what mined negatives are drawn from, and what retrieval adds
to a search."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.batch import Batch, ItemTables
from trainer.models.gensr.evidence import Evidence, text_key


@dataclass(frozen=True)
class CategoryItems:
    """Items by category, on one device; categories of the same words are one."""

    key: Tensor  # [K] int64, sorted: categories by the hash of their words
    start: Tensor  # [K] int64, where a category's items begin in `items`
    size: Tensor  # [K] int64
    items: Tensor  # item rows by category

    @classmethod
    def of(cls, tables: ItemTables, evidence: Evidence) -> "CategoryItems":
        keys = evidence.category_key.cpu()
        levels_IT = tables.item_category.cpu().long()
        item, level = (keys[levels_IT] != 0).nonzero(as_tuple=True)
        pairs = torch.stack([keys[levels_IT[item, level]], item], 1).unique(dim=0)
        key, size = pairs[:, 0].unique_consecutive(return_counts=True)
        parts = (key, size.cumsum(0) - size, size, pairs[:, 1])
        return cls(*(part.to(tables.device) for part in parts))

    def asked(self, batch: Batch, tables: ItemTables) -> tuple[Tensor, Tensor]:
        """Place of each event's category in `key` [B], and whether its query names one."""
        if not len(self.key):
            return torch.zeros_like(batch.query), torch.zeros_like(batch.query, dtype=torch.bool)
        key_B = text_key(tables.query_tokens[batch.query.clamp(min=0)].long())
        place_B = torch.searchsorted(self.key, key_B).clamp(max=len(self.key) - 1)
        return place_B, (self.key[place_B] == key_B) & (batch.query >= 0)

    def items_at(self, place: int) -> Tensor:
        start = int(self.start[place])
        return self.items[start : start + int(self.size[place])]
