"""A real tracking server: killed in the middle of a run and started again; and runs that were made without
one, imported."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from tests.mlflow_server import Server
from tests.tiny_folder import make_tiny_folder
from trainer.configs import load_config
from trainer.errors import EnvironmentProblem, RunError
from trainer.experiments.import_runs import import_runs
from trainer.experiments.sweep import summarize
from trainer.runs.run_folder import RunFolder
from trainer.tracking import delivery
from trainer.tracking.tracker import Tracker
from trainer.training.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = [
    "model.backbone=scratch:nano",
    "data.item_tokens=8",
    "data.history_tokens=4",
    "data.history_max=8",
    "optim.global_batch_size=16",
    "optim.micro_batch_size=16",
    "run.max_steps=4",
    "run.log_every_steps=1",
    "run.validate_every_steps=2",
    "run.valid_events=8",
    "tracking.machine_every_s=0",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    running.start()
    yield running
    running.kill()


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of a node without a server: a sweep, with mlflow.db beside them."""
    folder = tmp_path_factory.mktemp("offline")
    make_tiny_folder(folder / "data")
    for name, lr in (("00-a", "1e-3"), ("01-b", "1e-2")):
        train(
            load_config(
                None,
                [
                    f"data.dir={folder / 'data'}",
                    f"run.dir={folder / 'sweep' / name}",
                    *SETTINGS,
                    f"optim.lr={lr}",
                ],
            )
        )
    assert summarize(folder / "sweep")["mlflow_run_id"]
    return folder / "sweep"


def everything(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """What makes two runs the same: settings, points with steps and times, dataset, files, status, times."""
    run = client.get_run(run_id)
    points = {
        key: sorted((p.step, p.timestamp, p.value) for p in client.get_metric_history(run_id, key))
        for key in run.data.metrics
    }
    files = sorted(
        entry.path for folder in ("", "report") for entry in client.list_artifacts(run_id, folder or None)
    )
    return {
        "params": run.data.params,
        "points": points,
        "dataset": [entry.dataset.digest for entry in run.inputs.dataset_inputs],
        "files": files,
        "status": (run.info.status, run.info.start_time, run.info.end_time),
        "commit": run.data.tags.get("mlflow.source.git.commit"),
    }


@pytest.mark.long  # test_registry_to_user.py kills the server of a training
def test_a_server_killed_in_the_middle_of_a_run_loses_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "RETRY_EVERY_S", 0.2)
    config = load_config(None, [f"tracking.uri={server.uri}"])
    tracker = Tracker.start(config, tmp_path, {"git": {"commit": "0123abc"}})
    for step in range(10):
        tracker.log_metrics({"train/loss": float(step)}, step)
    server.kill()
    (tmp_path / "loss.png").write_bytes(b"png")
    started_s = time.process_time()
    for step in range(10, 300):
        tracker.log_metrics({"train/loss": float(step)}, step)
    tracker.log_artifact(tmp_path / "loss.png", "report")
    assert time.process_time() - started_s < 2.0
    assert RunFolder(tmp_path).spool.exists()
    server.start()
    tracker.finish("FINISHED")
    assert not RunFolder(tmp_path).spool.exists()
    assert [p.step for p in server.client.get_metric_history(tracker.run_id, "train/loss")] == list(
        range(300)
    )
    assert [entry.path for entry in server.client.list_artifacts(tracker.run_id, "report")] == [
        "report/loss.png"
    ]
    run = server.client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    experiment = f"{server.uri}/#/experiments/{run.info.experiment_id}"
    assert tracker.page == f"{experiment}/runs?workflowType=machine_learning"


def test_a_run_that_began_before_its_server_gets_there(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "RETRY_EVERY_S", 0.2)
    monkeypatch.setattr("trainer.tracking.tracker.OPEN_WAIT_S", 0.5)
    monkeypatch.setattr("trainer.tracking.tracker.STOP_WAIT_S", 60.0)  # on a busy machine
    server.kill()
    tracker = Tracker.start(load_config(None, [f"tracking.uri={server.uri}"]), tmp_path, {})
    tracker.log_metrics({"train/loss": 1.0}, 1)
    assert tracker.run_id == ""
    server.start()
    tracker.finish("KILLED")
    run = server.client.get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics, run.info.run_name) == (
        "KILLED",
        {"train/loss": 1.0},
        tmp_path.name,
    )


