"""Negatives that are hard to tell from the clicked item, for validation and test events: what a simple
recommender would show. The clicked item plays no part, so nothing about it can be read from them.

search           items whose words match the query best: BM25 (Robertson & Zaragoza 2009) with Lucene's idf
recommendation   neighbours of the history's items: cosine of training clicks (Sarwar et al. 2001), summed

Items that the user has interacted with, in any split or task, are left out. Where fewer items have a score
above 0 than are wanted, uniform ones fill up.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy import sparse

from data_shards.histories import ragged_rows
from data_shards.negatives import KeySet, user_item_keys
from data_shards.schema import SRC
from data_shards.split import TRAIN
from data_shards.write import EventColumns

K1, B = 1.5, 0.75  # as in the baseline bm25 of the trainer
CLICKS_OF_USER = 100  # newest training clicks that make neighbours: pairs grow with their square
NEIGHBOURS = 100  # of an item
MAX_SCORES = 4_000_000  # held at once: 48 MB
RULES = {
    "src": f"BM25 of the query and the item's text, k1 {K1}, b {B}",
    "rec": "sum over the history of the cosine of training clicks; "
    f"{NEIGHBOURS} nearest of each item, newest {CLICKS_OF_USER} clicks of each user",
}
_WORD = re.compile(r"\w+")


# ---- scores ------------------------------------------------------------------------------------------------


def read_texts(path: Path) -> Iterator[str]:
    """Column text of a catalogue file."""
    for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
        yield from (text or "" for text in batch.column(0).to_pylist())


def count_words(
    item_texts: Iterable[str], query_texts: Iterable[str]
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """How often each item [I, V] and each query [Q, V] has each word of the items' texts."""
    ids: dict[str, int] = {}
    items = [[ids.setdefault(word, len(ids)) for word in words(text)] for text in item_texts]
    queries = [[ids[word] for word in words(text) if word in ids] for text in query_texts]
    return _counts(items, len(ids)), _counts(queries, len(ids))


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _counts(rows: list[list[int]], width: int) -> sparse.csr_matrix:
    starts = np.cumsum([0, *map(len, rows)])
    columns = np.fromiter(chain.from_iterable(rows), np.int64, count=int(starts[-1]))
    counts = sparse.csr_matrix((np.ones(len(columns)), columns, starts), shape=(len(rows), max(width, 1)))
    counts.sum_duplicates()
    return counts


def bm25_weights(counts_IV: sparse.csr_matrix) -> sparse.csr_matrix:
    """[V, I]: what an item scores for one occurrence of a word in the query."""
    num_items = counts_IV.shape[0]
    length = np.asarray(counts_IV.sum(axis=1)).ravel()
    with_word = np.bincount(counts_IV.indices, minlength=counts_IV.shape[1])
    idf = np.log1p((num_items - with_word + 0.5) / (with_word + 0.5))
    item = np.repeat(np.arange(num_items), np.diff(counts_IV.indptr))
    damped = counts_IV.data + K1 * (1 - B + B * length[item] / max(length.mean(), 1e-9))
    weights = idf[counts_IV.indices] * counts_IV.data / damped
    by_item = sparse.csr_matrix((weights, counts_IV.indices, counts_IV.indptr), shape=counts_IV.shape)
    return by_item.T.tocsr()


def neighbours(user: np.ndarray, item: np.ndarray, num_items: int) -> sparse.csr_matrix:
    """Clicks [n], users ascending and each one's clicks oldest first → [I, I]: for each item the NEIGHBOURS
    others of largest cosine |users of both| / √(|users of one| · |users of the other|); ties to the lower
    row."""
    end = np.searchsorted(user, user, side="right")  # behind the user's last click
    newest = end - np.arange(len(user)) <= CLICKS_OF_USER
    pairs = user_item_keys(user[newest], item[newest], num_items)
    of_user, of_item = pairs // num_items, pairs % num_items
    shape = (int(user.max(initial=-1)) + 1, num_items)
    by_user = sparse.csr_matrix((np.ones(len(pairs)), (of_user, of_item)), shape=shape)
    by_item = by_user.T.tocsr()
    scale = 1.0 / np.sqrt(np.maximum(np.diff(by_item.indptr), 1))
    indices, values, counts = [], [], np.zeros(num_items, np.int64)
    for rows in pieces(by_item, by_user):
        both = (by_item[rows] @ by_user).tocsr()
        for row in range(both.shape[0]):
            others, shared = _row(both, row)
            cosine = shared * scale[others] * scale[rows.start + row]
            other = others != rows.start + row
            best = largest(cosine[other], others[other], NEIGHBOURS)
            indices.append(others[other][best])
            values.append(cosine[other][best])
            counts[rows.start + row] = len(best)
    parts = np.concatenate(values), np.concatenate(indices), np.concatenate([[0], np.cumsum(counts)])
    return sparse.csr_matrix(parts, shape=(num_items, num_items))


