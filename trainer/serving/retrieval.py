"""The first of two steps from the whole catalogue to an answer: a few hundred candidates by vectors, which
the model then ranks (serving/recommend.py). One index for each view of the model (models/contract.py: View);
a model without views is ranked exhaustively. A model with a pre-ranking chooses among what they find. A
retriever, another model (retriever.py), brings one more list.

FOLDER/NAME.faiss  retrieval.safetensors (the mean of each centred view)  retrieval.json (what was built,
measured recall, sha256 of each file)
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.batch import Batch
from trainer.errors import EnvironmentProblem, RunError
from trainer.models.contract import PreRanking, Ranker, View
from trainer.runs.run_folder import RunFolder, read_json
from trainer.runs.weights import document_path
from trainer.runtime.files import atomic, file_sha256, write_json, writing
from trainer.runtime.progress import Notify, report, silent
from trainer.serving.index import TRAINING_VECTORS, Index, build_index, plan_index, unit

FORMAT = 1
DOCUMENT = "retrieval.json"
RETRIEVAL = "retrieval"  # folder of the indexes in a run folder and among a version's artifacts
RANK_OFFSET = 60  # of reciprocal rank fusion, as published
RETRIEVER_TRUST = (
    0.25  # beside 1 for the model's own order: a good retriever helps, a poor one does little harm
)
RETRIEVER_SHARE = 1.0  # of a retriever's list, where that of all views together is 1: half of the candidates
NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Retrieval:
    """A model's catalogue, searchable by its views."""

    views: Mapping[str, View]
    means: Mapping[str, Tensor]  # view → mean of its items' vectors [width]; zero where it is not centred
    indexes: Mapping[str, Index | None]  # None: no item has a vector in this view
    num_items: int
    pre_ranking: PreRanking | None = None

    def candidates(
        self,
        questions: Mapping[str, Tensor],
        task: int,
        num_candidates: int,
        exclude: Sequence[int] = (),
        beside: np.ndarray = NO_ROWS,
    ) -> np.ndarray:
        """At most num_candidates rows of items, distinct, none of `exclude`, by the views' shares.

        questions: what each view is asked with, [width]; a zero vector asks nothing, and the others fill in.
        beside: rows that a retriever finds, best first; it has half of the places, if it is that long.
        """
        return union(self._asked(questions, task), num_candidates, exclude, beside)

    def pre_ranked(
        self,
        questions: Mapping[str, Tensor],
        task: int,
        asking: AbstractContextManager[Batch],
        num_candidates: int,
        exclude: Sequence[int] = (),
        beside: np.ndarray = NO_ROWS,
    ) -> np.ndarray:
        """The same, but by the model's pre-ranking if it has one, of num_candidates items of each view, what
        it proposes, and `beside`, whose own order has a say (fused()). asking: gives one event on the model's
        device, as score() reads it. A service holds its model while it is open, so it is opened after the
        indexes were searched."""
        if self.pre_ranking is None:
            return self.candidates(questions, task, num_candidates, exclude, beside)
        lists = [union([one], num_candidates, exclude) for one in self._asked(questions, task)]
        lists.append(beside)
        with asking as event:
            proposed = self.pre_ranking.propose(event)[0].cpu().numpy()
            lists.append(proposed[proposed < self.num_items])
            rows = np.setdiff1d(np.concatenate(lists), np.asarray(exclude, np.int64))
            if not len(rows):
                return rows
            candidates_BC = torch.from_numpy(rows)[None].to(event.task.device)
            of_rows = event.with_candidates(
                candidates_BC, torch.zeros_like(candidates_BC, dtype=torch.float32)
            )
            scores_C = self.pre_ranking.score(of_rows)[0].float().cpu().numpy()
        return fused(rows[np.argsort(-scores_C, kind="stable")], beside)[:num_candidates]

    def _asked(self, questions: Mapping[str, Tensor], task: int) -> list[tuple[Index, np.ndarray, float]]:
        return [
            (index, questions[name].numpy(), self.views[name].share[task])
            for name, index in self.indexes.items()
            if index is not None
        ]


