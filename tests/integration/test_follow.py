"""`gensr serve --follow` on a real registry: promotions, a rollback, a damaged version, while clients ask."""

import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_registry_to_user import ask, command
from tests.mlflow_server import wait_until_up
from tests.runs import make_run
from trainer.demo import free_port
from trainer.evaluation.sampled import evaluate_run
from trainer.registry.promote import promote, rollback
from trainer.registry.store import fetch, registry_of
from trainer.registry.versions import register

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAME = "followed"


class Clients:
    """Ask without a pause: every status, and the version of every answer."""

    def __init__(self, url: str) -> None:
        self.statuses: set[int] = set()
        self.versions: list[int] = []
        self._url, self._ended = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(2)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._ended.is_set():
            status, answer = ask(f"{self._url}/search", {"history": [], "query": "red lamp", "k": 3})
            self.statuses.add(status)
            self.versions.append(int(answer["model"]["version"]))


def until(condition: Callable[[], bool], log: Path) -> None:
    deadline_s = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline_s, log.read_text()[-3000:]
        time.sleep(0.1)


def test_a_service_follows_its_alias(prepared: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, prepared)
    evaluate_run(run_dir, with_baselines=False)
    uri = registry_of(run_dir)
    register(run_dir, NAME)
    assert promote(NAME, uri).promoted
    url, log = f"http://127.0.0.1:{(port := free_port())}", tmp_path / "serve.log"
    arguments = ["serve", f"models:/{NAME}@champion", "--follow", "0.2", "--port", str(port), "--uri", uri]
    with log.open("w") as file:
        service = subprocess.Popen(command(*arguments), stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        wait_until_up(f"{url}/ready", service, log)
        with Clients(url) as clients:
            promote_while_it_serves(run_dir, uri, url, log)
        assert clients.statuses == {200}
        assert set(clients.versions) == {1, 2}
        assert clients.versions == sorted(clients.versions)
    finally:
        service.terminate()
        assert service.wait(60) in (-15, 143), log.read_text()[-3000:]


def promote_while_it_serves(run_dir: Path, uri: str, url: str, log: Path) -> None:
    def health() -> dict[str, Any]:
        status, document = ask_health(url)
        assert status == 200
        return document

    assert (health()["model"], health()["problem"]) == ({"name": NAME, "version": 1}, "")
    register(run_dir, NAME)
    assert promote(NAME, uri, gain=False).promoted
    until(lambda: health()["model"]["version"] == 2, log)

    broken = register(run_dir, NAME)
    weights = fetch(f"models:/{NAME}/{broken}", uri) / "artifacts" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert promote(NAME, uri, gain=False).promoted
    until(lambda: "version 3" in health()["problem"], log)
    assert health()["model"]["version"] == 2
    assert "version 2 goes on answering" in log.read_text()

    assert rollback(NAME, uri) == (3, 2)
    until(lambda: not health()["problem"], log)
    assert health()["model"]["version"] == 2


def ask_health(url: str) -> tuple[int, dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
        return answer.status, json.loads(answer.read())
