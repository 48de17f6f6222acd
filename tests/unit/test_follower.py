"""A service that follows an alias, in front of stand-ins: what is taken, what is refused, what is said.
tests/integration/test_follow.py has a real registry."""

import gc
import logging
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from tests.stand_in import StandIn
from trainer.cli import app as cli
from trainer.cli.serving import serve_model
from trainer.errors import ConfigError, EnvironmentProblem
from trainer.serving import follow as module
from trainer.serving.app import make_app
from trainer.serving.follow import Follow, Follower
from trainer.serving.live import Live

MODEL = "models:/m@champion"


def version(number: int) -> Any:
    model: Any = StandIn()
    model.facts = {"name": "m", "version": number}
    model.scorer = SimpleNamespace(item_ids=["i1"])
    return model


class Registry:
    """champion: what the alias names, or what asking for it raises. versions: what loading one gives."""

    def __init__(self) -> None:
        self.champion: int | Exception = 1
        self.versions: dict[int, Any] = {1: version(1)}
        self.loads: list[int] = []

    def newest(self) -> int:
        if isinstance(self.champion, Exception):
            raise self.champion
        return self.champion

    def open(self) -> Any:
        self.loads.append(self.newest())
        found = self.versions[self.newest()]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def live() -> Live:
    return Live(version(1))


@pytest.fixture
def follower(registry: Registry, live: Live) -> Follower:
    return Follower(Follow(MODEL, 60, registry.newest, registry.open), live)


def answers(live: Live) -> Any:
    (answer,) = live.systems.answer_or_errors([{"query": "a"}])
    return answer["model"]["version"]  # type: ignore[index]


def test_a_newer_version_answers_from_the_next_batch_on(
    registry: Registry, live: Live, follower: Follower, caplog: pytest.LogCaptureFixture
) -> None:
    assert answers(live) == 1
    follower.look()
    assert (registry.loads, answers(live)) == ([], 1)
    registry.champion, registry.versions[2] = 2, version(2)
    follower.look()
    follower.look()
    assert (registry.loads, answers(live), live.names) == ([2], 2, {"name": "m", "version": 2})
    assert registry.versions[2].batches == [2, 1]  # one question of each task, then ours
    assert "version 2 answers, no longer 1" in caplog.text
    lines = live.metrics.text(0).splitlines()
    assert 'gensr_model_info{name="m",version="2"} 1' in lines
    assert 'gensr_model_loads_total{result="used"} 1' in lines
    registry.champion = 1  # a rollback
    follower.look()
    assert answers(live) == 1


def test_clicks_that_are_asked_for_are_read_before_it_answers(
    registry: Registry, live: Live, follower: Follower
) -> None:
    read: list[int] = []
    newer = version(2)
    newer.users = SimpleNamespace(reason="", are_read=False, read=lambda: read.append(answers(live)))
    registry.champion, registry.versions[2] = 2, newer
    follower.look()
    assert (read, answers(live)) == ([], 2)  # nobody has asked version 1 for a user
    registry.champion = 1
    follower.look()
    read_before: Any = SimpleNamespace(reason="", are_read=True)
    live.recommender.users = read_before
    registry.champion = 2
    follower.look()
    assert (read, answers(live)) == ([1], 2)
    newer.users.are_read, registry.champion, registry.versions[3] = True, 3, version(3)
    follower.look()  # its folder is not here
    assert answers(live) == 3


def broken() -> Any:
    def bug(requests: Sequence[Any]) -> Any:
        raise KeyError("/etc/secret")

    model = version(2)
    model.answer_or_errors = bug
    return model


@pytest.mark.parametrize("newer", [EnvironmentProblem("/etc/secret is damaged"), MemoryError(), broken()])
def test_one_that_cannot_be_used_changes_nothing(
    registry: Registry,
    live: Live,
    follower: Follower,
    newer: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry.champion, registry.versions[2] = 2, newer
    for _ in range(3):
        follower.look()
    assert (registry.loads, answers(live)) == ([2], 1)  # not loaded again at every look
    assert live.problem == f"version 2 of {MODEL} cannot be used"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]  # nor said again
    assert "version 1 goes on answering" in caplog.text
    assert 'gensr_model_loads_total{result="refused"} 1' in live.metrics.text(0)
    registry.versions[2] = version(2)
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    follower.look()
    assert (answers(live), live.problem) == (2, "")


def test_a_registry_that_does_not_answer_is_asked_again(
    registry: Registry, live: Live, follower: Follower, caplog: pytest.LogCaptureFixture
) -> None:
    for champion, problem in (
        (EnvironmentProblem("no route to /etc/secret"), f"the registry does not say what {MODEL} is"),
        (0, f"there is no {MODEL} any more"),
        (1, ""),
    ):
        registry.champion = champion
        follower.look()
        follower.look()
        assert (live.problem, answers(live)) == (problem, 1)
    assert len(caplog.records) == 2 and "no route" in caplog.text


def test_health_and_the_model_are_those_of_the_version_that_answers(registry: Registry) -> None:
    app = make_app(version(1), follow=Follow(MODEL, 0.01, registry.newest, registry.open))
    with TestClient(app, "http://127.0.0.1") as client:
        registry.versions[2] = registry.versions[3] = version(2)
        registry.champion = 2
        while client.get("/health").json()["model"]["version"] != 2:
            pass
        assert client.get("/model").json()["model"]["version"] == 2
        assert client.post("/search", json={"query": "a"}).json()["model"]["version"] == 2
        registry.versions[3], registry.champion = OSError("/etc/secret"), 3
        while not client.get("/health").json()["problem"]:
            pass
        health = client.get("/health")
        assert (health.status_code, "secret" in health.text) == (200, False)
        assert client.post("/search", json={"query": "a"}).json()["model"]["version"] == 2


def test_the_first_version_does_not_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(app: Any, *_: Any) -> None:
        first = weakref.ref(app.state.live.recommender)
        app.state.live.replace(version(2))
        gc.collect()
        freed.append(first() is None)

    freed: list[bool] = []
    monkeypatch.setattr("trainer.registry.store.open_model", lambda *_, **__: version(1))
    monkeypatch.setattr("trainer.serving.app.serve", serve)
    serve_model(MODEL, 0, "", "sqlite:///none.db", follow_s=60.0)
    assert freed == [True]


@pytest.mark.parametrize("model", ["runs/one", "models:/m/1", "models:/m", "models:/m@a@b/c"])
def test_what_has_no_alias_is_not_followed(model: str) -> None:
    result = CliRunner().invoke(cli, ["serve", model, "--follow", "5", "--port", "0"])
    assert isinstance(result.exception, ConfigError) and "by its alias" in str(result.exception)
