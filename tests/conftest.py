"""Fixtures that every test may use: prepared folders of a tiny world."""

import contextlib
import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_shards.prepare import prepare
from tests.worlds import write_tables

# Tests compare numbers bit for bit and start more processes than a machine has GPUs, so they run on the CPU
# everywhere. `make test-gpu` is for the rest.
if not os.environ.get("GENSR_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

SMALL = ("block_events=64", "shard_events=256", "vocab_size=400", "history_max=20")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder: 60 users, about 150 items, both tasks, natural text, four or more training shards.
    Read-only."""
    folder = tmp_path_factory.mktemp("world")
    prepare("tables", write_tables(folder / "raw"), folder / "prepared", SMALL)
    return folder / "prepared"


@pytest.fixture(scope="session")
def prepared_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with anonymised integer words in captions and queries. Read-only."""
    folder = tmp_path_factory.mktemp("words_world")
    prepare("tables", write_tables(folder / "raw", anonymised=True), folder / "prepared", SMALL)
    return folder / "prepared"


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """stop_after(k): the next run is asked to stop in its k-th step."""
    from trainer.runtime.stopping import StopSignal  # tests of data_shards need no trainer

    def arrange(step: int) -> None:
        original, calls = StopSignal.poll, [0]

        def poll(self: StopSignal, busy: bool = False) -> bool:
            calls[0] += 1
            if calls[0] == step:
                self.received = "a test"
            return original(self, busy)

        monkeypatch.setattr(StopSignal, "poll", poll)

    return arrange


# What takes a tiny run longer than its training, in the process of a test where the library is loaded already


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training draws no curves, but for tests that are marked so."""
    loop: Any = sys.modules.get("trainer.training.loop")
    if loop is not None and request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(loop.figures, "plot_run", lambda run_dir: [])


@pytest.fixture(autouse=True)
def copied_databases(monkeypatch: pytest.MonkeyPatch, mlflow_template: Callable[[Any], Path]) -> None:
    """A new sqlite database of MLflow is a copy of one that MLflow made: its fifty migrations take 1.5 s."""
    utils: Any = sys.modules.get("mlflow.store.db.utils")
    if utils is None:
        return
    initialize = utils._initialize_tables

    def copy(engine: Any) -> None:
        if engine.dialect.name != "sqlite" or not engine.url.database:
            return initialize(engine)
        source, target = sqlite3.connect(mlflow_template(initialize)), sqlite3.connect(engine.url.database)
        with contextlib.closing(source), contextlib.closing(target):  # sqlite3's own context does not close
            source.backup(target)

    for name in ("mlflow.store.db.utils", "mlflow.store.model_registry.sqlalchemy_store"):
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "_initialize_tables", copy)


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """→ the path of an empty database, which `initialize` (MLflow's own) makes at the first call."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"

    def made(initialize: Callable[[Any], None]) -> Path:
        import sqlalchemy

        if not path.exists():
            engine = sqlalchemy.create_engine(f"sqlite:///{path}")
            initialize(engine)
            engine.dispose()
        return path

    return made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: a worker that gets one of them last keeps the others waiting."""
    kinds = ("slow", "distributed", "slurm")
    slow = {item.path for item in items if any(item.get_closest_marker(kind) for kind in kinds)}
    items.sort(key=lambda item: item.path not in slow)
