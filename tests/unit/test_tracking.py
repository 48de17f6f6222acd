"""The tracker against a real sqlite store: names, identity of data and code, secrets, resume, and a store
that fails."""

import errno
import json
import logging
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import OperationalError

from data_shards.schema import Manifest
from data_shards.settings import to_yaml
from trainer.config import Config, TrackingConfig
from trainer.configs import load_config
from trainer.errors import EnvironmentProblem, RunError
from trainer.experiments.import_runs import import_runs, target_of
from trainer.registry.promote import promote, rollback
from trainer.registry.store import open_model
from trainer.runs.run_folder import RunFolder
from trainer.tracking import delivery
from trainer.tracking import tracker as tracking
from trainer.tracking.delivery import JsonLines, Spool
from trainer.tracking.machine import measured, node_name
from trainer.tracking.store import (
    connect,
    metric_name,
    must_exist,
    one_line,
    read_run_file,
    sqlite_path,
    sqlite_uri,
    tracking_uri,
    training_page,
)
from trainer.tracking.tracker import Tracker, log_evaluation

MANIFEST = Manifest(
    raw={
        "source": {"name": "simulated"},
        "counts": {
            **{"users": 3, "items": 1200, "queries": 5},
            **{"train": {"rec": 9, "src": 0}, "valid": {"rec": 2, "src": 0}, "test": {"rec": 1, "src": 0}},
        },
        "split": {"fingerprint": "f" * 64},
        "seeds": {"negatives": 1},
    },
    hash="a" * 64,
)
FACTS = {
    "manifest": MANIFEST,
    "git": {"commit": "0123abc", "dirty": True, "diff": "+ a line"},
    "hardware": {"cpus": 2},
    "link": "https://me:pw@host/x",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def config_for(**tracking: str) -> Config:
    return load_config(None, [f"tracking.{key}={value}" for key, value in tracking.items()])


def run_folder(runs: Path, name: str) -> Path:
    folder = runs / name
    folder.mkdir()
    return folder


def arrived(run_dir: Path) -> None:
    """Wait until the sender has sent all there is."""
    deadline_s = time.monotonic() + 60
    while RunFolder(run_dir).spool.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_one_run_has_everything(runs: Path) -> None:
    run_dir = run_folder(runs, "first")
    (run_dir / "environment.json").write_text("{}")
    (run_dir / "loss.png").write_bytes(b"png")
    config = config_for()
    tracker = Tracker.start(config, run_dir, FACTS)
    tracker.log_metrics({"rec/recall@10": 0.5, "train/loss": 1.25}, step=20)
    tracker.log_metrics({"train/loss": 1.0}, step=40)
    tracker.log_artifact(run_dir / "loss.png", "plots")
    tracker.log_dict({"rec": {"ndcg@10": 0.3}}, "evaluation.json")
    tracker.finish("FINISHED")

    client = connect(tracking_uri(config, run_dir))
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params["optim.global_batch_size"] == "64"
    assert run.data.params["model.lora.rank"] == "0"
    assert run.data.metrics == {"rec/recall_at_10": 0.5, "train/loss": 1.0}
    assert [(p.step, p.value) for p in client.get_metric_history(tracker.run_id, "train/loss")] == [
        (20, 1.25),
        (40, 1.0),
    ]
    assert run.data.tags["manifest_hash"] == MANIFEST.hash
    assert run.data.tags["mlflow.source.git.commit"] == "0123abc"
    assert run.data.tags["git.dirty"] == "True"
    assert run.data.tags["link"] == "https://***@host/x"
    dataset = next(entry.dataset for entry in run.inputs.dataset_inputs if entry.tags[0].value == "training")
    assert (dataset.name, dataset.digest) == ("simulated", MANIFEST.hash[:36])
    assert {a.path for a in client.list_artifacts(tracker.run_id)} == {
        "code.diff",
        "config.yaml",
        "environment.json",
        "evaluation.json",
        "plots",
    }
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(runs / "mlartifacts")
    assert json.loads((run_dir / "tracking.json").read_text())["run_id"] == tracker.run_id
    assert not RunFolder(run_dir).spool.exists()


def test_a_run_says_who_how_and_what_and_names_its_datasets(runs: Path) -> None:
    """What MLflow's pages show as User, Source, Description and Datasets."""
    run_dir = run_folder(runs, "described")
    facts = {
        **FACTS,
        "user": "ada",
        "command": "/x/gensr train configs/a.yaml run.seed=1",
    }
    config = load_config(None, ["model.name=sasrec"])
    tracker = Tracker.start(config, run_dir, facts)
    tracker.finish("FINISHED")
    client = connect(tracking_uri(config, run_dir))
    run = client.get_run(tracker.run_id)
    tags = run.data.tags
    assert (tags["mlflow.user"], tags["mlflow.source.type"]) == ("ada", "LOCAL")
    assert tags["mlflow.source.name"] == "gensr train a.yaml"
    assert tags["mlflow.note.content"].startswith("**SASRec**: ")
    assert "on simulated: 3 users, 1,200 items, 5 queries" in tags["mlflow.note.content"]
    datasets = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert {context: dataset.name for context, dataset in datasets.items()} == {
        "training": "simulated",
        "validation": "simulated-valid",
        "test": "simulated-test",
    }
    counts = {"users": 3, "items": 1200, "queries": 5, "events": {"rec": 1, "src": 0}}
    assert json.loads(datasets["test"].profile)["counts"] == counts
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


@pytest.mark.parametrize(
    ("uri", "page"),
    [
        ("sqlite:////x/mlflow.db", "http://127.0.0.1:5000"),
        ("https://me:pw@mlflow.example.org/base/", "https://mlflow.example.org/base"),
    ],
)
def test_the_link_opens_the_page_of_training_runs(uri: str, page: str) -> None:
    """MLflow's own default for an experiment may be its page for language models."""
    assert training_page(uri, "7") == f"{page}/#/experiments/7/runs?workflowType=machine_learning"
    assert training_page(uri, "") == page


def test_resume_continues_the_run_without_doubles(runs: Path) -> None:
    run_dir = run_folder(runs, "resumed")
    first = Tracker.start(config_for(), run_dir, FACTS)
    for step in (10, 20, 30):
        first.log_metrics({"train/loss": float(step)}, step)
    arrived(run_dir)
    # killed here, after a checkpoint at step 20
    assert connect(tracking_uri(config_for(), run_dir)).get_run(first.run_id).info.status == "RUNNING"

    second = Tracker.start(config_for(), run_dir, FACTS, resume_run_id=first.run_id)
    assert second.run_id == first.run_id
    for step in (30, 40):
        second.log_metrics({"train/loss": float(step)}, step)
    second.finish("FINISHED")
    client = connect(tracking_uri(config_for(), run_dir))
    assert [p.step for p in client.get_metric_history(first.run_id, "train/loss")] == [10, 20, 30, 40]
    assert client.get_run(first.run_id).info.status == "FINISHED"


def test_a_run_that_goes_on_in_another_store_or_was_deleted_is_recorded_anew(runs: Path) -> None:
    run_dir = run_folder(runs, "moved")
    first = Tracker.start(config_for(), run_dir, FACTS)
    first.finish("KILLED")
    elsewhere = config_for(uri=f"sqlite:///{runs}/elsewhere.db")
    client, ids = connect(elsewhere.tracking.uri), [first.run_id]
    for step in (10, 20):
        tracker = Tracker.start(elsewhere, run_dir, FACTS, resume_run_id=first.run_id)
        tracker.log_metrics({"train/loss": 1.0}, step)
        tracker.finish("FINISHED")
        run = client.get_run(tracker.run_id)
        assert run.data.params["optim.lr"] == "0.001" and run.info.status == "FINISHED"
        assert [point.step for point in client.get_metric_history(tracker.run_id, "train/loss")] == [step]
        assert read_run_file(run_dir, elsewhere.tracking.uri) == tracker.run_id not in ids
        ids.append(tracker.run_id)
        client.delete_run(tracker.run_id)


def test_a_server_that_never_answers_costs_training_nothing(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and says nothing, from the start to the end. Nothing is lost: a later attempt
    sends the file."""
    monkeypatch.setattr(tracking, "OPEN_WAIT_S", 0.1)
    monkeypatch.setattr(tracking, "FINISH_WAIT_S", 0.1)
    run_dir = run_folder(runs, "tarpit")
    with socket.create_server(("127.0.0.1", 0)) as pit:
        tracker = Tracker.start(config_for(uri=f"http://127.0.0.1:{pit.getsockname()[1]}"), run_dir, FACTS)
        assert tracker.run_id == ""
        started_s = time.process_time()
        for step in range(500):
            tracker.log_metrics({"train/loss": 1.0, "train/lr": 2.0}, step)
        assert time.process_time() - started_s < 2.0  # one write each
        tracker.finish("FINISHED")
    records = [json.loads(line) for line in RunFolder(run_dir).spool.read_text().splitlines()]
    assert len([record for record in records if "metric" in record]) == 1000
    assert records[-1]["status"] == "FINISHED"


def test_a_failing_store_is_reported_once_and_caught_up(
    runs: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "RETRY_EVERY_S", 0.05)
    for wait in ("OPEN_WAIT_S", "FINISH_WAIT_S"):  # a busy machine is no slow store
        monkeypatch.setattr(tracking, wait, 240.0)
    run_dir = run_folder(runs, "unlucky")
    tracker = Tracker.start(config_for(), run_dir, FACTS)
    tracker.log_metrics({"train/loss": 3.0}, 1)
    arrived(run_dir)
    failed = threading.Event()

    def refuse(*args: object, **kwargs: object) -> None:
        failed.set()
        raise ConnectionError("https://me:pw@tracking.example refused")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(MlflowClient, "log_batch", refuse)
        for step in (2, 3):
            failed.clear()
            tracker.log_metrics({"train/loss": 3.0 - step}, step)
            assert failed.wait(120)
    assert len([r for r in caplog.records if "points are kept in" in r.message]) == 1
    assert "pw@" not in caplog.text

    tracker.finish("FINISHED")  # the store is back
    client = connect(tracking_uri(config_for(), run_dir))
    assert [p.step for p in client.get_metric_history(tracker.run_id, "train/loss")] == [1, 2, 3]
    assert not RunFolder(run_dir).spool.exists()


def test_a_record_that_no_store_takes_does_not_hold_up_the_others(
    runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = run_folder(runs, "odd")
    tracker = Tracker.start(config_for(), run_dir, FACTS)
    tracker.log_artifact(run_dir / "not there.png")
    tracker.log_metrics({"train/loss": 1.0}, 1)
    tracker.finish("FINISHED")
    client = connect(tracking_uri(config_for(), run_dir))
    assert client.get_run(tracker.run_id).data.metrics == {"train/loss": 1.0}
    assert "does not take artifact" in caplog.text


BAD_LINES = (
    "[1, 2]",
    "7",
    "null",
    "no json",
    json.dumps({"metric": ["x", "high", 1, 2]}),
    json.dumps({"metric": ["x", 1.0, 1]}),
    json.dumps({"metric": "x"}),
    json.dumps({"metric": ["a name; of *no* metric?", 1.0, 1, 2]}),
    json.dumps({"metric": ["x", 1.0, 1, 2**70]}),
    json.dumps({"params": 5}),
    json.dumps({"text": "no file"}),
)


def spoil(run_dir: Path) -> int:
    """A spool with records that nobody can send in front of a good one; how many they are."""
    long_line = json.dumps({"text": "x" * (delivery.MAX_BYTES + 10), "file": "long.txt"})
    good = {"metric": ["train/loss", 0.5, 1_700_000_000_000, 7]}
    with RunFolder(run_dir).spool.open("a") as spool:
        for line in (*BAD_LINES, long_line, json.dumps(good)):
            spool.write(line + "\n")
    return len(BAD_LINES) + 1


def test_what_cannot_be_sent_blocks_nothing_and_is_counted(
    runs: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MAX_BYTES", 10_000)
    run_dir = run_folder(runs, "spoiled")
    first = Tracker.start(config_for(), run_dir, FACTS)
    arrived(run_dir)
    number = spoil(run_dir)
    again = Tracker.start(config_for(), run_dir, FACTS, resume_run_id=first.run_id)
    again.log_metrics({"train/loss": 0.25}, 8)
    again.finish("FINISHED")
    client = connect(tracking_uri(config_for(), run_dir))
    points = client.get_metric_history(first.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in points) == [(7, 0.5), (8, 0.25)]
    assert not RunFolder(run_dir).spool.exists()
    assert f"{number} records of this run were left out" in caplog.text
    assert caplog.text.count("is left out, the rest is sent") == 1


def test_an_import_is_not_blocked_either(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the advised command, without --into, into the database beside the run."""
    monkeypatch.setattr(delivery, "MAX_BYTES", 10_000)
    run_dir = run_folder(runs, "imported")
    (run_dir / "config.yaml").write_text("{}")
    (run_dir / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n[]\n{"no": 1}\n')
    number = spoil(run_dir) + 1
    said: list[str] = []
    into = target_of(str(run_dir))
    assert into == tracking_uri(config_for(), run_dir)
    (done,) = import_runs(str(run_dir), into, said.append)
    assert (done.left_out, done.added) == (number, 2) and f"{number} records left out" in said[0]
    points = connect(into).get_metric_history(done.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in points) == [(1, 2.0), (7, 0.5)]


def test_an_import_sends_the_figures_of_a_repeated_evaluation(runs: Path) -> None:
    """They stand at the same step, and the file has the same size."""
    run_dir = run_folder(runs, "evaluated-again")
    (run_dir / "config.yaml").write_text("{}")
    (run_dir / "metrics.jsonl").touch()
    path, into = run_dir / "evaluation-test.json", target_of(str(run_dir))
    for number, value in enumerate((0.25, 0.75, 0.5)):
        path.write_text(json.dumps({"protocol": {}, "rec": {"num_events": 8, "mrr": value}}))
        os.utime(path, (1e9 + number, 1e9 + number))
        added = [import_runs(str(run_dir), into)[0].added for _ in range(2)]
        assert added == [1 if number else 2, 0]
        (done,) = import_runs(str(run_dir), into)
        client = connect(into)
        assert client.get_run(done.run_id).data.metrics["test/rec/mrr"] == value
        stored = client.download_artifacts(done.run_id, path.name, str(runs))
        assert json.loads(Path(stored).read_text())["rec"]["mrr"] == value


def test_a_long_line_that_is_still_written_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MAX_BYTES", 10)
    lines = JsonLines(tmp_path / "file")
    lines.path.write_text("x" * 25)
    assert lines.read() == ([], 0)
    lines.path.write_text("x" * 25 + '\n{"a": 1}\n')
    assert lines.read() == ([], 26) == lines.read()
    lines.position = 26
    assert lines.read() == ([{"a": 1}], 35) and lines.num_skipped == 1


def test_a_locked_database_neither_refuses_training_nor_turns_tracking_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "OPEN_WAIT_S", 0.2)
    monkeypatch.setattr(delivery, "RETRY_EVERY_S", 0.05)
    real, locked = delivery.connect, threading.Event()

    def connect_when_free(uri: str) -> object:
        if not locked.is_set():
            raise MlflowException("(sqlite3.OperationalError) database is locked")
        return real(uri)

    monkeypatch.setattr(delivery, "connect", connect_when_free)
    run_dir = run_folder(tmp_path, "locked")
    tracker = Tracker.start(config_for(), run_dir, FACTS)
    assert tracker.run_id == ""
    tracker.log_metrics({"train/loss": 1.0}, 1)
    assert "database is locked" in caplog.text and "points are kept in" in caplog.text
    locked.set()
    tracker.finish("FINISHED")
    run = real(tracking_uri(config_for(), run_dir)).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"train/loss": 1.0})