def pieces(left: sparse.csr_matrix, right: sparse.csr_matrix) -> Iterator[slice]:
    """Ranges of rows of `left` whose product with `right` has at most about MAX_SCORES entries; one row at
    least."""
    cost = np.cumsum((left != 0) @ np.diff(right.indptr).astype(np.float64))
    start = 0
    while start < left.shape[0]:
        limit = (cost[start - 1] if start else 0.0) + MAX_SCORES
        stop = max(start + 1, int(np.searchsorted(cost, limit, side="right")))
        yield slice(start, stop)
        start = stop


def _row(matrix: sparse.csr_matrix, row: int) -> tuple[np.ndarray, np.ndarray]:
    part = slice(matrix.indptr[row], matrix.indptr[row + 1])
    return matrix.indices[part], matrix.data[part]


def largest(scores: np.ndarray, items: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` largest scores, largest first; ties to the lower item."""
    kept = np.arange(len(scores))
    if len(scores) > count:
        kept = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    return kept[np.lexsort((items[kept], -scores[kept]))][:count]


# ---- choice ------------------------------------------------------------------------------------------------


class Miner:
    """Mines for events of any split. [E, X] of an event's query words or history items, times [X, I] of the
    items' weights, is [E, I]."""

    def __init__(self, columns: EventColumns, catalog: Path, num_items: int, width: int) -> None:
        self.columns, self.num_items, self.width = columns, num_items, width
        items, self.queries = count_words(
            read_texts(catalog / "items.parquet"), read_texts(catalog / "queries.parquet")
        )
        self.word_weights = bm25_weights(items)
        train = columns.split == TRAIN
        self.neighbours = neighbours(columns.user[train], columns.item[train], num_items)

    def mine(self, rows: np.ndarray, task: int, clicked: KeySet) -> np.ndarray:
        """Events `rows` [E], all of one task → items [E, width] int32, best first, −1 where there are no
        more. clicked: keys user · num_items + item of all clicks of these users."""
        mined = np.full((len(rows), self.width), -1, np.int32)
        left, right = self._factors(rows, task)
        for part in pieces(left, right):
            scores = (left[part] @ right).tocsr()
            for row in range(scores.shape[0]):
                items, values = _row(scores, row)
                user = int(self.columns.user[rows[part.start + row]])
                unseen = ~clicked.contains(user * self.num_items + items.astype(np.int64))
                unseen &= values > 0
                best = largest(values[unseen], items[unseen], self.width)
                mined[part.start + row, : len(best)] = items[unseen][best]
        return mined

    def _factors(self, rows: np.ndarray, task: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        columns = self.columns
        if task == SRC:
            return self.queries[columns.query[rows]], self.word_weights
        counts = columns.history_count[rows].astype(np.int64)
        items = columns.history_item[ragged_rows(columns.history_start[rows], counts)]
        starts = np.concatenate([[0], np.cumsum(counts)])
        shape = (len(rows), self.num_items)
        return sparse.csr_matrix((np.ones(len(items)), items, starts), shape=shape), self.neighbours


def fill(mined: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """mined [E, n] with −1 at the end of a row replaced by that row's `uniform` [E, n] items, those that were
    mined left out. Both hold no item twice in a row."""
    filled = mined.copy()
    for row in np.flatnonzero((mined < 0).any(axis=1)):
        gaps = mined[row] < 0
        others = uniform[row][~np.isin(uniform[row], mined[row])]
        filled[row, gaps] = others[: gaps.sum()]
    return filled
