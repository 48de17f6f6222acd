"""What a GenSR offers to retrieval: its two views of the items, asked with a query or the mean over a
history; and with evidence, items that only counting finds, and an order among all of them."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards.schema import REC, SRC
from trainer.batch import Batch
from trainer.models.cf_view import cf_view
from trainer.models.contract import PreRanking, View
from trainer.models.gensr.category_items import CategoryItems
from trainer.models.layers.attention import masked_mean

if TYPE_CHECKING:
    from trainer.models.gensr.model import GenSR

PROPOSED = 400  # items of each kind: neighbours, followers, the popular, the category's
CF_SHARE = {REC: 0.75, SRC: 0.25}  # of the candidates, if both views have enough; measured: docs/RESULTS.md


def gensr_views(model: "GenSR") -> dict[str, View]:
    """cf: LightGCN vectors, asked with the mean over the history; items without training clicks have none.
    semantic: E_s of the item's text, asked with the query if it has a known word, else with the mean over the
    history; it finds new items, too."""

    def semantic_items(rows: Tensor) -> Tensor:
        return model.semantic_vectors(rows, model.world.data.item_tokens).float()

    def ask_semantic(batch: Batch, mean: Tensor) -> Tensor:
        raw_BND = semantic_items(batch.history_items)
        centred_BND = (raw_BND - mean) * raw_BND.any(-1, keepdim=True)
        by_history_BD = masked_mean(F.normalize(centred_BND, dim=-1), batch.history_mask)
        by_query_BD = model.query_parts(batch.query)[2].float()  # as it is: it lacks what all texts share
        return by_history_BD.where(~by_query_BD.any(1, keepdim=True), by_query_BD)

    by_semantics = {task: 1.0 - share for task, share in CF_SHARE.items()}
    return {
        "cf": cf_view(model, CF_SHARE),
        "semantic": View(
            model.backbone.width,
            semantic_items,
            ask_semantic,
            by_semantics,
            centred=True,
            whole_history=True,
        ),
    }


def gensr_pre_ranking(model: "GenSR") -> PreRanking | None:
    """Neighbours and followers of the history, the most clicked items, and of a search those of the category
    that its query names; all in the order of the evidence's own log-odds. None without evidence."""
    evidence = model.evidence
    if evidence is None or not model.reads_evidence:
        return None
    popular = evidence.users.topk(min(PROPOSED, len(evidence.users))).indices
    categories = CategoryItems.of(model.tables, evidence)

    def propose(batch: Batch) -> Tensor:
        place_B, known_B = categories.asked(batch, model.tables)
        parts = [
            torch.cat([popular, *evidence.neighbours_of(batch.rows(row, row + 1), PROPOSED)])
            for row in range(batch.num_events)
        ]
        for row in known_B.nonzero()[:, 0].tolist():
            items = categories.items_at(int(place_B[row]))
            best = evidence.users[items].topk(min(PROPOSED, len(items))).indices
            parts[row] = torch.cat([parts[row], items[best]])
        return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=len(evidence.users))

    def score(batch: Batch) -> Tensor:
        seen = model.seen(batch)
        assert seen is not None  # a model with evidence
        log_odds_BC: Tensor = model.evidence_head(seen.features_BCF, batch.task)[1]
        return log_odds_BC

    return PreRanking(propose, score)
