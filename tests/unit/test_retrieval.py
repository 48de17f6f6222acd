"""The first step to an answer: indexes against brute force, the union of both sides, and what is kept on
disk."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.schema import SRC
from tests.runs import make_run
from trainer.errors import RunError
from trainer.models.contract import PreRanking
from trainer.serving import index as index_module
from trainer.serving.index import Index, build_index, plan_index, unit
from trainer.serving.recommend import Recommender
from trainer.serving.requests import ParsedRequest
from trainer.serving.retrieval import (
    Retrieval,
    build_retrieval,
    load_retrieval,
    merge,
    model_identity,
    save_retrieval,
)


def vectors(num_items: int, width: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((num_items, width)).astype(np.float32))


def test_small_catalogues_are_searched_exactly() -> None:
    table = vectors(1000, 16)
    table[::7] = 0  # items without a vector are never found
    index = build_index(lambda rows: table[rows], 1000, 16)
    assert index is not None
    assert index.facts["kind"] == "exact"
    queries = vectors(5, 16, seed=1)
    rows, cosines = index.search(queries, 20)
    exact = np.argsort(-np.where(table.any(1), queries @ table.T, -9), axis=1)[:, :20]
    assert (rows == exact).all()
    assert cosines[0] == pytest.approx((queries @ table.T)[0, exact[0]], abs=1e-5)


@pytest.mark.parametrize("width", [32, 96])
def test_large_catalogues_are_coded_and_their_recall_is_measured(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figure that building reports is that of an independent search over all vectors."""
    monkeypatch.setattr(index_module, "MAX_EXACT_FLOATS", 1000)
    monkeypatch.setattr(index_module, "CHUNK_ITEMS", 3000)
    # as learned vectors: fewer dimensions than columns
    table = unit(vectors(8000, 12) @ vectors(12, width, seed=1))
    table[5] = 0
    index = build_index(lambda rows: table[rows], 8000, width)
    assert index is not None
    assert (index.facts["kind"], index.facts["num_items"]) == ("codes", 7999)
    assert ("PCA64" in index.facts["factory"]) == (width > 64)
    queries = unit(table[np.random.default_rng(2).integers(8000, size=(50, 3))].mean(1))
    exact = np.argsort(-(queries @ table.T), axis=1)[:, :100]
    measured = index_module.recall(index.search(queries, 100)[0], exact)
    assert measured > 0.9
    assert index.facts["recall"]["recall@100"] == pytest.approx(measured, abs=0.05)


def test_no_vectors_no_index() -> None:
    assert build_index(lambda rows: np.zeros((len(rows), 4), np.float32), 50, 4) is None


def test_memory_of_the_largest_catalogue_is_known_beforehand() -> None:
    plan = plan_index(6_890_707, 64)
    assert plan.kind == "codes"
    assert 0.7e9 < plan.num_bytes < 0.8e9  # 4 + 8 bits a dimension and 8 bytes for the row: 104 bytes an item
    assert plan.build_bytes < 1.5e9
    assert plan_index(4_000, 768).kind == "exact"


def test_union_shares_the_places() -> None:
    first, second = np.arange(10), np.arange(100, 110)
    assert sorted(merge([(first, 0.5), (second, 0.5)], 6)) == [0, 1, 2, 100, 101, 102]
    three_to_one = merge([(first, 0.25), (second, 0.75)], 8)
    assert (three_to_one >= 100).sum() == 6
    # where one side ends, the other goes on
    assert merge([(first, 0.5), (second[:1], 0.5)], 8).tolist() == [0, 100, 1, 2, 3, 4, 5, 6]
    assert merge([(np.array([3, 4]), 0.5), (np.array([4, 3]), 0.5)], 9, exclude=[4]).tolist() == [3]
    assert merge([], 5).tolist() == []


