"""BM25 (Robertson & Zaragoza 2009) of the query against the text of each candidate.

Index: bm25s in Lucene's variant, by default with bm25s' k1 = 1.5 and b = 0.75. Terms: lower-cased words of
the texts, or anonymised words where the data has them. Only candidates are scored: the cost depends on their
terms, not on the catalogue. It reads the prepared folder's texts, so it is evaluated there and not
registered.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from itertools import chain
from typing import Literal

import bm25s
import numpy as np
import torch
from bm25s.tokenization import Tokenized
from scipy import sparse
from torch import Tensor

from data_shards import settings as s
from data_shards.schema import PAD, SRC
from trainer.batch import Batch
from trainer.config import ModelSettings, NonNegativeFloat, Share
from trainer.models.contract import Ranker

_WORD = re.compile(r"\w+")


@s.settings
class Bm25Settings(ModelSettings):
    name: Literal["bm25"] = "bm25"
    """words of the query in the item's text"""
    k1: NonNegativeFloat = 1.5
    """how far a repeated word still counts"""
    b: Share = 0.75
    """how much a long text is discounted: 0 not at all, 1 in proportion"""


class Bm25(Ranker):
    """Counted, not trained. Search only."""

    Settings = Bm25Settings
    title = "BM25"
    tasks = (SRC,)
    needs = frozenset({"texts"})
    trained = False
    settings: Bm25Settings

    def score(self, batch: Batch) -> Tensor:
        """Events without a query score 0 everywhere."""
        num_events, num_candidates = batch.candidates.shape
        item_weights, _ = self._index
        items_R = item_weights[batch.candidates.reshape(-1).cpu().numpy()]  # R = B·C rows
        queries_R = self._counts(batch)[np.repeat(np.arange(num_events), num_candidates)]
        scores = np.asarray(items_R.multiply(queries_R).sum(axis=1), dtype=np.float32)
        return torch.from_numpy(scores.reshape(num_events, num_candidates)).to(batch.candidates.device)

    def score_catalogue(self, batch: Batch) -> Tensor:
        item_weights, _ = self._index
        scores_BI = (self._counts(batch) @ item_weights.T).toarray().astype(np.float32)
        return torch.from_numpy(scores_BI).to(batch.candidates.device)

    def _counts(self, batch: Batch) -> sparse.csr_matrix:
        """[B, V] how often each term occurs in the queries of the events; 0 without a query."""
        item_weights, vocabulary = self._index
        rows = batch.query.tolist()
        if self.world.num_words:
            query_words = self.tables.query_words.cpu()
            terms = [_word_ids(query_words[row : row + 1])[0] if row >= 0 else [] for row in rows]
        else:
            texts = [self.query_text(row) for row in rows]
            terms = [[vocabulary[w] for w in _words(text) if w in vocabulary] for text in texts]
        return _count_matrix(terms, item_weights.shape[1])

    @cached_property
    def _index(self) -> tuple[sparse.csr_matrix, dict[str, int]]:
        """[I, V] what an item scores for one occurrence of a term in the query; the number of each term (of
        anonymised words it is the word itself)."""
        if self.world.num_words:
            return self._weights(_word_ids(self.tables.item_words), self.world.num_words + 1), {}
        vocabulary: dict[str, int] = {}
        item_terms = [
            [vocabulary.setdefault(w, len(vocabulary)) for w in _words(text)]
            for text in self.world.texts()[0]
        ]
        return self._weights(item_terms, len(vocabulary)), vocabulary

    def probability(self, scores: Tensor) -> Tensor:
        """Not a probability: score / (1 + score), so that answers lie in [0, 1)."""
        return scores / (1 + scores)

    def _weights(self, item_terms: list[list[int]], num_terms: int) -> sparse.csr_matrix:
        return _term_weights(item_terms, num_terms, self.settings.k1, self.settings.b)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _word_ids(words: Iterable[Tensor]) -> list[list[int]]:
    return [[word for word in row.tolist() if word != PAD] for row in words]


def _term_weights(item_terms: list[list[int]], num_terms: int, k1: float, b: float) -> sparse.csr_matrix:
    if num_terms == 0 or not any(item_terms):
        return sparse.csr_matrix((len(item_terms), num_terms), dtype=np.float32)
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(
        Tokenized(ids=item_terms, vocab={str(term): term for term in range(num_terms)}),
        create_empty_token=False,
        show_progress=False,
    )
    by_term = index.scores
    shape = (len(item_terms), len(by_term["indptr"]) - 1)
    weights = sparse.csc_matrix((by_term["data"], by_term["indices"], by_term["indptr"]), shape=shape).tocsr()
    weights.resize(len(item_terms), num_terms)
    return weights


def _count_matrix(rows: list[list[int]], num_terms: int) -> sparse.csr_matrix:
    starts = np.cumsum([0, *map(len, rows)])
    terms = np.fromiter(chain.from_iterable(rows), np.int64, count=int(starts[-1]))
    counts = sparse.csr_matrix((np.ones(len(terms), np.float32), terms, starts), shape=(len(rows), num_terms))
    counts.sum_duplicates()
    return counts


MODEL = Bm25
