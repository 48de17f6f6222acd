"""Every event ranked once, on any number of ranks; the report and its files; the baselines on the same
candidates."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import trainer.runs.weights
from data_shards.schema import REC, SRC, TASKS, read_manifest
from tests.tiny_folder import make_tiny_folder
from trainer.batch import Batch
from trainer.config import Config, DataConfig, RunConfig
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.errors import RunError
from trainer.evaluation import lists
from trainer.evaluation.evaluated_weights import warnings_of
from trainer.evaluation.metrics import METRICS
from trainer.evaluation.ranking import autocast_scorer, rank_events, share_reached, validate
from trainer.evaluation.sampled import (
    baseline_reports,
    config_hash,
    evaluate_run,
    report,
    task_reports,
    write_evaluation,
)
from trainer.evaluation.summary import beams_words, protocol_line
from trainer.models.contract import UNREACHED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def manifest(folder):
    return read_manifest(folder)


def stream_of(folder, manifest, batch_size=7, rank=0, world_size=1) -> EvalStream:
    return EvalStream(
        PreparedFolder.at(folder), "test", DataConfig(history_max=4), batch_size, rank, world_size
    )


def item_id_scorer(batch: Batch) -> torch.Tensor:
    return batch.candidates.float()


def stand_in(score) -> SimpleNamespace:
    """What evaluation asks of a model."""
    return SimpleNamespace(
        title="stand-in",
        score=score,
        prepare=lambda batch: batch,
        beams=lambda catalogue=False: None,
        tasks=(REC, SRC),
    )


def test_every_event_is_ranked_once_and_rightly(folder, manifest):
    seen: list[tuple[int, int]] = []
    ranks = rank_events(
        item_id_scorer, stream_of(folder, manifest), progress=lambda done, total: seen.append((done, total))
    )
    stored = PreparedFolder.at(folder).columns("test", ["event_id", "task", "user", "item", "negatives"])
    order = np.argsort(stored["event_id"])
    for name in ("event_id", "task", "user", "item"):
        assert np.array_equal(getattr(ranks, name), stored[name][order]), name
    expected = 1 + (stored["negatives"] > stored["item"][:, None]).sum(1)
    assert np.array_equal(ranks.rank, expected[order])
    assert (ranks.num_tied == 1).all()
    assert seen == [(n, 6) for n in range(1, 7)]  # 40 events, 7 a batch


def test_ranks_do_not_depend_on_processes_or_batch_size(folder, manifest):
    alone = rank_events(item_id_scorer, stream_of(folder, manifest, batch_size=40), num_best=5)
    world_size = 3
    values: list[object] = [None] * world_size
    barrier = threading.Barrier(world_size)

    def run(rank: int):
        def gather(value):
            values[rank] = value
            barrier.wait(timeout=30)
            return list(values)

        stream = stream_of(folder, manifest, 6, rank, world_size)
        return rank_events(item_id_scorer, stream, gather, num_best=5)

    with ThreadPoolExecutor(world_size) as pool:
        for together in pool.map(run, range(world_size)):
            for name, column in vars(alone).items():
                assert np.array_equal(getattr(together, name), column), name


def test_a_repeated_or_lost_event_is_noticed(folder, manifest):
    batches = list(stream_of(folder, manifest))
    with pytest.raises(AssertionError, match="twice"):
        rank_events(item_id_scorer, [batches[0], batches[0]])
    short = stream_of(folder, manifest)
    short.num_batches -= 1
    with pytest.raises(AssertionError, match="35 of 40"):
        rank_events(item_id_scorer, short)


def test_a_nan_score_is_an_error_that_names_the_model_and_the_event(folder, manifest):
    sound = rank_events(item_id_scorer, stream_of(folder, manifest)).event_id

    def broken(batch: Batch, wrong: tuple[int, ...]) -> torch.Tensor:
        chosen = torch.isin(batch.event_id, torch.tensor(wrong))[:, None]
        return item_id_scorer(batch).masked_fill(chosen & (torch.arange(100) > 97), torch.nan)

    wrong = (int(sound[9]), int(sound[3]))
    named = rf"BM25 gives NaN as the score of 2 candidate.* of event {sound[3]}, and so in 2 of 40 events"
    for rank in (rank_events, validate):
        with pytest.raises(RunError, match=named):
            rank(partial(broken, wrong=wrong), stream_of(folder, manifest), model="BM25")
    rank_events(partial(broken, wrong=(-1,)), stream_of(folder, manifest))  # fillers, which are no events


def test_what_beams_reach_is_reported(folder, manifest):
    def decoder(batch: Batch) -> torch.Tensor:
        return item_id_scorer(batch).masked_fill(torch.arange(100) % 4 > 0, UNREACHED)

    ranks = rank_events(decoder, stream_of(folder, manifest))
    document = report(task_reports(ranks), PreparedFolder.at(folder), "test", Config())
    assert "num_beams" not in document["protocol"] and "share_reached" not in document["rec"]
    assert beams_words(document) == ""
    document = report(
        task_reports(ranks, num_beams=25), PreparedFolder.at(folder), "test", Config(), num_beams=25
    )
    assert document["protocol"]["num_beams"] == 25
    assert (document["rec"]["share_reached"], document["src"]["share_reached"]) == (0.25, 0.25)
    assert "; 25 beams reach .250 and .250 of the candidates; 95 %" in protocol_line(document)
    document["protocol"]["num_beams"] = 0
    assert beams_words(document) == "every candidate is spelled"


def test_a_candidate_that_is_none_counts_neither_as_reached_nor_as_missed():
    scores = torch.tensor([[UNREACHED, 0.3, -torch.inf], [-2.0, -3.0, 0.0], [-torch.inf] * 3])
    assert share_reached(scores).tolist() == [0.5, 1.0, 1.0]


def test_a_constant_model_is_at_chance(folder, manifest):
    ranks = rank_events(lambda batch: torch.zeros(batch.candidates.shape), stream_of(folder, manifest))
    assert (ranks.rank == 50.5).all()
    assert (ranks.num_tied == 100).all()
    found = task_reports(ranks)["rec"]
    assert (found["tie_rate"], found["recall@10"]) == (1.0, pytest.approx(0.1))
    during_training = validate(lambda batch: torch.zeros(batch.candidates.shape), stream_of(folder, manifest))
    assert during_training["src/recall@10"] == pytest.approx(0.1)


def test_one_task_only(folder, manifest):
    whole = rank_events(item_id_scorer, stream_of(folder, manifest)).of_task(SRC)
    part = rank_events(item_id_scorer, stream_of(folder, manifest), task=SRC)
    assert np.array_equal(part.event_id, whole.event_id)
    assert np.array_equal(part.rank, whole.rank)


@pytest.mark.parametrize(("num_best", "num_kept"), [(3, 3), (1000, 100)])
def test_lists_are_the_best_candidates_with_their_scores(folder, manifest, tmp_path, num_best, num_kept):
    at = PreparedFolder.at(folder)
    ranks = rank_events(item_id_scorer, stream_of(folder, manifest), num_best=num_best)
    document = report(task_reports(ranks), at, "test", Config())
    write_evaluation(tmp_path, at, "test", ranks, document, num_best=num_best)
    table, ids = pq.read_table(tmp_path / "lists-test.parquet"), at.item_ids()
    assert json.loads(table.schema.metadata[b"gensr.protocol"]) == document["protocol"]
    stored = at.columns("test", ["event_id", "item", "negatives"])
    of_event = dict(iter(table.to_pandas().groupby("event_id")))
    assert len(of_event) == 40
    for event_id, item, negatives in zip(*stored.values(), strict=True):
        rows = of_event[event_id]
        best = sorted([item, *negatives], reverse=True)[:num_kept]  # the scorer likes high row numbers
        assert rows["place"].tolist() == list(range(1, num_kept + 1))
        assert rows["item_id"].tolist() == [ids[row] for row in best]
        assert rows["score"].tolist() == best
        assert rows["clicked"].tolist() == [row == item for row in best]
    events = pq.read_table(tmp_path / "evaluation-test.parquet").to_pandas()
    found = table.to_pandas().query("clicked").merge(events, on=["event_id", "task", "user_id", "item_id"])
    assert (found["place"] == found["rank"]).all()
    assert len(found) == (events["rank"] <= num_kept).sum() > 0


def test_a_row_group_of_lists_holds_whole_events(folder, manifest, tmp_path, monkeypatch):
    at = PreparedFolder.at(folder)
    ranks = rank_events(item_id_scorer, stream_of(folder, manifest), num_best=2)
    document = report(task_reports(ranks), at, "test", Config())
    tables = []
    for events_at_once in (40, 7):
        monkeypatch.setattr(lists, "EVENTS_AT_ONCE", events_at_once)
        write_evaluation(tmp_path, at, "test", ranks, document, num_best=2)
        tables.append(pq.read_table(tmp_path / "lists-test.parquet"))
        assert pq.ParquetFile(tmp_path / "lists-test.parquet").num_row_groups == -(-40 // events_at_once)
    assert tables[0].equals(tables[1])


def test_validation_metrics_are_flat_and_average_the_tasks_present(folder, manifest):
    metrics = validate(item_id_scorer, stream_of(folder, manifest))
    assert set(metrics) == {f"{task}/{name}" for task in ("rec", "src", "mean") for name in METRICS}
    assert metrics["mean/ndcg@10"] == pytest.approx((metrics["rec/ndcg@10"] + metrics["src/ndcg@10"]) / 2)
    searches = [batch.take(batch.task == SRC) for batch in stream_of(folder, manifest)]
    alone = validate(item_id_scorer, searches)
    assert alone["mean/mrr"] == alone["src/mrr"] == pytest.approx(metrics["src/mrr"])
    assert not any(name.startswith("rec/") for name in alone)


def test_report_and_files(folder, manifest, tmp_path):
    ranks = rank_events(item_id_scorer, stream_of(folder, manifest))
    document = report(
        task_reports(ranks),
        PreparedFolder.at(folder),
        "test",
        Config(),
        baseline_reports(PreparedFolder.at(folder), "test"),
    )
    path = write_evaluation(tmp_path, PreparedFolder.at(folder), "test", ranks, document)
    written = json.loads(path.read_text())
    protocol = written["protocol"]
    assert (protocol["candidates"], protocol["num_negatives"], protocol["ties"], protocol["scores"]) == (
        "sampled",
        99,
        "expected",
        "fp32",
    )
    assert (protocol["split"], protocol["split_fingerprint"], protocol["manifest_hash"]) == (
        "test",
        manifest.fingerprint,
        manifest.hash,
    )
    for task in TASKS:
        low, high = written[task]["ci95"]["ndcg@10"]
        assert low <= written[task]["ndcg@10"] <= high
        assert written[task]["num_events"] == 20
    assert {name: list(tasks) for name, tasks in written["baselines"].items()} == {
        "popularity": ["rec"],
        "lightgcn": ["rec"],
        "lightgcn_history": ["rec"],
        "bm25": ["src"],
    }
    assert all(metric in written["baselines"]["bm25"]["src"] for metric in METRICS)

    table = pq.read_table(tmp_path / "evaluation-test.parquet").to_pydict()
    assert list(table) == ["task", "user_id", "item_id", "rank", "num_tied", "event_id"]
    assert table["user_id"] == [f"u{user}" for user in ranks.user]
    assert table["item_id"] == [f"i{item}" for item in ranks.item]
    assert table["rank"] == ranks.rank.tolist()
    assert table["task"] == [TASKS[int(task)] for task in ranks.task]


def test_lightgcn_is_left_out_without_a_table(folder, tmp_path):
    bare = make_tiny_folder(tmp_path)
    (bare / "cf" / "lightgcn.safetensors").unlink()
    assert set(baseline_reports(PreparedFolder.at(bare), "valid")) == {"popularity", "bm25"}


def test_configuration_hash_ignores_folders_only():
    assert config_hash(Config()) == config_hash(
        Config(run=RunConfig(dir="elsewhere"), data=DataConfig(dir="there"))
    )
    assert config_hash(Config()) != config_hash(Config(run=RunConfig(seed=1)))


def test_bf16_runs_are_scored_under_autocast():
    seen = []

    def score(batch: Batch) -> torch.Tensor:
        seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return torch.zeros(1, 1)

    for precision in ("bf16", "fp32"):
        autocast_scorer(stand_in(score), "cpu", precision)(SimpleNamespace(to=lambda device: None))  # type: ignore[arg-type]
    assert seen == [torch.bfloat16, torch.float32]


def test_evaluate_run_writes_the_files(folder, manifest, tmp_path, monkeypatch):
    config = Config(data=DataConfig(dir=str(folder), history_max=4))
    model = stand_in(item_id_scorer)
    monkeypatch.setattr(trainer.runs.weights, "load_run_config", lambda run_dir: config)
    monkeypatch.setattr(
        trainer.runs.weights,
        "load_run_model",
        lambda run_dir, device: (model, config, PreparedFolder.at(folder)),
    )
    document = evaluate_run(tmp_path, "valid")
    assert json.loads((tmp_path / "evaluation-valid.json").read_text()) == document
    assert document["rec"]["num_events"] + document["src"]["num_events"] == manifest.num_events("valid")
    assert document["protocol"]["config_hash"] == config_hash(config)
    assert set(document["baselines"]) == {"popularity", "lightgcn", "lightgcn_history", "bm25"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluation-valid.json",
        "evaluation-valid.parquet",
    ]
    with pytest.raises(RunError, match="valid or test"):
        evaluate_run(tmp_path, "train")
    evaluate_run(tmp_path, "valid", with_baselines=False, num_best=10**9)  # all there are
    rows = pq.read_metadata(tmp_path / "lists-valid.parquet").num_rows
    assert rows == manifest.num_events("valid") * 100


def test_an_evaluation_says_which_weights_it_is_of(folder, tmp_path, monkeypatch):
    """RUN/model is the best so far: while a run trains, after it stopped, and after it was trained on."""
    config = Config(data=DataConfig(dir=str(folder), history_max=4))
    loaded = (stand_in(item_id_scorer), config, PreparedFolder.at(folder))
    monkeypatch.setattr(trainer.runs.weights, "load_run_config", lambda run_dir: config)
    monkeypatch.setattr(trainer.runs.weights, "load_run_model", lambda run_dir, device: loaded)
    (tmp_path / "model").mkdir()

    def stand(step: int, status: str) -> None:
        (tmp_path / "model" / "model.json").write_text(json.dumps({"step": step}))
        (tmp_path / "status.json").write_text(json.dumps({"status": status}))

    def evaluated() -> tuple[dict, list[str]]:
        protocol = evaluate_run(tmp_path, "valid", with_baselines=False)["protocol"]
        return protocol, warnings_of(tmp_path, "valid", protocol)

    stand(1200, "running")
    protocol, warnings = evaluated()
    assert (protocol["model_step"], protocol["run_status"]) == (1200, "running")
    assert warnings == [
        f"warning: {tmp_path} is not finished (it is running, or was killed). "
        "This is its best model so far, of step 1,200"
    ]
    stand(1600, "stopped")
    (outdated,) = warnings_of(tmp_path, "valid", {**protocol, "run_status": "finished"})
    assert "is of step 1,200, RUN/model is now of step 1,600" in outdated
    assert "it has stopped" in evaluated()[1][0]
    stand(1600, "finished")
    assert evaluated()[1] == []
    (tmp_path / "status.json").unlink()
    (tmp_path / "model" / "model.json").write_text("{}")  # an older run
    assert evaluated()[1] == []


def test_popularity_ranks_by_clicks(folder, manifest):
    train = PreparedFolder.at(folder).columns("train", ["task", "item"])
    clicks = np.bincount(train["item"][train["task"] == REC], minlength=manifest.num_items)
    stored = PreparedFolder.at(folder).columns("test", ["task", "item", "negatives"])
    rec = stored["task"] == REC
    mine, others = clicks[stored["item"][rec]][:, None], clicks[stored["negatives"][rec]]
    above, tied = (others > mine).sum(1), 1 + (others == mine).sum(1)
    places = [np.arange(1, t + 1) + a for a, t in zip(above, tied, strict=True)]
    reported = baseline_reports(PreparedFolder.at(folder), "test")["popularity"]["rec"]
    assert reported["recall@20"] == pytest.approx(np.mean([(of <= 20).mean() for of in places]))
    assert reported["mrr"] == pytest.approx(np.mean([(1 / of).mean() for of in places]))
    assert reported["tie_rate"] > 0.5