def union(
    asked: Sequence[tuple[Index, np.ndarray, float]],
    num_rows: int,
    exclude: Sequence[int] = (),
    beside: np.ndarray = NO_ROWS,
) -> np.ndarray:
    """Several indexes, each with the vector [width] it is asked with and its weight, and what a retriever
    finds → rows as merge() gives them. A zero vector is near to nothing."""
    lists = [(beside, RETRIEVER_SHARE)]
    for index, vector, weight in asked:
        if vector.any():
            rows = index.search(unit(vector[None]), num_rows + len(exclude))[0][0]
            lists.append((rows[rows >= 0], weight))
    return merge(lists, num_rows, exclude)


def fused(rows: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """rows in a new order, best first: theirs, and with less weight that of `beside` (reciprocal rank fusion,
    Cormack et al., SIGIR 2009). Places are compared and not scores, because every retriever has a scale of
    its own."""
    beside = beside[np.isin(beside, rows)]
    value = 1 / (RANK_OFFSET + 1 + np.arange(len(rows)))
    order = np.argsort(rows)
    found = order[np.searchsorted(rows, beside, sorter=order)]
    value[found] += RETRIEVER_TRUST / (RANK_OFFSET + 1 + np.arange(len(beside)))
    return rows[np.argsort(-value, kind="stable")]


def best_scored(scores_I: Tensor, num_rows: int, exclude: Sequence[int] = ()) -> np.ndarray:
    """Scores of all items, which are changed → the rows of the best, best first; none of `exclude`, and none
    of −inf."""
    scores_I[list(exclude)] = -torch.inf
    best = scores_I.topk(min(num_rows, len(scores_I)))
    rows: np.ndarray = best.indices[~best.values.isneginf()].numpy()
    return rows


def questions_of(model: Ranker, retrieval: "Retrieval", events: Batch, whole: Batch) -> dict[str, Tensor]:
    """What each view is asked with for events that are on the model's device, [B, width] each, on the CPU.
    whole: the same events with histories as long as they are known, as a request has them."""
    return {
        name: view.ask(whole if view.whole_history else events, retrieval.means[name].to(model.device))
        .float()
        .cpu()
        for name, view in retrieval.views.items()
    }


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


# ---- vectors of a view -------------------------------------------------------------------------------------


def raw_vectors(model: Ranker, view: View, rows: np.ndarray) -> np.ndarray:
    """[n, width] float32, as the model gives them."""
    with torch.inference_mode():
        on_device = torch.from_numpy(np.asarray(rows, np.int64)).to(model.device)
        return view.items(on_device).float().cpu().numpy()


def unit_vectors(model: Ranker, view: View, mean: Tensor, rows: np.ndarray) -> np.ndarray:
    """Unit vectors of items, less the catalogue's mean in a centred view; zero for items without any."""
    raw = raw_vectors(model, view, rows)
    if not view.centred:
        return unit(raw)
    return unit(np.where(raw.any(1, keepdims=True), raw - mean.numpy(), 0.0).astype(np.float32))


def mean_vector(model: Ranker, view: View) -> Tensor:
    """Mean over (at most TRAINING_VECTORS evenly spaced) items that have a vector, [width] float32; zero for
    a view that is not centred."""
    if not view.centred:
        return torch.zeros(view.width)
    num_items = model.tables.num_items
    evenly = np.linspace(0, num_items - 1, min(num_items, TRAINING_VECTORS)).astype(np.int64)
    raw = raw_vectors(model, view, np.unique(evenly))
    raw = raw[raw.any(1)]
    return torch.from_numpy(raw.mean(0) if len(raw) else np.zeros(raw.shape[1], np.float32))


# ---- building, keeping, loading ----------------------------------------------------------------------------


def build_retrieval(model: Ranker, notify: Notify = silent) -> Retrieval | None:
    """An index for each view; None for a model without views. The memory that each needs is said before it is
    built, its recall afterwards."""
    views = model.views()
    if not views:
        return None
    means = {name: mean_vector(model, view) for name, view in views.items()}
    indexes = {name: _build(model, name, view, means[name], notify) for name, view in views.items()}
    return Retrieval(views, means, indexes, model.tables.num_items, model.pre_ranking())


def _build(model: Ranker, name: str, view: View, mean: Tensor, notify: Notify) -> Index | None:
    num_items = model.tables.num_items
    notify(plan_index(num_items, view.width).line(name, num_items, view.width))
    index = build_index(
        lambda rows: unit_vectors(model, view, mean, rows),
        num_items,
        view.width,
        progress=partial(report, f"index {name}"),
    )
    if index is None:
        notify(f"index {name}: no item has a vector, left out")
    elif index.facts["recall"]:
        figures = ", ".join(f"{metric} {value:.3f}" for metric, value in index.facts["recall"].items())
        notify(f"index {name}: {figures} against exact search")
    return index


def save_retrieval(folder: Path, retrieval: Retrieval, identity: str) -> None:
    """Write FOLDER; the document last, so that a folder with one is whole. identity: of the weights and
    tables it was built from."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DOCUMENT).unlink(missing_ok=True)
    with atomic(folder / "retrieval.safetensors") as path:
        save_file(dict(retrieval.means), path)
    document: dict[str, Any] = {"format": FORMAT, "identity": identity, "sha256": {}, "indexes": {}}
    names = ["retrieval.safetensors"]
    for name, index in retrieval.indexes.items():
        if index is not None:
            with atomic(folder / f"{name}.faiss") as path:
                faiss.write_index(index.faiss_index, str(path))
            document["indexes"][name] = index.facts
            names.append(f"{name}.faiss")
    document["sha256"] = {name: file_sha256(folder / name) for name in names}
    document["digest"] = _digest(document)
    write_json(folder / DOCUMENT, document)


def load_retrieval(folder: Path, model: Ranker, identity: str) -> Retrieval | None:
    """What save_retrieval wrote; None when there is nothing, or it was built from other weights or tables.
    Raises RunError for a damaged file."""
    path = folder / DOCUMENT
    if not path.is_file():
        return None
    document = read_json(path)
    if (document.get("format"), document.get("identity")) != (FORMAT, identity):
        return None
    if document.get("digest", _digest(document)) != _digest(document):  # older files have none
        raise _damaged(path)
    for name, sha256 in document["sha256"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
            raise _damaged(folder / name)
    views, kept = model.views(), load_file(folder / "retrieval.safetensors")
    # files of before there were other models hold one mean, the semantic view's
    means = {
        name: kept.get(name, kept["mean"] if view.centred and "mean" in kept else torch.zeros(view.width))
        for name, view in views.items()
    }
    indexes = {
        name: Index(faiss.read_index(str(folder / f"{name}.faiss")), facts)
        for name, facts in document["indexes"].items()
    }
    return Retrieval(views, means, indexes, model.tables.num_items, model.pre_ranking())


def _digest(document: dict[str, Any]) -> str:
    """sha256 of retrieval.json without its own digest."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path) -> RunError:
    return RunError(
        f"{path} is missing or damaged. Delete {path.parent}: it is built again (for a registered version: "
        "register it again)"
    )


def describe(retrieval: Retrieval) -> dict[str, Any]:
    """{"cf": {kind, num_items, …, recall}, "semantic": …}: what protocols and model cards say about the
    indexes."""
    return {name: dict(index.facts) for name, index in retrieval.indexes.items() if index is not None}


# ---- indexes of a run or a version -------------------------------------------------------------------------


def model_identity(model_dir: Path) -> str:
    """Of the weights, and (by the hashes in model.json) of the tables they go with."""
    return f"{file_sha256(document_path(model_dir))}-{file_sha256(model_dir / 'model.safetensors')}"


def version_retrieval(folder: Path, model: Ranker, notify: Notify = silent) -> Retrieval | None:
    """The indexes among the artifacts of a version, FOLDER/model and FOLDER/retrieval; built when they are
    missing, or of other weights. None for a model without views."""
    found = load_retrieval(folder / RETRIEVAL, model, model_identity(folder / "model"))
    return found or build_retrieval(model, notify)


def run_retrieval(
    run_dir: Path, model: Ranker, notify: Notify = silent, must_be_kept: bool = False
) -> Retrieval | None:
    """The indexes of RUN/retrieval (None for a model without views); built and kept there when they are
    missing, or of other weights. A folder that cannot be written costs a note, unless they must be kept."""
    identity = model_identity(RunFolder(run_dir).model)
    retrieval = load_retrieval(RunFolder(run_dir).retrieval, model, identity)
    if retrieval is None:
        retrieval = build_retrieval(model, notify)
        try:
            if retrieval is not None:
                save_retrieval(RunFolder(run_dir).retrieval, retrieval, identity)
        except EnvironmentProblem as error:
            if must_be_kept:
                raise
            notify(f"the indexes are used but not kept: {error}")
    return retrieval
