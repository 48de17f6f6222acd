"""Ranking the whole catalogue, against a loop that spells the protocol out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from data_shards.schema import SPLITS, read_manifest
from tests.runs import make_run
from trainer.analysis.report.asked import ask
from trainer.data import EvalStream
from trainer.errors import RunError
from trainer.evaluation import full as module
from trainer.evaluation.full import evaluate_full
from trainer.evaluation.summary import full_lines, protocol_line
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import load_run_model
from trainer.serving.recommend import Recommender

NUM_EVENTS = 24


@pytest.fixture(scope="module")
def run_dir(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("full"), prepared)


@pytest.fixture(scope="module")
def document(run_dir: Path) -> dict[str, Any]:
    return evaluate_full(run_dir, max_events=NUM_EVENTS, num_best=5)


def expected_ranks(run_dir: Path) -> pd.DataFrame:
    """event_id → rank by GenSR and by LightGCN among all items that the user had not clicked before, the
    clicked one always among them."""
    model, config, folder = load_run_model(run_dir)
    clicks = pd.concat(
        [pd.DataFrame(folder.columns(split, ["event_id", "user", "item", "time"])) for split in SPLITS]
    )
    cf = folder.cf()
    rows = []
    for batch in EvalStream(folder, "test", config.data, 1, max_events=NUM_EVENTS):
        event = clicks[clicks.event_id == int(batch.event_id)].iloc[0]
        earlier = set(clicks[(clicks.user == event.user) & (clicks.time < event.time)]["item"])
        items = torch.tensor(
            [
                item
                for item in range(folder.manifest.num_items)
                if item not in earlier or item == event["item"]
            ]
        )
        with torch.inference_mode():
            by_model = model.score(batch.with_candidates(items[None], torch.zeros(1, len(items))))[0]
        by_cf = cf.item[items] @ cf.user[int(event.user)]
        place = int((items == event["item"]).nonzero())
        ranks = [
            1 + int((s > s[place]).sum()) + (int((s == s[place]).sum()) - 1) / 2 for s in (by_model, by_cf)
        ]
        rows.append((int(event.event_id), int(batch.task), *ranks))
    return pd.DataFrame(rows, columns=["event_id", "task", "gensr", "lightgcn"])


def test_ranks_are_those_of_a_plain_loop(run_dir: Path, document: dict[str, Any]) -> None:
    """Retrieval finds every item of this small world, so nothing is missed."""
    expected = expected_ranks(run_dir).set_index("event_id")
    written = pd.read_parquet(run_dir / "evaluation-test-full.parquet").set_index("event_id")
    assert len(written) == NUM_EVENTS
    lists = pd.read_parquet(run_dir / "lists-test-full.parquet")  # five are fewer than coverage needs
    assert lists["place"].tolist() == [1, 2, 3, 4, 5] * NUM_EVENTS
    assert written["rank"].to_numpy() == pytest.approx(
        expected.loc[written.index, "gensr"].to_numpy(), abs=0.5
    )
    for name, task in (("rec", 0), ("src", 1)):
        mine = expected[expected.task == task]
        assert document[name]["num_events"] == len(mine)
        assert document[name]["recall@10"] == pytest.approx((mine.gensr <= 10).mean(), abs=1.5 / len(mine))
    rec = expected[expected.task == 0]
    assert document["baselines"]["lightgcn"]["rec"]["mrr"] == pytest.approx(
        (1 / rec.lightgcn).mean(), abs=1e-6
    )
    assert set(document["baselines"]) == {"popularity", "lightgcn", "lightgcn_history", "bm25"}


def test_it_cannot_be_taken_for_the_sampled_one(run_dir: Path, document: dict[str, Any]) -> None:
    before = json.loads((run_dir / "evaluation-test.json").read_text())
    assert before["protocol"]["candidates"] == "sampled"  # as make_run wrote it
    assert json.loads((run_dir / "evaluation-test-full.json").read_text()) == document
    protocol = document["protocol"]
    assert protocol["candidates"] == "full"
    assert "num_negatives" not in protocol
    assert (protocol["num_items"], protocol["num_events"]) == (
        read_manifest(run_dir.parents[1] / "data").num_items,
        NUM_EVENTS,
    )
    assert protocol_line(document).startswith("full: ")
    assert any("retrieval finds" in line for line in full_lines(document))
    assert 0 < document["rec"]["coverage@10"] <= 1
    assert document["baselines"]["popularity"]["rec"]["coverage@10"] < document["rec"]["coverage@10"]
    assert document["baselines"]["popularity"]["rec"]["mean_clicks@10"] > document["rec"]["mean_clicks@10"]


def test_what_retrieval_misses_counts_nothing(
    run_dir: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NUM_CANDIDATES", 3)
    monkeypatch.setattr(module, "RETRIEVAL_CUTOFFS", (3, 5))
    monkeypatch.delattr(module, "baseline_reports")  # not asked for: not computed
    few = evaluate_full(run_dir, max_events=NUM_EVENTS, with_baselines=False)
    assert "baselines" not in few
    ranks = pd.read_parquet(run_dir / "evaluation-test-full.parquet")["rank"]
    assert set(np.unique(ranks)) <= {1.0, 1.5, 2.0, 2.5, 3.0, np.inf}
    for task in ("rec", "src"):
        assert few[task]["retrieval"]["recall@3"] == pytest.approx(few[task]["recall@5"])
        assert few[task]["retrieval"]["recall@3"] <= few[task]["retrieval"]["recall@5"]
        assert few[task]["mrr"] <= few[task]["recall@5"]
    assert np.isinf(ranks).any()


def test_a_nan_score_is_an_error_and_no_answer(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a largest value, it would be the first of every list."""
    monkeypatch.setattr(GenSR, "score", lambda self, batch: torch.full(batch.candidates.shape, torch.nan))
    with pytest.raises(RunError, match=r"GenSR gives NaN as the score of .* of event \d+,"):
        evaluate_full(run_dir, max_events=NUM_EVENTS, with_baselines=False)
    with pytest.raises(RunError, match=r"GenSR gives NaN as the score of .* of event \d+,"):
        ask(run_dir, NUM_EVENTS)
    recommender = Recommender.from_run(run_dir)
    request = {"history": [{"item_id": "i3", "task": "rec"}], "task": "rec"}
    with pytest.raises(RunError, match="GenSR gives NaN as a score for request 1"):
        recommender.recommend(request)
    with pytest.raises(RunError, match="GenSR gives NaN as a score for request 1"):
        recommender.score([request | {"candidates": ["i1"]}])
    parsed = recommender.scorer.parse(request, "", needs_candidates=False)
    with pytest.raises(RunError, match="GenSR gives NaN as a score for the request"):
        recommender.scorer.score_catalogue(parsed)


def test_what_the_user_clicked_before_is_left_out(run_dir: Path) -> None:
    _, config, folder = load_run_model(run_dir)
    clicks = module.read_clicks(folder)
    everything = pd.DataFrame({name: getattr(clicks, name) for name in ("event_id", "user", "item", "time")})
    for batch in EvalStream(folder, "test", config.data, 4, max_events=8):
        for event_id, item in zip(batch.event_id.tolist(), batch.clicked.tolist(), strict=True):
            event = everything[everything.event_id == event_id].iloc[0]
            assert event["item"] == item
            mine = everything[(everything.user == event.user) & (everything.time < event.time)]
            assert clicks.before(event_id).tolist() == mine["item"].tolist()


@pytest.mark.parametrize(
    ("change", "message"), [({"split": "train"}, "split must be valid or test"), ({}, "one process")]
)
def test_refusals(
    run_dir: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not change:
        for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
            monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=message):
        evaluate_full(run_dir, **change)
