"""Evaluation documents → rows of tables."""

from trainer.evaluation.summary import rows_of, table

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