def test_a_refusal_that_comes_late_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "OPEN_WAIT_S", 0.1)
    late = threading.Event()

    def slow(uri: str) -> object:
        late.wait(30)
        raise MlflowException("API request failed with error code 401 != 200")

    monkeypatch.setattr(delivery, "connect", slow)
    tracker = Tracker.start(config_for(uri="http://127.0.0.1:9"), run_folder(tmp_path, "late"), FACTS)
    late.set()
    tracker.finish("FINISHED")
    assert "has not opened the run" in caplog.text and "error code 401" in caplog.text


@pytest.mark.parametrize("uri", ["sqlite:///{}/typo/mlflow.db", "{}/typo", "file://{}/typo"])
def test_a_typo_in_a_uri_makes_nothing(tmp_path: Path, uri: str) -> None:
    uri = uri.format(tmp_path)
    for verb in (
        lambda: promote("name", uri),
        lambda: rollback("name", uri),
        lambda: open_model("models:/name@champion", uri),
    ):
        with pytest.raises(RunError, match=f"there is no {tmp_path}/typo"):
            verb()
    if uri.startswith("sqlite"):
        with pytest.raises(RunError, match="there is no"):
            import_runs(uri, f"sqlite:///{tmp_path}/target.db")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("htp://mlflow", "unsupported URI 'htp://mlflow'"),
        ("sqlite:typo.db", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("postgresql://user:s3cret@host/db", "psycopg"),
    ],
)
def test_a_uri_that_names_no_store_is_explained(tmp_path: Path, uri: str, why: str) -> None:
    mine = run_folder(tmp_path, "mine")
    (mine / "config.yaml").write_text(to_yaml(config_for()))
    for verb in (
        lambda: promote("name", uri),
        lambda: open_model("models:/name@champion", uri),
        lambda: import_runs(str(mine), uri),
        lambda: Tracker.start(config_for(uri=uri), run_folder(tmp_path, "new"), FACTS),
    ):
        with pytest.raises(EnvironmentProblem) as refused:
            verb()
        assert "cannot use the tracking URI" in str(refused.value) and why in str(refused.value)
        assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", r"notes\.txt is not a database of MLflow"),
        ("no database, but as long as the head of one. " * 9, "file is not a database"),
    ],
)
def test_another_file_is_not_made_a_database(tmp_path: Path, content: str, why: str) -> None:
    path, into = tmp_path / "notes.txt", tmp_path / "new" / "mlflow.db"
    path.write_text(content)
    target = f"sqlite:///{into}"
    for verb in (lambda: promote("name", f"sqlite:///{path}"), lambda: import_runs(str(path), target)):
        with pytest.raises((RunError, EnvironmentProblem), match=why):
            verb()
    assert path.read_text() == content
    assert not into.parent.exists()