@pytest.fixture(scope="module")
def recommender(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    return Recommender.from_run(make_run(tmp_path_factory.mktemp("retrieval"), prepared))


def found_by(
    retrieval: Retrieval, recommender: Recommender, request: ParsedRequest, count: int
) -> np.ndarray:
    questions = recommender.scorer.questions(request, retrieval.views, retrieval.means)
    return retrieval.candidates(questions, request.task, count)


def test_kept_indexes_answer_as_before(recommender: Recommender, tmp_path: Path) -> None:
    model = recommender.scorer.model
    lines: list[str] = []
    built = build_retrieval(model, lines.append)
    assert lines[0].startswith("index cf: ")
    assert "MB while it is built" in lines[0]
    assert built is not None
    save_retrieval(tmp_path, built, "weights-1")
    loaded = load_retrieval(tmp_path, model, "weights-1")
    assert loaded is not None
    request = ParsedRequest(items=[3, 9], tasks=[0, 0], task=SRC, query="garden lamp", candidates=[])
    ours, theirs = (found_by(one, recommender, request, 30) for one in (loaded, built))
    assert len(ours) == 30 and (ours == theirs).all()
    assert load_retrieval(tmp_path, model, "weights-2") is None
    assert load_retrieval(tmp_path / "elsewhere", model, "weights-1") is None
    (tmp_path / "cf.faiss").write_bytes(b"something else")
    with pytest.raises(RunError, match=r"cf.faiss is missing or damaged"):
        load_retrieval(tmp_path, model, "weights-1")


def test_pre_ranking_orders_all_that_is_found(recommender: Recommender) -> None:
    """A model's own order over views and proposals, less what is excluded."""
    found = recommender.retrieval
    assert isinstance(found, Retrieval)
    request = ParsedRequest(items=[3, 9], tasks=[0, 0], task=SRC, query="garden lamp", candidates=[])
    questions = recommender.scorer.questions(request, found.views, found.means)
    by_shares = found.candidates(questions, SRC, 20)
    pre_ranking = PreRanking(
        propose=lambda batch: torch.tensor([[7, 8, 9, found.num_items]]),
        score=lambda batch: batch.candidates.float(),  # the later row is the better item
    )
    ordered = dataclasses.replace(found, pre_ranking=pre_ranking)
    rows = recommender.scorer.pre_ranked(request, ordered, questions, 20, [9])
    assert rows.tolist() == sorted(rows, reverse=True) and len(rows) == 20 and 9 not in rows
    every = recommender.scorer.pre_ranked(request, ordered, questions, 1000, [9])
    assert {7, 8} <= set(every.tolist()) and set(by_shares) - {9} <= set(every.tolist())
    assert max(every) < found.num_items
    none = recommender.scorer.pre_ranked(request, found, questions, 20, [])
    assert none.tolist() == by_shares.tolist()  # a model without pre-ranking


def test_indexes_are_searched_while_others_use_the_model(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service has one model and many requests: it is held for the pre-ranking alone."""
    found, held, search = recommender.retrieval, [], Index.search
    assert isinstance(found, Retrieval)

    def noted(self: Index, *arguments: Any) -> Any:
        held.append(recommender.scorer._lock.locked())
        return search(self, *arguments)

    monkeypatch.setattr(Index, "search", noted)
    request = ParsedRequest(items=[3, 9], tasks=[0, 0], task=SRC, query="garden lamp", candidates=[])
    questions = recommender.scorer.questions(request, found.views, found.means)
    pre_ranking = PreRanking(
        propose=lambda batch: torch.tensor([[7]]), score=lambda batch: batch.candidates.float()
    )
    for retrieval in (found, dataclasses.replace(found, pre_ranking=pre_ranking)):
        recommender.scorer.pre_ranked(request, retrieval, questions, 20, [])
    assert held == [False] * 4  # two indexes each


def test_other_weights_are_other_indexes(recommender: Recommender, tmp_path: Path) -> None:
    (tmp_path / "gensr.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"a")
    first = model_identity(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"b")
    assert model_identity(tmp_path) != first


def test_semantic_side_is_cosine_of_centred_text_vectors(recommender: Recommender) -> None:
    """Against the definition, spelled out."""
    model: Any = recommender.scorer.model
    found = recommender.retrieval
    with torch.inference_mode():
        texts = model.semantic_vectors(
            torch.arange(model.tables.num_items), model.world.data.item_tokens
        ).numpy()
    centred = texts - texts.mean(0)
    request = ParsedRequest(items=[], tasks=[], task=SRC, query="garden lamp", candidates=[])
    assert isinstance(found, Retrieval)
    query = recommender.scorer.questions(request, found.views, found.means)["semantic"].numpy()
    cosine = centred @ query / np.linalg.norm(centred, axis=1)
    rows = found_by(found, recommender, request, 10)
    assert cosine[rows] == pytest.approx(np.sort(cosine)[::-1][:10], abs=1e-4)
