"""One index of unit vectors: nearest items by cosine.

An index is exact while a scan of all vectors takes milliseconds. Beyond that it holds 4 bits a dimension,
which faiss scans in registers ("FastScan", André et al. 2017), and 8 bits a dimension to sort again what that
scan finds: no lists to probe, so recall does not depend on how items cluster.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch

MAX_EXACT_FLOATS = 2**24  # 64 MiB: one core scans that in about 10 ms
MAX_CODED_WIDTH = 64  # wider vectors are rotated onto their first principal axes before they are coded
GROWN = 1.1  # arrays that grew hold more room than they use: 5 to 10 % measured at 6.9 M items
REFINE_FACTOR = 4  # the coarse scan finds 4 k, the finer codes choose k
TRAINING_VECTORS = 65_536
CHUNK_ITEMS = 65_536  # vectors made and added at once: 65,536 × 768 × 4 B = 200 MB
# recall is measured with means of 3 random items, as means over histories are what an index is asked with
PROBE_QUERIES, PROBE_MIX = 64, 3
RECALL_CUTOFFS = (100, 500)

# item rows [n] → their unit vectors [n, width] float32; a zero row has no vector
Vectors = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class IndexPlan:
    """What will be built, before it is built."""

    kind: str  # "exact" or "codes"
    factory: str  # faiss's description
    num_bytes: int  # of the finished index, in memory and on disk
    build_bytes: int  # at the highest point while it is built

    def line(self, name: str, num_items: int, width: int) -> str:
        return (
            f"index {name}: {num_items:,} items × {width}, {self.kind} ({self.factory}), "
            f"{self.num_bytes / 1e6:,.1f} MB, {self.build_bytes / 1e6:,.1f} MB while it is built"
        )


def plan_index(num_items: int, width: int) -> IndexPlan:
    """Exact up to MAX_EXACT_FLOATS numbers, codes beyond. Bytes: vectors or codes, and 8 an item's row."""
    if num_items * width <= MAX_EXACT_FLOATS:
        num_bytes = num_items * (4 * width + 8)
        return IndexPlan(
            "exact", "IDMap,Flat", num_bytes, num_bytes + 4 * width * min(num_items, CHUNK_ITEMS)
        )
    coded = min(width, MAX_CODED_WIDTH)
    rotation = f"PCA{coded}," if coded < width else ""
    packed = 32 * math.ceil(num_items / 32)  # FastScan stores blocks of 32 items
    num_bytes = int(GROWN * (packed * coded // 2 + num_items * (coded + 8)))
    # arrays that grow are copied once: at worst the larger of the two code arrays is there twice; and a chunk
    # of vectors, twice when it is rotated
    build_bytes = num_bytes + num_items * coded + 4 * (width + coded) * max(TRAINING_VECTORS, CHUNK_ITEMS)
    return IndexPlan("codes", f"IDMap,{rotation}PQ{coded}x4fs,Refine(SQ8)", num_bytes, build_bytes)


@dataclass(frozen=True)
class Index:
    """Nearest items by cosine. Thread-safe to search."""

    faiss_index: Any
    facts: dict[str, Any]  # kind, factory, num_items, width, recall: goes into retrieval.json

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors [Q, width] → item rows [Q, k] int64, best first, -1 where there are no more; and their
        cosines [Q, k] (approximate for codes)."""
        k = max(1, min(k, self.facts["num_items"]))
        cosines, rows = self.faiss_index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
        return rows, cosines


def build_index(
    vectors: Vectors,
    num_items: int,
    width: int,
    progress: Callable[[int, int], None] | None = None,
) -> Index | None:
    """An index of all items that have a vector, made chunk by chunk; None when no item has one. Recall is
    measured against exact search on the way."""
    rng = np.random.default_rng(0)
    sample = vectors(np.sort(rng.choice(num_items, min(num_items, TRAINING_VECTORS), replace=False)))
    sample = sample[sample.any(1)]
    if len(sample) == 0:
        return None
    plan = plan_index(num_items, width)
    index: Any = faiss.index_factory(width, plan.factory, faiss.METRIC_INNER_PRODUCT)
    index.train(sample)
    if plan.kind == "codes":
        refine: Any = faiss.downcast_index(index.index)
        refine.k_factor = REFINE_FACTOR
    probes = unit(sample[rng.integers(len(sample), size=(PROBE_QUERIES, PROBE_MIX))].mean(1))
    exact = _ExactSearch(probes, max(RECALL_CUTOFFS))
    for start in range(0, num_items, CHUNK_ITEMS):
        rows = np.arange(start, min(start + CHUNK_ITEMS, num_items))
        chunk = vectors(rows)
        has_vector = chunk.any(1)
        index.add_with_ids(chunk[has_vector], rows[has_vector])
        if plan.kind == "codes":
            exact.add(chunk[has_vector], rows[has_vector])
        if progress is not None:
            progress(int(rows[-1]) + 1, num_items)
    facts = {
        "kind": plan.kind,
        "factory": plan.factory,
        "num_items": index.ntotal,
        "width": width,
        "recall": None,
    }
    found = Index(index, facts)
    if plan.kind == "codes":
        facts["recall"] = {
            f"recall@{k}": recall(found.search(probes, k)[0], exact.rows[:, :k]) for k in RECALL_CUTOFFS
        }
    return found


class _ExactSearch:
    """The best rows of some queries over vectors that come in chunks."""

    def __init__(self, queries: np.ndarray, k: int) -> None:
        self.queries, self.k = queries, k
        self.rows = np.zeros((len(queries), 0), np.int64)
        self._scores = np.zeros((len(queries), 0), np.float32)

    def add(self, vectors: np.ndarray, rows: np.ndarray) -> None:
        best = torch.topk(torch.from_numpy(self.queries @ vectors.T), min(self.k, len(rows)), dim=1)
        scores = np.concatenate([self._scores, best.values.numpy()], axis=1)
        candidates = np.concatenate([self.rows, rows[best.indices.numpy()]], axis=1)
        order = torch.topk(torch.from_numpy(scores), min(self.k, scores.shape[1]), dim=1).indices.numpy()
        self._scores = np.take_along_axis(scores, order, 1)
        self.rows = np.take_along_axis(candidates, order, 1)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Mean share of each row of `exact` that stands in the same row of `found`."""
    return float(np.mean([np.isin(row, other).mean() for row, other in zip(exact, found, strict=True)]))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; zero rows stay zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 1e-12)
