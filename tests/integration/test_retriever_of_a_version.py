"""From the command line: two trained models, one of which finds candidates for the other, evaluated,
registered and served where neither run folder nor prepared folder is left."""

import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.mlflow_server import wait_until_up
from trainer.cf.build import train_cf
from trainer.demo import free_port
from trainer.registry.store import fetch, mlflow_at
from trainer.serving.recommend import Recommender
from trainer.tracking.store import connect, sqlite_uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SMALL = [
    *("data.dir=data", "data.history_max=5", "tracking.enabled=false", "run.max_steps=4"),
    *("run.valid_events=16", "optim.global_batch_size=8", "optim.micro_batch_size=8"),
]
GENSR = ["demo", "run.dir=runs/one", "model.backbone=scratch:nano", "data.item_tokens=8"]
SASREC = ["sasrec", "run.dir=runs/sasrec", "model.dim=8", "model.ffn_dim=8"]
HISTORY = [{"item_id": "i3", "task": "rec"}, {"item_id": "i7", "task": "src"}]
REQUESTS: list[dict[str, Any]] = [
    {"task": "rec", "history": HISTORY, "k": 5, "num_candidates": 20},
    {"task": "src", "history": HISTORY, "query": "garden lamp", "k": 5, "num_candidates": 20},
]


def gensr(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "gensr", *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_trained_evaluated_registered_served(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(prepared, tmp_path / "data")
    train_cf(tmp_path / "data", ["cf.dim=16", "cf.max_epochs=2", "cf.holdout=none", "overwrite=true"])
    for preset in (GENSR, SASREC):
        done = gensr(tmp_path, "train", *preset, *SMALL)
        assert done.returncode == 0, done.stderr
    evaluate_and_refuse(tmp_path)
    done = gensr(tmp_path, "register", "runs/one", "joined", "--retriever", "runs/sasrec")
    assert done.returncode == 0, done.stderr
    uri = sqlite_uri(tmp_path / "runs" / "mlflow.db")
    version = connect(uri).get_model_version("joined", "1")
    assert "| candidates, of rec | its own indexes, and the retriever SASRec (runs/sasrec, weights " in (
        version.description
    )
    assert version.tags["retriever"].startswith("SASRec (runs/sasrec, weights ")
    with monkeypatch.context() as here:
        here.chdir(tmp_path)
        expected = Recommender.from_run("runs/one", retriever="runs/sasrec").answer(REQUESTS)
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / "runs" / "one")
    shutil.rmtree(tmp_path / "runs" / "sasrec")
    held = fetch("models:/joined/1", uri) / "artifacts" / "retriever"
    assert not [path for path in held.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    assert (held / "model" / "model.safetensors").is_file()
    found = mlflow_at(uri).pyfunc.load_model("models:/joined/1").predict(pd.DataFrame(REQUESTS))
    for row, answer in zip(found.to_dict("records"), expected, strict=True):
        assert_same(row, answer)
        assert row["model"]["retriever"] == "runs/sasrec"
    serve(tmp_path, uri, expected)


def evaluate_and_refuse(tmp_path: Path) -> None:
    """The record names the retriever; what does not fit it is refused."""
    full = ("evaluate", "runs/one", "--candidates", "full", "--events", "16", "--no-baselines", "--json")
    plain = json.loads(gensr(tmp_path, *full).stdout)
    assert "retriever" not in plain["protocol"]
    done = gensr(tmp_path, *full, "--retriever", "runs/sasrec")
    assert done.stderr.count("does not serve src: the model's own indexes do") == 1
    joined = json.loads(done.stdout)
    assert joined["protocol"]["retriever"]["run"] == "runs/sasrec"
    assert 0 <= joined["rec"]["retrieval"]["recall@100"] <= 1
    assert json.loads((tmp_path / "runs/one/evaluation-test-full.json").read_text()) == joined
    refused = gensr(tmp_path, "register", "runs/one", "alone")
    assert refused.returncode == 1 and "and the version would have none" in refused.stderr
    asked = gensr(tmp_path, "recommend", "runs/one", "--user", "u3", "--json", "--retriever", "runs/sasrec")
    assert json.loads(asked.stdout)["model"]["retriever"] == "runs/sasrec"


def serve(tmp_path: Path, uri: str, expected: list[dict[str, Any]]) -> None:
    port = free_port()
    words = ["serve", "models:/joined@candidate", "--uri", uri, "--port", str(port), "--access-log", ""]
    with (tmp_path / "serve.log").open("w") as log:
        command = [sys.executable, "-m", "gensr", *words]
        service = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        wait_until_up(f"http://127.0.0.1:{port}/ready", service, tmp_path / "serve.log")
        for path, request, answer in zip(("recommend", "search"), REQUESTS, expected, strict=True):
            body = json.dumps({key: value for key, value in request.items() if key != "task"}).encode()
            url, head = f"http://127.0.0.1:{port}/{path}", {"Content-Type": "application/json"}
            asked = urllib.request.Request(url, body, head)
            with urllib.request.urlopen(asked, timeout=60) as got:
                assert_same(json.loads(got.read()), answer)
    finally:
        service.terminate()
        service.wait(timeout=60)


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert [item["item_id"] for item in got["items"]] == [item["item_id"] for item in expected["items"]]
    assert list(got["scores"]) == pytest.approx(expected["scores"], abs=1e-5)