@pytest.mark.parametrize("reason", ["database or disk is full", "database is locked"])
def test_half_a_new_database_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """MLflow could not complete it later. Where another program is making it, it stays."""
    path = tmp_path / "mlflow.db"

    def half(*_: object, **__: object) -> None:
        path.write_bytes(b"half of the tables")
        raise OperationalError("CREATE TABLE", {}, sqlite3.OperationalError(reason))

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "search_experiments", half)
        with pytest.raises(EnvironmentProblem, match=rf"mlflow\.db: MLflow cannot use.*{reason}"):
            connect(sqlite_uri(path))
    assert path.exists() is ("locked" in reason)


def test_an_error_of_the_database_is_its_own_words_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a full disk the first line was SQLAlchemy's advice about autoflush, after a page of MLflow's log."""
    client = connect(sqlite_uri(tmp_path / "mlflow.db"))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("DROP TABLE experiment_tags")
    with pytest.raises(MlflowException) as raised:
        client.search_experiments(filter_string="tags.a = 'b'")
    assert one_line(raised.value) == "no such table: experiment_tags"
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", read_only)
    with pytest.raises(EnvironmentProblem, match="cannot be written: Read-only file system"):
        connect(sqlite_uri(tmp_path / "mlflow.db"))


def test_a_database_given_as_a_path_is_explained(tmp_path: Path) -> None:
    connect(f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(RunError, match=f"Did you mean sqlite:///{tmp_path}/mlflow.db"):
        must_exist(f"{tmp_path}/mlflow.db")
    assert must_exist(f"sqlite:///{tmp_path}/mlflow.db").endswith("mlflow.db")


def test_a_spool_is_read_while_it_grows(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text('{"a": 1}\n{"b": ')  # of a killed process
    spool = Spool(tmp_path / "spool")
    spool.append([{"c": 3}])
    records, position = spool.read()
    assert records == [{"a": 1}, {"c": 3}]
    spool.append([{"d": 4}])
    spool.sent(position)
    assert not spool.is_empty()
    assert spool.read()[0] == [{"d": 4}]
    spool.sent(spool.read()[1])
    assert spool.is_empty() and not (tmp_path / "spool").exists()
    spool.append([{"e": 5}])
    assert spool.read()[0] == [{"e": 5}]


def test_every_node_measures_itself(runs: Path) -> None:
    run_dir = run_folder(runs, "machines")
    (run_dir / "machine").mkdir()
    (run_dir / "machine" / "other.jsonl").write_text(
        '{"step": 0, "time_ms": 5000, "values": {"cpu_utilization_percentage": 7.0}}\n'
    )
    tracker = Tracker.start(config_for(), run_dir, FACTS)
    own = run_dir / "machine" / f"{node_name()}.jsonl"
    for _ in range(2):  # the second is a resumed run
        before = len(JsonLines(own).read()[0])
        with measured(run_dir, every_s=0.02):
            deadline_s = time.monotonic() + 60
            while len(JsonLines(own).read()[0]) < before + 2 and time.monotonic() < deadline_s:
                time.sleep(0.02)
    with measured(run_dir, every_s=0, enabled=True), measured(run_dir, every_s=1, enabled=False):
        pass
    samples = JsonLines(own).read()[0]
    assert len(samples) >= 4
    tracker.finish("FINISHED")
    client = connect(tracking_uri(config_for(), run_dir))
    assert (
        client.get_metric_history(tracker.run_id, "system/other/cpu_utilization_percentage")[0].timestamp
        == 5000
    )
    points = client.get_metric_history(tracker.run_id, f"system/{node_name()}/system_memory_usage_percentage")
    assert len(points) == len(samples) and len({point.step for point in points}) == len(points)


def test_a_spool_left_by_a_killed_process_is_sent_on_resume(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run_folder(runs, "killed")
    tracker = Tracker.start(config_for(), run_dir, FACTS)
    tracker.log_metrics({"train/loss": 1.0}, 10)
    arrived(run_dir)
    assert read_run_file(run_dir) == tracker.run_id
    with RunFolder(run_dir).spool.open("a") as spool:
        spool.write(
            json.dumps({"metric": ["train/loss", 0.5, 1_700_000_000_000, 20]}) + '\n{"metric": ["train/lo'
        )
    # killed before the first checkpoint: the folder knows its run
    resumed = Tracker.start(config_for(), run_dir, FACTS)
    assert resumed.run_id == tracker.run_id
    resumed.log_metrics({"train/loss": 0.5}, 20)
    resumed.log_metrics({"train/loss": 0.25}, 30)
    resumed.finish("KILLED")
    client = connect(tracking_uri(config_for(), run_dir))
    assert sorted(p.step for p in client.get_metric_history(tracker.run_id, "train/loss")) == [10, 20, 30]
    assert client.get_run(tracker.run_id).info.status == "KILLED"


def test_an_evaluation_goes_to_the_runs_figures_once(runs: Path) -> None:
    run_dir = run_folder(runs, "evaluated")
    (run_dir / "config.yaml").write_text("{}")
    (run_dir / "evaluation-test.json").write_text("{}")
    tracker = Tracker.start(config_for(), run_dir, FACTS)
    tracker.finish("FINISHED")
    for value in (0.25, 0.25, 0.5):
        log_evaluation(run_dir, "test", {"test/rec/mrr": value}, ["a table"])
    client = connect(tracking_uri(config_for(), run_dir))
    assert sorted(point.value for point in client.get_metric_history(tracker.run_id, "test/rec/mrr")) == [
        0.25,
        0.5,
    ]
    assert {"evaluation-test.json", "evaluation-test.txt"} <= {
        entry.path for entry in client.list_artifacts(tracker.run_id)
    }
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_an_evaluation_without_tracking_needs_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine for training alone may have neither package."""
    (tmp_path / "config.yaml").write_text("tracking: {enabled: false}\n")
    for package in ("mlflow", "sqlalchemy", "sqlalchemy.engine"):
        monkeypatch.setitem(sys.modules, package, None)  # an import then fails
    log_evaluation(tmp_path, "test", {"test/rec/mrr": 0.5}, ["a table"])
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_store_that_cannot_be_opened_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = config_for(uri=f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(EnvironmentProblem, match=r"tracking\.enabled=false"):
        Tracker.start(config, tmp_path, FACTS)


def test_two_programs_may_make_one_database(tmp_path: Path) -> None:
    """As the runs of a sweep do, which begin at the same moment."""
    code = f"from trainer.tracking.store import connect; connect('sqlite:///{tmp_path}/mlflow.db').get_experiment_by_name('x')"
    programs = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for program in programs:
        _, errors = program.communicate(timeout=200)
        assert program.returncode == 0, errors


def test_other_ranks_and_disabled_runs_record_nothing(tmp_path: Path) -> None:
    for tracker in (
        Tracker.start(config_for(), tmp_path, FACTS, enabled=False),
        Tracker.start(config_for(enabled="false"), tmp_path, FACTS),
    ):
        assert type(tracker) is Tracker
        tracker.log_metrics({"x": 1.0}, 1)
        tracker.finish("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_names() -> None:
    assert metric_name("rec/recall@10") == "rec/recall_at_10"
    assert (
        tracking_uri(Config(tracking=TrackingConfig(uri="http://localhost:1")), "x") == "http://localhost:1"
    )


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("sqlite:///my.db", "sqlite:///{here}/my.db"),
        ("sqlite:////disk/a%3Fb/my.db", "sqlite:////disk/a%3Fb/my.db"),
        ("http://host:5000", "http://host:5000"),
        ("", ""),
    ],
)
def test_a_runs_database_is_the_same_for_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, kept: str
) -> None:
    (tmp_path / "50% off").mkdir()
    monkeypatch.chdir(tmp_path / "50% off")
    uri = load_config(None, [f"tracking.uri={given}"]).tracking.uri
    assert uri == kept.format(here=f"{tmp_path}/50%25 off")
    path = sqlite_path(uri)
    assert path is None or path.is_absolute()
