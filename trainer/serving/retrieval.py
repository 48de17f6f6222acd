"""The first of two steps from the whole catalogue to an answer: a few hundred candidates by vectors, which
GenSR then ranks (serving/recommend.py).

Two indexes of unit vectors, made from nothing but the model and its item tables:
    cf         LightGCN vectors; asked with the mean over a history. Items without training clicks have none.
    semantic   E_s of the item's text less the catalogue's mean; asked with the query, or with the mean over a
               history. Finds new items, too.

FOLDER/cf.faiss  semantic.faiss  retrieval.safetensors (the mean)  retrieval.json (what was built, measured recall, sha256 of each file)

An index is exact while a scan of all vectors takes milliseconds. Beyond that it holds 4 bits a dimension,
which faiss scans in registers ("FastScan", André et al. 2017), and 8 bits a dimension to sort again what that
scan finds: no lists to probe, so recall does not depend on how items cluster.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.errors import RunError
from trainer.models.gensr.model import GenSR
from trainer.runtime.files import atomic, file_sha256, writing

FORMAT = 1
MAX_EXACT_FLOATS = 2**24  # 64 MiB: one core scans that in about 10 ms
MAX_CODED_WIDTH = 64  # wider vectors are rotated onto their first principal axes before they are coded
GROWN = 1.1  # arrays that grew hold more room than they use: 5 to 10 % measured at 6.9 M items
REFINE_FACTOR = 4  # the coarse scan finds 4 k, the finer codes choose k
TRAINING_VECTORS = 65_536
CHUNK_ITEMS = 65_536  # vectors made and added at once: 65,536 × 768 × 4 B = 200 MB
PROBE_QUERIES, PROBE_MIX = (
    64,
    3,
)  # recall is measured with means of 3 random items, as means over histories are what an index is asked with
RECALL_CUTOFFS = (100, 500)
DOCUMENT = "retrieval.json"

Vectors = Callable[
    [np.ndarray], np.ndarray
]  # item rows [n] → their unit vectors [n, width] float32; a zero row has no vector
Notify = Callable[[str], None]


def silent(line: str) -> None:
    """For callers that show nothing."""


# ---- one index ---------------------------------------------------------------------------------------------


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
    """Exact up to MAX_EXACT_FLOATS numbers, codes beyond. Bytes: vectors or codes, and 8 for an item's row."""
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
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Index | None:
    """An index of all items that have a vector, made chunk by chunk; None when no item has one. Recall is
    measured against exact search on the way."""
    rng = np.random.default_rng(seed)
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
        self._scores, self.rows = (
            np.take_along_axis(scores, order, 1),
            np.take_along_axis(candidates, order, 1),
        )


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Mean share of each row of `exact` that stands in the same row of `found`."""
    return float(np.mean([np.isin(row, other).mean() for row, other in zip(exact, found, strict=True)]))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; zero rows stay zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 1e-12)


# ---- both of them, for a model -----------------------------------------------------------------------------


class Retrieval:
    """A model's catalogue, searchable from a history and a query vector."""

    def __init__(self, model: GenSR, mean: Tensor, cf: Index | None, semantic: Index | None) -> None:
        """mean [D]: E_s averaged over the catalogue; what all texts share says nothing about one of them."""
        self.model, self.mean, self.cf, self.semantic = model, mean, cf, semantic

    def candidates(
        self,
        history: Sequence[int],
        query: np.ndarray | None,
        num_candidates: int,
        exclude: Sequence[int] = (),
        cf_share: float = 0.5,
    ) -> np.ndarray:
        """At most num_candidates rows of items, distinct, none of `exclude`, the most promising first.

        history: rows, may be empty; query: [D] as GenSR.query_parts gives it, or None. The semantic side is
        asked with the query if there is one, else with the history. cf_share: of the two sides, how much the
        CF one is trusted; where one side has nothing the other fills in.
        """
        history_rows = np.asarray(history, np.int64)
        asked = []
        if self.cf is not None and len(history_rows):
            asked.append((self.cf, cf_vectors(self.model, history_rows).mean(0), cf_share))
        if self.semantic is not None and query is not None:
            asked.append(
                (self.semantic, query, 1.0 - cf_share)
            )  # as it is: a query lacks what all texts share
        elif self.semantic is not None and len(history_rows):
            asked.append(
                (self.semantic, semantic_vectors(self.model, self.mean, history_rows).mean(0), 1.0 - cf_share)
            )
        return union(asked, num_candidates, exclude)


def union(
    asked: Sequence[tuple[Index, np.ndarray, float]], num_rows: int, exclude: Sequence[int] = ()
) -> np.ndarray:
    """Several indexes, each with the vector [width] it is asked with and its weight → rows as merge() gives
    them. A zero vector is near to nothing."""
    lists = []
    for index, vector, weight in asked:
        if vector.any():
            rows = index.search(unit(vector[None]), num_rows + len(exclude))[0][0]
            lists.append((rows[rows >= 0], weight))
    return merge(lists, num_rows, exclude)


