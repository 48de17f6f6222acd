"""The category of the query, and an order within it: what a keyword search over a shop's tree of categories
gives.

    s(q, i) = 2 [i lies in the category] + 1 [it is i's last category] + order(i) in (0, 1)

The query's category is the one whose names, from the root down, are the query's words; else the deepest of
those whose words all occur in the query (of equals the one with more words, then the first). Words are those
of data_shards/sources/amazon.py: lower-cased, without stop words and repetitions. On Amazon data, whose
queries are synthesised from category paths, this is nearly the answer: compare learned models with it.
Categories with the same words in different places are one.

by=popularity: training clicks of the item, both tasks. by=cf: inner product of its LightGCN vector with the
mean of the history's; the order is then the user's own. Where nothing of a tree occurs in the query, or in a
log of anonymised words, the order alone remains. Counted, not trained. Search only.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from data_shards import settings as s
from data_shards.schema import SRC
from data_shards.sources.amazon import category_query
from trainer.batch import Batch
from trainer.config import ModelSettings
from trainer.models.contract import Ranker, World
from trainer.models.layers.attention import masked_mean


@s.settings
class CategorySettings(ModelSettings):
    name: Literal["category"] = "category"
    """exact category of the query, then popularity or taste"""
    by: Literal["popularity", "cf"] = "popularity"
    """what orders the items of one category: training clicks, or the history's mean LightGCN vector"""


class Category(Ranker):
    """B events, C candidates, I items, T levels of the tree."""

    Settings = CategorySettings
    title = "category"
    tasks = (SRC,)
    needs = frozenset({"item_category", "texts"})  # by=cf: cf, too
    trained = False
    settings: CategorySettings
    share: Tensor  # [I] log clicks as a share of the largest, below 1
    same_words: Tensor  # [1 + num_categories] the first category with the same words; 0: none

    def __init__(self, settings: CategorySettings, world: World) -> None:
        super().__init__(settings, world)
        self.register_buffer("share", torch.zeros(world.num_items))
        self.register_buffer("same_words", torch.zeros(1 + world.num_categories, dtype=torch.int32))

    @classmethod
    def reads(cls, settings: ModelSettings) -> frozenset[str]:
        by_cf = isinstance(settings, CategorySettings) and settings.by == "cf"
        return cls.needs | {"cf"} if by_cf else cls.needs

    def fit(self) -> None:
        clicks = torch.bincount(self.world.clicks().item, minlength=self.world.num_items).float().log1p()
        self.share.copy_(clicks / (1 + clicks.max()))
        words, first = self._first
        self.same_words.copy_(torch.tensor([first.get(text, 0) for text in words], dtype=torch.int32))

    @cached_property
    def _first(self) -> tuple[list[str], dict[str, int]]:
        """Words of each category, and the first category with each."""
        words = [category_query(list(path)) for path in self.world.categories()]
        return words, {text: number for number, text in reversed(list(enumerate(words))) if text}

    @cached_property
    def _paths(self) -> "Paths":
        return Paths([(number, text.split()) for text, number in self._first[1].items()])

    def score(self, batch: Batch) -> Tensor:
        levels_BCT = self._categories(batch.candidates)
        wanted_B11 = self._wanted(batch)[:, None, None]
        return self._place(levels_BCT, wanted_B11) + self._order(batch, batch.candidates)

    def score_catalogue(self, batch: Batch) -> Tensor:
        everything = torch.arange(self.world.num_items, device=batch.candidates.device)
        levels_IT = self._categories(everything)
        place_BI = torch.stack([self._place(levels_IT, wanted) for wanted in self._wanted(batch)])
        return place_BI + self._order(batch, None)

    def _categories(self, items: Tensor) -> Tensor:
        """[…] → […, T], 0 below an item's last level."""
        return self.same_words[self.tables.item_category[items].long()]

    def _wanted(self, batch: Batch) -> Tensor:
        """The category of each event [B]; −1, which no item has, for none."""
        texts = [self.query_text(row) for row in batch.query.tolist()]
        found = {text: self._paths.find(category_query([text]).split()) for text in set(texts)}
        return torch.tensor([found[text] or -1 for text in texts], device=batch.query.device)

    def _place(self, levels: Tensor, wanted: Tensor) -> Tensor:
        """Levels […, T] → 0 elsewhere, 2 below the category, 3 in it: […] float32."""
        here = levels == wanted
        last = here & (torch.cat([levels[..., 1:], torch.zeros_like(levels[..., :1])], -1) == 0)
        return 2.0 * here.any(-1) + last.any(-1)

    def _order(self, batch: Batch, candidates: Tensor | None) -> Tensor:
        """In [0, 1): of candidates [B, C], or of all items."""
        if self.settings.by == "popularity":
            return self.share if candidates is None else self.share[candidates]
        taste_BK = masked_mean(self.tables.cf[batch.history_items], batch.history_mask)
        if candidates is None:
            match = taste_BK @ self.tables.cf.T
        else:
            match = torch.einsum("bk,bck->bc", taste_BK, self.tables.cf[candidates])
        return 0.5 + 0.49 * match / (1 + match.abs())  # keeps the order, and enough of float32's digits

    def probability(self, scores: Tensor) -> Tensor:
        """Not a probability: the score as a share of the largest."""
        return scores / 4


class Paths:
    """Categories by their words."""

    def __init__(self, categories: Sequence[tuple[int, Sequence[str]]]) -> None:
        """(category, its words from the root down): deeper ones have higher ids."""
        self.words_of = {number: frozenset(words) for number, words in categories}
        self.exact = {tuple(words): number for number, words in categories}
        self.by_word: dict[str, list[int]] = {}
        for number, words in self.words_of.items():
            for word in words:
                self.by_word.setdefault(word, []).append(number)

    def find(self, query: Sequence[str]) -> int:
        """The category of a query's words, 0 for none."""
        if tuple(query) in self.exact:
            return self.exact[tuple(query)]
        asked = set(query)
        near = {number for word in asked for number in self.by_word.get(word, ())}
        inside = [number for number in near if self.words_of[number] <= asked]
        return max(inside, key=lambda number: (len(self.words_of[number]), -number), default=0)


MODEL = Category
