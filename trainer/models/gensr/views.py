"""What a GenSR offers to retrieval: its two views of the items, asked with a query or the mean over a
history."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from data_shards.schema import REC, SRC
from trainer.batch import Batch
from trainer.models.contract import View

if TYPE_CHECKING:
    from trainer.models.gensr.model import GenSR

CF_SHARE = {REC: 0.75, SRC: 0.25}  # of the candidates, if both views have enough; measured: docs/RESULTS.md


def gensr_views(model: "GenSR") -> dict[str, View]:
    """cf: LightGCN vectors, asked with the mean over the history; items without training clicks have none.
    semantic: E_s of the item's text, asked with the query if it has a known word, else with the mean over the
    history; it finds new items, too."""

    def cf_items(rows: Tensor) -> Tensor:
        return model.tables.cf[rows].float()

    def ask_cf(batch: Batch, mean: Tensor) -> Tensor:
        return _history_mean(F.normalize(cf_items(batch.history_items), dim=-1, eps=1e-12), batch)

    def semantic_items(rows: Tensor) -> Tensor:
        return model.semantic_vectors(rows, model.world.data.item_tokens).float()

    def ask_semantic(batch: Batch, mean: Tensor) -> Tensor:
        raw_BND = semantic_items(batch.history_items)
        centred_BND = (raw_BND - mean) * raw_BND.any(-1, keepdim=True)
        by_history_BD = _history_mean(F.normalize(centred_BND, dim=-1, eps=1e-12), batch)
        by_query_BD = model.query_parts(batch.query)[2].float()  # as it is: it lacks what all texts share
        return by_history_BD.where(~by_query_BD.any(1, keepdim=True), by_query_BD)

    by_semantics = {task: 1.0 - share for task, share in CF_SHARE.items()}
    return {
        "cf": View(model.tables.cf.shape[1], cf_items, ask_cf, CF_SHARE, whole_history=True),
        "semantic": View(
            model.backbone.width,
            semantic_items,
            ask_semantic,
            by_semantics,
            centred=True,
            whole_history=True,
        ),
    }


def _history_mean(vectors_BNW: Tensor, batch: Batch) -> Tensor:
    """Mean over the real items of each history, [B, W]; 0 without any."""
    mask_BN1 = batch.history_mask[..., None]
    return (vectors_BNW * mask_BN1).sum(1) / mask_BN1.sum(1).clamp(min=1)
