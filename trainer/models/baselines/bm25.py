"""BM25 (Robertson & Zaragoza 2009) of the query against the text of each candidate.

Index: bm25s with its defaults, Lucene's variant, k1 = 1.5, b = 0.75. Terms: lower-cased words of
catalog/items.parquet and queries.parquet, or the anonymised words of item_words and query_words. Only
candidates are scored: the cost depends on their terms, not on the catalogue.
"""

import re
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import bm25s
import numpy as np
import pyarrow.parquet as pq
import torch
from bm25s.tokenization import Tokenized
from scipy import sparse
from torch import Tensor

from data_shards.matrices import matrix_parts
from data_shards.schema import PAD, Manifest
from trainer.batch import Batch

K1, B = 1.5, 0.75
_WORD = re.compile(r"\w+")


class Bm25:
    """Scorer of search events. item_terms, query_terms: for each item and query its term ids in [0,
    num_terms), with repetitions."""

    def __init__(self, item_terms: list[list[int]], query_terms: list[list[int]], num_terms: int) -> None:
        # [I, V] CSR: what an item scores for one occurrence of a term in the query
        self.item_weights = _term_weights(item_terms, num_terms)
        self.query_counts = _count_matrix(query_terms, num_terms)  # [Q, V] CSR

    def __call__(self, batch: Batch) -> Tensor:
        """→ [B, C] float32. Events without a query score 0 everywhere."""
        num_events, num_candidates = batch.candidates.shape
        query_B = batch.query.cpu().numpy()
        items_R = self.item_weights[batch.candidates.reshape(-1).cpu().numpy()]  # R = B·C rows
        queries_R = self.query_counts[np.repeat(np.maximum(query_B, 0), num_candidates)]
        scores_BC = np.asarray(items_R.multiply(queries_R).sum(axis=1), dtype=np.float32).reshape(
            num_events, num_candidates
        )
        scores_BC[query_B < 0] = 0.0
        return torch.from_numpy(scores_BC)


def build_bm25(folder: str | Path, manifest: Manifest) -> Callable[[Batch], Tensor]:
    catalog = Path(folder) / "catalog"
    if manifest.num_words:
        sizes = (("item", manifest.num_items), ("query", manifest.num_queries))
        item_terms, query_terms = (
            _word_ids(matrix_parts(catalog, f"{name}_words", rows)) for name, rows in sizes
        )
        return Bm25(item_terms, query_terms, manifest.num_words + 1)
    vocabulary: dict[str, int] = {}
    item_terms = [
        [vocabulary.setdefault(word, len(vocabulary)) for word in _words(text)]
        for text in _texts(catalog / "items.parquet")
    ]
    query_terms = [
        [vocabulary[word] for word in _words(text) if word in vocabulary]
        for text in _texts(catalog / "queries.parquet")
    ]
    return Bm25(item_terms, query_terms, len(vocabulary))


def _texts(path: Path) -> Iterable[str]:
    for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
        yield from batch.column(0).to_pylist()


def _words(text: str | None) -> list[str]:
    return _WORD.findall((text or "").lower())


def _word_ids(parts: list[np.ndarray]) -> list[list[int]]:
    return [[word for word in row.tolist() if word != PAD] for words in parts for row in words]


def _term_weights(item_terms: list[list[int]], num_terms: int) -> sparse.csr_matrix:
    if num_terms == 0 or not any(item_terms):
        return sparse.csr_matrix((len(item_terms), num_terms), dtype=np.float32)
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
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