def merge(
    lists: Sequence[tuple[np.ndarray, float]], num_rows: int, exclude: Sequence[int] = ()
) -> np.ndarray:
    """Ranked lists with weights → the first num_rows of their union: of any beginning of it, a list has about
    its weight's share (if it is that long)."""
    if not lists:
        return np.zeros(0, np.int64)
    rows = np.concatenate([ranked for ranked, _ in lists])
    turn = np.concatenate([(np.arange(len(ranked)) + 1) / max(weight, 1e-9) for ranked, weight in lists])
    rows = rows[np.argsort(turn, kind="stable")]
    _, first = np.unique(rows, return_index=True)
    rows = rows[np.sort(first)]
    return rows[~np.isin(rows, np.asarray(exclude, np.int64))][:num_rows]


def cf_vectors(model: GenSR, rows: np.ndarray) -> np.ndarray:
    """Unit CF vectors of items [n, K]; zero without training clicks."""
    return unit(model.tables.cf[_on(model, rows)].float().cpu().numpy())


def semantic_vectors(model: GenSR, mean: Tensor, rows: np.ndarray) -> np.ndarray:
    """Unit E_s of items [n, D], less the catalogue's mean; zero for items without any text."""
    raw = raw_semantic_vectors(model, rows)
    return unit(np.where(raw.any(1, keepdims=True), raw - mean.numpy(), 0.0).astype(np.float32))


def raw_semantic_vectors(model: GenSR, rows: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model.semantic_vectors(_on(model, rows), model.settings.item_tokens).float().cpu().numpy()


def _on(model: GenSR, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(rows, np.int64)).to(model.tables.cf.device)


def semantic_mean(model: GenSR, num_items: int) -> Tensor:
    """E_s averaged over (at most TRAINING_VECTORS evenly spaced) items with text, [D] float32."""
    raw = raw_semantic_vectors(
        model, np.unique(np.linspace(0, num_items - 1, min(num_items, TRAINING_VECTORS)).astype(np.int64))
    )
    raw = raw[raw.any(1)]
    return torch.from_numpy(raw.mean(0) if len(raw) else np.zeros(raw.shape[1], np.float32))


# ---- building, keeping, loading ----------------------------------------------------------------------------


def build_retrieval(
    model: GenSR, notify: Notify = silent, progress: Callable[[str, int, int], None] | None = None
) -> Retrieval:
    """Both indexes. The memory that each needs is said before it is built, its recall afterwards."""
    num_items = model.tables.num_items
    mean = semantic_mean(model, num_items)
    views: dict[str, tuple[Vectors, int]] = {
        "cf": (lambda rows: cf_vectors(model, rows), model.settings.cf_dim),
        "semantic": (lambda rows: semantic_vectors(model, mean, rows), mean.shape[0]),
    }
    built: dict[str, Index | None] = {}
    for name, (vectors, width) in views.items():
        notify(plan_index(num_items, width).line(name, num_items, width))
        report = (
            None
            if progress is None
            else (lambda done, total, stage=name: progress(f"index {stage}", done, total))
        )
        index = build_index(vectors, num_items, width, progress=report)
        if index is None:
            notify(f"index {name}: no item has a vector, left out")
        elif index.facts["recall"]:
            notify(
                f"index {name}: "
                + ", ".join(f"{metric} {value:.3f}" for metric, value in index.facts["recall"].items())
                + " against exact search"
            )
        built[name] = index
    return Retrieval(model, mean, built["cf"], built["semantic"])


def save_retrieval(folder: Path, retrieval: Retrieval, identity: str) -> None:
    """Write FOLDER; the document last, so that a folder with one is whole. identity: of the weights and
    tables it was built from."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DOCUMENT).unlink(missing_ok=True)
    with atomic(folder / "retrieval.safetensors") as path:
        save_file({"mean": retrieval.mean}, path)
    document: dict[str, Any] = {"format": FORMAT, "identity": identity, "sha256": {}, "indexes": {}}
    names = ["retrieval.safetensors"]
    for name, index in (("cf", retrieval.cf), ("semantic", retrieval.semantic)):
        if index is not None:
            with atomic(folder / f"{name}.faiss") as path:
                faiss.write_index(index.faiss_index, str(path))
            document["indexes"][name] = index.facts
            names.append(f"{name}.faiss")
    document["sha256"] = {name: file_sha256(folder / name) for name in names}
    with atomic(folder / DOCUMENT) as path:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def load_retrieval(folder: Path, model: GenSR, identity: str) -> Retrieval | None:
    """What save_retrieval wrote; None when there is nothing, or it was built from other weights or tables.
    Raises RunError for a damaged file."""
    path = folder / DOCUMENT
    if not path.is_file():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    if (document["format"], document["identity"]) != (FORMAT, identity):
        return None
    for name, sha256 in document["sha256"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
            raise RunError(
                f"{folder / name} is missing or damaged. Delete {folder}: it is built again (for a "
                "registered version: register it again)"
            )
    indexes = {
        name: Index(faiss.read_index(str(folder / f"{name}.faiss")), facts)
        for name, facts in document["indexes"].items()
    }
    mean = load_file(folder / "retrieval.safetensors")["mean"]
    return Retrieval(model, mean, indexes.get("cf"), indexes.get("semantic"))


def describe(retrieval: Retrieval) -> dict[str, Any]:
    """{"cf": {kind, num_items, …, recall}, "semantic": …}: what protocols and model cards say about the
    indexes."""
    return {
        name: dict(index.facts)
        for name, index in (("cf", retrieval.cf), ("semantic", retrieval.semantic))
        if index is not None
    }
