"""Each baseline against a direct computation on a small catalogue."""

import json
from dataclasses import replace
from typing import Any

import bm25s
import numpy as np
import pytest
import torch

from data_shards.schema import NO_QUERY, REC, SRC
from tests.tiny_folder import make_tiny_folder
from trainer.batch import Batch, no_tables
from trainer.config import DataConfig
from trainer.data.folder import PreparedFolder
from trainer.errors import DataError
from trainer.evaluation.baselines import build_baseline
from trainer.models.baselines.bm25 import Bm25, Bm25Settings
from trainer.models.contract import World

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
        history_queries=none,
        history_mask=none.bool(),
        candidates=items,
        labels=labels,
    )


def bm25_of(texts: list[str], queries: list[str]) -> Bm25:
    """Of natural text: the world of two lists."""
    return Bm25(Bm25Settings(), world_of(len(texts), len(queries), texts=lambda: (texts, queries)))


def world_of(num_items: int, num_queries: int, num_words: int = 0, **change: Any) -> World:
    nothing: dict[str, Any] = dict(tokenizer=None, clicks=lambda: None, texts=lambda: ([], []), vocab_size=10)
    counts: dict[str, Any] = dict(
        num_users=3, num_items=num_items, num_queries=num_queries, num_words=num_words, num_categories=0
    )
    tables = change.pop("tables", no_tables(num_items, num_queries))
    return World(**counts, data=DataConfig(), tables=tables, **{**nothing, **change})


def test_bm25_of_candidates_equals_bm25s_over_the_whole_catalogue():
    scorer = bm25_of(TEXTS, QUERIES)
    reference = bm25s.BM25(method="lucene")
    words = [text.lower().replace(",", "").split() for text in TEXTS]
    reference.index(words, show_progress=False)
    candidates = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4], [4, 0, 1, 2, 3]]
    scores = scorer.score(make_batch(candidates, [0, 1, 2, 3]))
    assert scores.dtype == torch.float32
    for row, (items, query) in enumerate(zip(candidates, QUERIES, strict=True)):
        terms = [word for word in query.lower().split() if word in reference.vocab_dict]
        expected = reference.get_scores(terms) if terms else np.zeros(len(TEXTS))
        assert scores[row].tolist() == pytest.approx(expected[items].tolist(), rel=1e-5), query
    assert scores[0].argmax() == 0  # both words, short text
    assert scores[2].eq(0).all()


def test_bm25_of_the_whole_catalogue_is_that_of_its_items():
    scorer = bm25_of(TEXTS, QUERIES)
    batch = make_batch([list(range(len(TEXTS)))] * 3, [0, 3, NO_QUERY])
    torch.testing.assert_close(scorer.score_catalogue(batch), scorer.score(batch))


def test_bm25_reads_anonymised_words():
    words = dict(
        item_words=torch.tensor([[5, 9, 0], [7, 0, 0], [0, 0, 0], [9, 9, 7]]),
        query_words=torch.tensor([[9, 0], [8, 7]]),
    )
    tables = replace(no_tables(4, 2), **words)
    scorer = Bm25(Bm25Settings(), world_of(4, 2, num_words=9, tables=tables))
    scores = scorer.score(make_batch([[0, 1, 2, 3]] * 2, [0, 1]))
    assert (scores > 0).tolist() == [[True, False, False, True], [False, True, False, True]]
    assert scores[1, 1] > scores[1, 3]  # the shorter text


def test_bm25_without_query_or_text_scores_zero():
    scores = bm25_of(["red lamp", "blue"], ["red"]).score(make_batch([[0, 1], [0, 1]], [NO_QUERY, 0]))
    assert scores.gt(0).tolist() == [[False, False], [True, False]]
    assert not bm25_of(["", ""], [""]).score(make_batch([[0, 1]], [0])).any()


def test_popularity_is_the_number_of_training_rec_clicks(tmp_path):
    folder = PreparedFolder.at(make_tiny_folder(tmp_path))
    clicks = folder.clicks()
    expected = [int(((clicks.item == item) & (clicks.task == REC)).sum()) for item in (3, 50, 7)]
    model = build_baseline("popularity", folder)
    batch = make_batch([[3, 50, 7]], [NO_QUERY])
    assert model.score(batch).tolist() == [expected]
    assert model.score_catalogue(batch)[0, [3, 50, 7]].tolist() == expected


def test_lightgcn_is_the_dot_product_of_the_full_table(tmp_path):
    folder = PreparedFolder.at(make_tiny_folder(tmp_path))
    table = folder.cf()
    batch = make_batch([[3, 50], [7, 8]], [NO_QUERY] * 2, user=[4, 5])
    by_user = build_baseline("lightgcn", folder).score(batch)
    ratio = (table.user[5] @ table.item[7]) / (table.user[4] @ table.item[3])
    assert (by_user[1, 0] / by_user[0, 0]).item() == pytest.approx(float(ratio), rel=1e-4)


def test_lightgcn_by_history_is_the_mean_of_its_items(tmp_path):
    folder = PreparedFolder.at(make_tiny_folder(tmp_path))
    model, item = build_baseline("lightgcn_history", folder), folder.cf().item
    history: dict[str, Any] = dict(
        history_items=torch.tensor([[2, 9, 0], [0, 0, 0]]),
        history_tasks=torch.zeros(2, 3, dtype=torch.int64),
        history_mask=torch.tensor([[True, True, False], [False] * 3]),
    )
    batch = replace(make_batch([[3, 50], [7, 8]], [NO_QUERY] * 2), **history)
    scores = model.score(batch)
    taste = (item[2] + item[9]) / 2
    assert (scores[0, 0] / scores[0, 1]).item() == pytest.approx(
        float((taste @ item[3]) / (taste @ item[50])), rel=1e-4
    )
    assert scores[1].eq(0).all()  # no history: all tie
    torch.testing.assert_close(model.score_catalogue(batch)[0, [3, 50]], scores[0])


def test_lightgcn_of_another_split_is_refused(tmp_path):
    folder = make_tiny_folder(tmp_path)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["split"]["fingerprint"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match="another split"):
        build_baseline("lightgcn", PreparedFolder.at(folder))