def test_a_server_that_is_down_at_the_end_gets_the_end_when_it_is_back(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short runs are over before a server that is started again takes its first request."""
    monkeypatch.setattr("trainer.tracking.tracker.FINISH_WAIT_S", 240.0)
    tracker = Tracker.start(load_config(None, [f"tracking.uri={server.uri}"]), tmp_path, {})
    server.kill()
    tracker.log_metrics({"train/loss": 1.0}, 1)
    finishing = threading.Thread(target=tracker.finish, args=("FINISHED",))
    finishing.start()
    time.sleep(2 * delivery.RETRY_AT_THE_END_S)
    assert finishing.is_alive()
    server.start()
    finishing.join(240)
    assert server.client.get_run(tracker.run_id).info.status == "FINISHED"
    assert not RunFolder(tmp_path).spool.exists()


def test_an_address_that_is_no_mlflow_is_refused_at_the_start(server: Server, tmp_path: Path) -> None:
    config = load_config(None, [f"tracking.uri={server.uri}/somewhere/else"])
    with pytest.raises(EnvironmentProblem, match=r"tracking\.uri"):
        Tracker.start(config, tmp_path, {})
    assert not RunFolder(tmp_path).spool.exists()


def test_runs_of_an_offline_node_are_imported_once(server: Server, offline: Path) -> None:
    done = {run.run: run for run in import_runs(str(offline / "mlflow.db"), server.uri)}
    assert set(done) == {"00-a", "01-b", "sweep"} and all(run.new for run in done.values())
    local = MlflowClient(f"sqlite:///{offline / 'mlflow.db'}")
    for name in ("00-a", "01-b"):
        source_id = json.loads((offline / name / "tracking.json").read_text())["run_id"]
        copy = everything(server.client, done[name].run_id)
        assert copy == everything(local, source_id)
        assert copy["points"]["train/loss"][-1][0] == 4 and copy["dataset"] and "config.yaml" in copy["files"]
        assert (
            server.client.get_run(done[name].run_id).data.tags["mlflow.parentRunId"] == done["sweep"].run_id
        )
    before = {run.run: everything(server.client, run.run_id) for run in done.values()}
    again = import_runs(str(offline / "mlflow.db"), server.uri)
    assert [(run.new, run.added) for run in again] == [(False, 0)] * 3
    assert {run.run: everything(server.client, run.run_id) for run in again} == before
    # the folder of a run that came with the database
    folder_again = import_runs(str(offline / "00-a"), server.uri)
    assert [(run.run_id, run.new) for run in folder_again] == [(done["00-a"].run_id, False)]
    assert (
        everything(server.client, done["00-a"].run_id)["points"]["train/loss"]
        == before["00-a"]["points"]["train/loss"]
    )


@pytest.mark.pictures
def test_a_run_folder_alone_is_enough(server: Server, offline: Path, tmp_path: Path) -> None:
    """Never tracked: points with their steps, settings, dataset, pictures and status come from the folder's
    own files."""
    run_dir = tmp_path / "untracked"
    train(
        load_config(
            None,
            [
                f"data.dir={offline.parent / 'data'}",
                f"run.dir={run_dir}",
                *SETTINGS,
                "tracking.enabled=false",
            ],
        )
    )
    evaluation = {"rec": {"ndcg@10": 0.25, "num_events": 8}, "protocol": {}}
    (run_dir / "evaluation-test.json").write_text(json.dumps(evaluation))
    (first,) = import_runs(str(run_dir), server.uri)
    (second,) = import_runs(str(run_dir), server.uri)
    assert (first.new, second.new, second.added, second.run_id) == (True, False, 0, first.run_id)
    copy = everything(server.client, first.run_id)
    assert [step for step, _, _ in copy["points"]["train/loss"]] == [1, 2, 3, 4]
    assert copy["points"]["test/rec/ndcg_at_10"][0][2] == 0.25
    assert copy["status"][0] == "FINISHED" and copy["params"]["run.max_steps"] == "4" and copy["dataset"]
    assert {"config.yaml", "environment.json", "evaluation-test.json", "report/loss.png"} <= set(
        copy["files"]
    )
    with (run_dir / "metrics.jsonl").open("a") as file:  # it went on
        file.write(json.dumps({"kind": "train", "step": 5, "loss": 0.5, "train_s": 9.0}) + "\n")
    assert [(run.new, run.added) for run in import_runs(str(run_dir), server.uri)] == [(False, 2)]


def test_what_cannot_be_imported_says_why(server: Server, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        import_runs(str(tmp_path), server.uri)
    with pytest.raises(RunError, match="should go into"):
        import_runs(str(tmp_path / "mlflow.db"), f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "mlflow.db").write_text("no database")
    with pytest.raises(EnvironmentProblem, match="repeat it"):
        import_runs(str(tmp_path / "mlflow.db"), server.uri)
