"""Each baseline against a direct computation on a small catalogue."""

import json

import bm25s
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_shards.schema import NO_QUERY, REC, SRC, Manifest, read_manifest
from tests.tiny_folder import make_tiny_folder
from trainer.batch import Batch
from trainer.data.cf_table import load_cf
from trainer.errors import DataError
from trainer.models.baselines import BASELINES
from trainer.models.baselines.bm25 import Bm25, build_bm25

TEXTS = ["Steel bolt, M6", "steel nut", "Wooden box box box", "", "bolt cutter for steel bolts"]
QUERIES = ["STEEL bolt", "box unknownword", "nothing here", "bolt bolt"]


def make_batch(candidates: list[list[int]], query: list[int], user: list[int] | None = None) -> Batch:
    size = len(candidates)
    items = torch.tensor(candidates)
    labels = torch.zeros(items.shape)
    labels[:, 0] = 1
    none = torch.zeros(size, 0, dtype=torch.int64)
    task = torch.tensor([REC if q == NO_QUERY else SRC for q in query])
    return Batch(
        event_id=torch.arange(size),
        user=torch.tensor(user or [0] * size),
        task=task,
        query=torch.tensor(query),
        fold=torch.full((size,), -1),
        history_items=none,
        history_tasks=none,
        history_mask=none.bool(),
        history_queries=none,
        candidates=items,
        labels=labels,
    )


def write_texts(folder, texts, queries):
    (folder / "catalog").mkdir()
    pq.write_table(pa.table({"text": texts}), folder / "catalog" / "items.parquet")
    pq.write_table(pa.table({"text": queries}), folder / "catalog" / "queries.parquet")


def test_bm25_of_candidates_equals_bm25s_over_the_whole_catalogue(tmp_path):
    write_texts(tmp_path, TEXTS, QUERIES)
    scorer = build_bm25(tmp_path, Manifest(raw={"text": {"num_words": 0}}, hash=""))
    reference = bm25s.BM25(method="lucene")
    words = [text.lower().replace(",", "").split() for text in TEXTS]
    reference.index(words, show_progress=False)
    candidates = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4], [4, 0, 1, 2, 3]]
    scores = scorer(make_batch(candidates, [0, 1, 2, 3]))
    assert scores.dtype == torch.float32
    for row, (items, query) in enumerate(zip(candidates, QUERIES, strict=True)):
        terms = [word for word in query.lower().split() if word in reference.vocab_dict]
        expected = reference.get_scores(terms) if terms else np.zeros(len(TEXTS))
        assert scores[row].tolist() == pytest.approx(expected[items].tolist(), rel=1e-5), query
    assert scores[0].argmax() == 0  # both words, short text
    assert scores[2].eq(0).all()


def test_bm25_reads_anonymised_words(tmp_path):
    (tmp_path / "catalog").mkdir()
    np.save(
        tmp_path / "catalog" / "item_words-000000.npy",
        np.array([[5, 9, 0], [7, 0, 0], [0, 0, 0], [9, 9, 7]], np.int32),
    )
    np.save(tmp_path / "catalog" / "query_words-000000.npy", np.array([[9, 0], [8, 7]], np.int32))
    scores = build_bm25(
        tmp_path, Manifest(raw={"text": {"num_words": 9}, "counts": {"items": 4, "queries": 2}}, hash="")
    )(make_batch([[0, 1, 2, 3]] * 2, [0, 1]))
    assert (scores > 0).tolist() == [[True, False, False, True], [False, True, False, True]]
    assert scores[1, 1] > scores[1, 3]  # the shorter text


def test_bm25_without_query_or_text_scores_zero():
    scorer = Bm25([[0, 1], [2]], [[0]], num_terms=3)
    assert scorer(make_batch([[0, 1], [0, 1]], [NO_QUERY, 0])).gt(0).tolist() == [
        [False, False],
        [True, False],
    ]
    assert not Bm25([[], []], [[]], num_terms=0)(make_batch([[0, 1]], [0])).any()


def test_popularity_is_the_number_of_training_rec_clicks(tmp_path):
    folder = make_tiny_folder(tmp_path)
    clicks = pq.read_table(folder / "catalog" / "items.parquet")["train_rec_clicks"].to_pylist()
    task, build = BASELINES["popularity"]
    scores = build(folder, read_manifest(folder))(make_batch([[3, 50, 7]], [NO_QUERY]))
    assert task == REC
    assert scores.tolist() == [[clicks[3], clicks[50], clicks[7]]]


def test_lightgcn_is_the_dot_product_of_the_full_table(tmp_path):
    folder = make_tiny_folder(tmp_path)
    manifest = read_manifest(folder)
    table = load_cf(folder, manifest)
    scores = BASELINES["lightgcn"][1](folder, manifest)(
        make_batch([[3, 50], [7, 8]], [NO_QUERY] * 2, user=[4, 5])
    )
    assert scores[1, 0].item() == pytest.approx(float(table.user[5] @ table.item[7]), rel=1e-5)


def test_lightgcn_of_another_split_is_refused(tmp_path):
    folder = make_tiny_folder(tmp_path)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["split"]["fingerprint"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match="another split"):
        BASELINES["lightgcn"][1](folder, read_manifest(folder))
