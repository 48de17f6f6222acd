"""LightGCN's vectors, for models that read the CF table: in training, and for retrieval."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.batch import Batch
from trainer.models.contract import Ranker, View
from trainer.models.layers.attention import masked_mean


def held_out_cf(model: Ranker, items: Tensor, fold_B: Tensor) -> Tensor:
    """CF vectors of items [B, X] → [B, X, K]; in training, each event's from the table that never saw its
    click (fold −1: the full table)."""
    tables = model.tables
    if tables.cf_folds.shape[0] == 0 or not model.training:
        return tables.cf[items]
    held_out = tables.cf_folds[fold_B.clamp(min=0)[:, None], items]
    return torch.where((fold_B >= 0)[:, None, None], held_out, tables.cf[items])


def cf_view(model: Ranker, share: Mapping[int, float]) -> View:
    """Asked with the mean over the history's unit vectors; items without training clicks have none. share: of
    the candidates that come from this view, by task."""

    def items(rows: Tensor) -> Tensor:
        vectors: Tensor = model.tables.cf[rows]
        return vectors.float()

    def ask(batch: Batch, mean: Tensor) -> Tensor:
        unit_BNK = F.normalize(items(batch.history_items), dim=-1)
        return masked_mean(unit_BNK, batch.history_mask)

    return View(model.tables.cf.shape[1], items, ask, share, whole_history=True)
