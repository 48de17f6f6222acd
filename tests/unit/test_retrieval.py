"""The first step to an answer: indexes against brute force, the union of both sides, and what is kept on
disk."""

from pathlib import Path

import numpy as np
import pytest

from tests.runs import make_run
from trainer.errors import RunError
from trainer.serving import retrieval
from trainer.serving.recommend import Recommender, model_identity
from trainer.serving.retrieval import (
    build_index,
    build_retrieval,
    load_retrieval,
    merge,
    plan_index,
    save_retrieval,
    unit,
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
    monkeypatch.setattr(retrieval, "MAX_EXACT_FLOATS", 1000)
    monkeypatch.setattr(retrieval, "CHUNK_ITEMS", 3000)
    # as learned vectors: fewer dimensions than columns
    table = unit(vectors(8000, 12) @ vectors(12, width, seed=1))
    table[5] = 0
    index = build_index(lambda rows: table[rows], 8000, width)
    assert index is not None
    assert (index.facts["kind"], index.facts["num_items"]) == ("codes", 7999)
    assert ("PCA64" in index.facts["factory"]) == (width > 64)
    queries = unit(table[np.random.default_rng(2).integers(8000, size=(50, 3))].mean(1))
    exact = np.argsort(-(queries @ table.T), axis=1)[:, :100]
    measured = retrieval.recall(index.search(queries, 100)[0], exact)
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


def test_kept_indexes_answer_as_before(recommender: Recommender, tmp_path: Path) -> None:
    model = recommender.scorer.model
    lines: list[str] = []
    built = build_retrieval(model, lines.append)
    assert lines[0].startswith("index cf: ")
    assert "MB while it is built" in lines[0]
    save_retrieval(tmp_path, built, "weights-1")
    loaded = load_retrieval(tmp_path, model, "weights-1")
    assert loaded is not None
    query = recommender.scorer.query_vectors(["garden lamp"])[0]
    assert (loaded.candidates([3, 9], query, 30) == built.candidates([3, 9], query, 30)).all()
    assert load_retrieval(tmp_path, model, "weights-2") is None
    assert load_retrieval(tmp_path / "elsewhere", model, "weights-1") is None
    (tmp_path / "cf.faiss").write_bytes(b"something else")
    with pytest.raises(RunError, match=r"cf.faiss is missing or damaged"):
        load_retrieval(tmp_path, model, "weights-1")


def test_other_weights_are_other_indexes(recommender: Recommender, tmp_path: Path) -> None:
    (tmp_path / "gensr.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"a")
    first = model_identity(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"b")
    assert model_identity(tmp_path) != first


def test_semantic_side_is_cosine_of_centred_text_vectors(recommender: Recommender) -> None:
    """Against the definition, spelled out."""
    import torch

    model, found = recommender.scorer.model, recommender.retrieval
    with torch.inference_mode():
        texts = model.semantic_vectors(
            torch.arange(model.tables.num_items), model.settings.item_tokens
        ).numpy()
    centred = texts - texts.mean(0)
    query = recommender.scorer.query_vectors(["garden lamp"])[0]
    cosine = centred @ query / np.linalg.norm(centred, axis=1)
    rows = found.candidates([], query, 10)
    assert cosine[rows] == pytest.approx(np.sort(cosine)[::-1][:10], abs=1e-4)
