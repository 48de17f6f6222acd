"""The way of a model to its users on a real MLflow server and real HTTP: trained while the server dies,
champion, served without the training data."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.mlflow_server import Server, wait_until_up
from trainer.cf.build import train_cf
from trainer.demo import free_port
from trainer.evaluation.full import evaluate_full
from trainer.evaluation.sampled import evaluate_run
from trainer.registry.promote import promote
from trainer.registry.versions import register
from trainer.serving.recommend import Recommender
from trainer.tracking.store import connect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = [
    "model.backbone=scratch:nano",
    "data.history_max=5",
    "data.item_tokens=8",
    "data.history_tokens=4",
    "optim.global_batch_size=8",
    "optim.micro_batch_size=8",
    "run.max_steps=60",
    "run.log_every_steps=1",
    "run.validate_every_steps=20",
    "run.valid_events=16",
]
HISTORY = [{"item_id": "i3", "task": "rec"}, {"item_id": "i7", "task": "src"}]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trainer", *arguments]


def ask(url: str, body: Any) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_from_training_to_a_served_champion(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    train_cf(tmp_path / "data", ["cf.dim=16", "cf.max_epochs=2", "cf.holdout=none", "overwrite=true"])
    server, run_dir = Server(tmp_path), tmp_path / "runs" / "one"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.chdir(tmp_path)
    server.start()
    try:
        train_while_the_server_dies(tmp_path, server)
        evaluate_run(run_dir, with_baselines=False)
        evaluate_full(run_dir, with_baselines=False)
        register(run_dir, "gensr-user")
        assert promote("gensr-user").promoted
        card = connect(server.uri).get_model_version("gensr-user", "1").description
        assert "(sampled, " in card
        assert "(full: of " in card
        expected = Recommender.from_run(run_dir).recommend({"task": "rec", "history": HISTORY, "k": 5})
        shutil.rmtree(tmp_path / "data")
        shutil.rmtree(tmp_path / "runs")
        serve_and_ask(tmp_path, server, expected)
        mlflow_serves(tmp_path, server, expected)
    finally:
        server.kill()


def train_while_the_server_dies(folder: Path, server: Server) -> None:
    """Every point of every step is on the server in the end, once."""
    metrics = folder / "runs" / "one" / "metrics.jsonl"
    arguments = [
        "train",
        "demo",
        "data.dir=data",
        "run.dir=runs/one",
        f"tracking.uri={server.uri}",
        *SETTINGS,
    ]
    with (folder / "train.log").open("w") as log:
        training = subprocess.Popen(
            command(*arguments),
            cwd=folder,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 5:
        assert training.poll() is None, (folder / "train.log").read_text()[-3000:]
        time.sleep(0.05)
    server.kill()
    while len(metrics.read_text().splitlines()) < 30:
        assert training.poll() is None, (folder / "train.log").read_text()[-3000:]
        time.sleep(0.05)
    os.killpg(training.pid, signal.SIGSTOP)  # a server takes longer to start than the last steps do
    server.start()
    os.killpg(training.pid, signal.SIGCONT)
    assert training.wait(600) == 0, (folder / "train.log").read_text()[-3000:]
    (tracked,) = server.client.search_runs([server.client.get_experiment_by_name("gensr").experiment_id])
    assert tracked.info.status == "FINISHED"
    assert [
        point.step for point in server.client.get_metric_history(tracked.info.run_id, "train/loss")
    ] == list(range(1, 61))


def serve_and_ask(folder: Path, server: Server, expected: dict[str, Any]) -> None:
    """The registry alone answers, with the scores of the run; mistakes get a 400."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    arguments = ["serve", "models:/gensr-user@champion", "--port", str(port), "--uri", server.uri]
    with (folder / "serve.log").open("w") as log:
        service = subprocess.Popen(
            command(*arguments), cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        wait_until_up(f"{url}/ready", service, folder / "serve.log")
        status, answer = ask(f"{url}/recommend", {"history": HISTORY, "k": 5})
        assert status == 200
        assert [item["item_id"] for item in answer["items"]] == [
            item["item_id"] for item in expected["items"]
        ]
        assert answer["scores"] == pytest.approx(expected["scores"], abs=1e-6)
        assert (answer["model"]["name"], str(answer["model"]["version"])) == ("gensr-user", "1")
        assert ask(f"{url}/search", {"history": [], "query": "red lamp", "k": 3})[0] == 200
        status, answer = ask(f"{url}/recommend", {"history": [{"item_id": "nothing"}]})
        assert status == 400
        assert "does not know" in answer["error"]
    finally:
        service.terminate()
        service.wait(60)


def mlflow_serves(folder: Path, server: Server, expected: dict[str, Any]) -> None:
    """`mlflow models serve` gives the same answer from the same version; its mistakes are a 400 with the
    reason, too."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        str(Path(sys.executable).with_name("mlflow")),
        "models",
        "serve",
        "-m",
        "models:/gensr-user@champion",
    ]
    with (folder / "mlflow-serve.log").open("w") as log:
        service = subprocess.Popen(
            [*command, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"MLFLOW_TRACKING_URI": server.uri},
            start_new_session=True,
        )
    try:
        wait_until_up(f"{url}/ping", service, folder / "mlflow-serve.log")
        status, answer = ask(
            f"{url}/invocations", {"dataframe_records": [{"task": "rec", "history": HISTORY, "k": 5}]}
        )
        assert status == 200
        (prediction,) = answer["predictions"]
        assert [item["item_id"] for item in prediction["items"]] == [
            item["item_id"] for item in expected["items"]
        ]
        assert prediction["scores"] == pytest.approx(expected["scores"], abs=1e-6)
        status, answer = ask(
            f"{url}/invocations",
            {
                "dataframe_records": [
                    {"task": "rec", "history": [{"item_id": "nothing", "task": "rec"}], "k": 5}
                ]
            },
        )
        assert status == 400
        assert "does not know" in json.dumps(answer)
    finally:
        os.killpg(service.pid, signal.SIGTERM)
        service.wait(60)
