"""tracking.also: what TensorBoard and Weights & Biases are told, and what if they are not there."""

import importlib.machinery
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trainer.configs import load_config
from trainer.errors import ConfigError, EnvironmentProblem
from trainer.tracking import also
from trainer.tracking.store import connect, read_run_file
from trainer.tracking.tracker import Tracker


def started(run_dir: Path, *settings: str) -> Tracker:
    config = load_config(None, ["tracking.enabled=false", f"run.dir={run_dir}", *settings])
    return Tracker.start(config, run_dir, {})


class FakeWandb(ModuleType):
    """As much of the package as accelerate calls."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.calls: list[Any] = []
        self.config = self
        self.broken = False

    def init(self, **given: Any) -> "FakeWandb":
        if self.broken:
            raise RuntimeError("api_key not configured\nmore")
        self.calls.append(("init", given))
        return self

    def update(self, values: dict[str, Any], **_: Any) -> None:
        self.calls.append(("config", values))

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        if self.broken:
            raise ConnectionError("gone")
        self.calls.append(("log", values, step))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_settings_and_metrics(wandb: FakeWandb, tmp_path: Path) -> None:
    tracker = started(tmp_path / "mine", "tracking.also=wandb", "tracking.uri=http://me:secret@host")
    tracker.log_metrics({"train/loss": 0.5}, 20)
    tracker.finish("FINISHED")
    (_, opened), (_, settings), logged, ended = wandb.calls
    assert opened == {"project": "gensr", "name": "mine", "dir": str(tmp_path / "mine")}
    assert settings["optim.lr"] == 1e-3 and "secret" not in str(settings)
    assert logged == ("log", {"train/loss": 0.5}, 20)
    assert ended == ("finish",)


def test_one_that_fails_later_is_dropped(
    wandb: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = started(tmp_path, "tracking.also=wandb")
    wandb.broken = True
    with caplog.at_level(logging.WARNING):
        tracker.log_metrics({"train/loss": 0.5}, 1)
        tracker.log_metrics({"train/loss": 0.5}, 2)
    assert [record.message for record in caplog.records] == [
        "WandBTracker takes no more records of this run: gone"
    ]


def test_one_that_does_not_start_says_why(wandb: FakeWandb, tmp_path: Path) -> None:
    wandb.broken = True
    with pytest.raises(EnvironmentProblem, match="failed to start: api_key not configured"):
        started(tmp_path, "tracking.also=wandb")


def test_mlflow_hears_of_a_run_that_does_not_start(wandb: FakeWandb, tmp_path: Path) -> None:
    wandb.broken = True
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = load_config(None, [f"tracking.uri={uri}", "tracking.also=wandb"])
    with pytest.raises(EnvironmentProblem, match="failed to start"):
        Tracker.start(config, tmp_path, {})
    assert connect(uri).get_run(read_run_file(tmp_path, uri)).info.status == "FAILED"


def test_the_page_is_that_of_the_first(tmp_path: Path) -> None:
    class Shown(Tracker):
        page = "http://host/page"

    assert also.Several(Shown(), []).page == "http://host/page"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(also.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'gensr\[tensorboard\]'"):
        started(tmp_path, "tracking.also=tensorboard", "tracking.enabled=true")
    assert not list(tmp_path.iterdir()), "no run is opened before"


def test_another_name_is_a_problem_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.also +must be of tensorboard, wandb.*got 'comet'"):
        load_config(None, ["tracking.also=tensorboard,comet"])


def test_nothing_else_is_asked_for(tmp_path: Path) -> None:
    assert type(started(tmp_path)) is Tracker


def test_tensorboard_writes_its_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = started(tmp_path, "tracking.also=tensorboard")
    tracker.log_metrics({"train/loss": 0.5}, 20)
    tracker.finish("FINISHED")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (point,) = events.Scalars("train/loss")
    assert (point.step, point.value) == (20, 0.5)
