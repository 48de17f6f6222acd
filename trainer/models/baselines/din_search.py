"""DIN with a history of search: the form that the authors of SESRec and UniSAR compare with (Si et al., "A
Model-Agnostic Causal Learning Framework for Recommendation using Search Data", WWW 2022, public code).

    three interest units (din.py, variant group): queries, items clicked after a search, items clicked
        elsewhere
    s = MLP([v, u_queries, u_search, u_browsed]), log-odds of a click
    L = BCE, mean over the candidates

Differs from the published code: a query is the mean of the vectors of its words, where that has a table of
queries; padding is left out of the norms' statistics (norm_over_padding=true counts it). A search whose
query the folder does not know counts among the search clicks only.
Shapes: ids [B, N] padded at the end with 0, query words [B, N, W], candidates [B, C], scores [B, C].
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import REC
from trainer.batch import Batch, query_terms_of
from trainer.config import ModelSettings, Positive
from trainer.models.baselines.din import Head, InterestUnit
from trainer.models.contract import GatherRows, Ranker, World
from trainer.models.layers.embedding import ItemTable, WordMean
from trainer.models.layers.history import pack, slot_ids
from trainer.models.layers.mlp import init_xavier


@s.settings
class DinSearchSettings(ModelSettings):
    name: Literal["din_search"] = "din_search"
    """attention of the candidate to queries, search clicks and browsed items"""
    dim: Positive = 64
    """width of item and word vectors"""
    attention_dims: tuple[int, ...] = (64, 16)
    """inner widths of each attention unit"""
    head_dims: tuple[int, ...] = (200, 80)
    """inner widths of the head"""
    norm_over_padding: bool = False
    """padding of a history counts in the norm's statistics, as published"""


class DinSearchCore(nn.Module):
    """Three histories and candidate ids [B, C] → log-odds [B, C]."""

    def __init__(
        self, num_items: int, num_words: int, settings: DinSearchSettings, gather: GatherRows | None = None
    ) -> None:
        super().__init__()
        dim = settings.dim
        self.items, self.words = ItemTable(num_items, dim), WordMean(num_words, dim)
        self.of_queries, self.of_searches, self.of_browsed = (
            InterestUnit(dim, settings.attention_dims, "group", gather, settings.norm_over_padding)
            for _ in range(3)
        )
        self.head = Head(4 * dim, settings.head_dims, "group", gather)
        self.apply(init_xavier)
        for table in (self.items, self.words.words):
            nn.init.xavier_normal_(table.weight)
            with torch.no_grad():
                table.weight[0].zero_()

    def forward(
        self,
        query_words_BNW: Tensor,
        query_mask_BN: Tensor,
        searched_BN: Tensor,
        browsed_BN: Tensor,
        candidates_BC: Tensor,
    ) -> Tensor:
        v = self.items(candidates_BC)
        queries = self.of_queries(self.words(query_words_BNW), query_mask_BN, v)
        searched = self.of_searches(self.items(searched_BN), searched_BN != 0, v)
        browsed = self.of_browsed(self.items(browsed_BN), browsed_BN != 0, v)
        scores_BC: Tensor = self.head(torch.cat([v, queries, searched, browsed], -1))
        return scores_BC


class DinSearch(Ranker):
    """Recommendation only."""

    Settings = DinSearchSettings
    title = "DIN + search history"
    tasks = (REC,)
    in_batch = True  # its norms
    needs = frozenset({"history_queries"})
    settings: DinSearchSettings

    def __init__(self, settings: DinSearchSettings, world: World) -> None:
        super().__init__(settings, world)
        self.core = DinSearchCore(world.num_items, world.num_terms, settings, world.ranks.gather)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return F.binary_cross_entropy_with_logits(self.score(batch), batch.labels), {}

    def score(self, batch: Batch) -> Tensor:
        searched, browsed = (pack(slot_ids(batch), kept) for kept in (batch.searched, batch.browsed))
        queries = self._query_words(batch)
        scores_BC: Tensor = self.core(*queries, searched, browsed, batch.candidates + 1)
        return scores_BC

    def _query_words(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Words [B, N, W] and which slots have a query [B, N]."""
        known_BN = batch.searched & (batch.history_queries >= 0)
        return query_terms_of(self.tables, torch.where(known_BN, batch.history_queries, -1)), known_BN


MODEL = DinSearch
