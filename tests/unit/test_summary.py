"""Evaluation documents → rows of tables."""

import os
import shutil
import sys

import pytest

from trainer.evaluation.summary import SHOWN_METRICS, protocol_line, rows_of, short, table

METRICS = {"ndcg@10": 0.5, "num_events": 7}


def document(title: str | None) -> dict[str, object]:
    baselines = {"popularity": {"rec": METRICS}, "bm25": {"src": METRICS}}
    return {"protocol": {"model_title": title}, "rec": METRICS, "src": METRICS, "baselines": baselines}


def test_the_run_s_own_model_has_a_name_in_tables() -> None:
    names = [(row.model, row.task) for row in rows_of(document("SASRec"))]
    assert names == [("SASRec", "rec"), ("popularity", "rec"), ("SASRec", "src"), ("BM25", "src")]
    assert rows_of(document(None))[0].model == "GenSR"  # evaluated before documents said it
    assert rows_of(document("SASRec"), "runs/a")[0].model == "runs/a"
    assert "  SASRec" in "\n".join(table(rows_of(document("SASRec")), ["ndcg@10"]))


def test_a_baseline_that_is_the_model_itself_is_shown_once() -> None:
    names = [(row.model, row.task) for row in rows_of(document("BM25"))]
    assert names == [("BM25", "rec"), ("popularity", "rec"), ("BM25", "src")]
    other = document("BM25") | {"src": METRICS | {"ndcg@10": 0.4}}
    assert [row.model for row in rows_of(other) if row.task == "src"] == ["BM25", "BM25"]


@pytest.mark.parametrize(("columns", "shown"), [(80, 2), (120, 4)])
def test_a_table_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, shown: int) -> None:
    metrics = dict.fromkeys(SHOWN_METRICS, 0.5) | {"ci95": {name: [0.4, 0.6] for name in SHOWN_METRICS}}
    evaluation = {"protocol": {"model_title": "GenSR"}, "rec": metrics | {"num_events": 7}}
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((columns, 24)))
    lines = table(rows_of(evaluation))
    assert max(map(len, lines)) <= columns and lines[1].count("@") == shown
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert table(rows_of(evaluation))[1].count("@") == 4  # a file holds all


def test_a_column_has_one_number_of_decimals() -> None:
    assert [short(value) for value in (0.5124, 0.99961, 1.0, 0.0, -0.02)] == [
        ".512", "1.000", "1.000", ".000", "-.020"
    ]  # fmt: skip
    perfect = {"ndcg@10": 1.0, "recall@10": 1.0, "num_events": 7, "ci95": {"ndcg@10": [1.0, 1.0]}}
    rows = rows_of({"protocol": {"model_title": "GenSR"}, "rec": perfect})
    rows += rows_of({"protocol": {"model_title": "A"}, "rec": perfect | {"ndcg@10": 0.5, "ci95": {}}})
    head, first, second = table(rows, ["ndcg@10", "recall@10"])[1:]
    assert first == "  GenSR  1.000 [1.000, 1.000]  1.000"
    assert second == "  A      .500                  1.000"
    assert head.index("recall@10") == second.index("1.000")


def test_a_model_without_views_ranks_everything_itself() -> None:
    protocol = {"candidates": "full", "num_items": 5000, "ranked_by_model": 5000, "num_events": 7}
    protocol |= {"num_events_of_split": 7, "model_title": "SASRec"}
    assert "SASRec ranks them all;" in protocol_line({"protocol": protocol})
    protocol |= {"ranked_by_model": 400, "indexes": {"cf": {}}}
    assert "SASRec ranks the 400 that retrieval finds;" in protocol_line({"protocol": protocol})
