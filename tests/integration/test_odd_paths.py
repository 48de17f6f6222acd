"""Paths are paths: what means something in a URL ("?", "%20", "#", ":") is an ordinary character of a file's
name."""

import contextlib
import sqlite3
from pathlib import Path

import pytest

from data_shards.schema import read_manifest
from tests.integration.test_train import BASE
from tests.tiny_folder import make_tiny_folder
from trainer.config import DataConfig
from trainer.configs import load_config
from trainer.data.blocks import read_blocks
from trainer.data.node_cache import is_url, local_folder
from trainer.errors import EnvironmentProblem
from trainer.evaluation.sampled import evaluate_run
from trainer.experiments.import_runs import import_runs, read_source
from trainer.registry.store import open_model
from trainer.registry.versions import register
from trainer.tracking.store import connect, path_of_file_uri, sqlite_path, sqlite_uri, tracking_uri
from trainer.training.loop import train

ODD = ["x?y", "x%20y", "a#b", "exp:1", "ein {} ümlaut"]


@pytest.mark.parametrize("name", ODD)
def test_sqlite_uri_names_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "mlflow.db"
    path.parent.mkdir()
    assert sqlite_path(sqlite_uri(path)) == path
    connect(sqlite_uri(path)).search_experiments()
    with contextlib.closing(
        sqlite3.connect(path)
    ) as database:  # by the plain path: MLflow's tables are there
        assert database.execute("select count(*) from experiments").fetchone()[0] >= 1
    files = [entry for entry in tmp_path.rglob("*") if entry.is_file() and not entry.name.endswith(".lock")]
    assert files == [path]
    assert [entry.name for entry in tmp_path.iterdir()] == [name]  # and no empty folder x%3Fy


def test_uris_without_a_file_have_no_path() -> None:
    assert sqlite_path("sqlite:///:memory:") is None
    assert sqlite_path("http://host/mlflow.db") is None
    assert path_of_file_uri("file:///a%20b/c%3Fd") == Path("/a b/c?d")
    assert path_of_file_uri("/a%20b") == Path("/a%20b")


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("exp:1/data", False),
        ("/runs/a://b", False),
        ("http://host/data", True),
        ("s3://bucket/data", True),
        ("pipe:cat data/{}", True),
    ],
)
def test_what_is_a_url(folder: str, expected: bool) -> None:
    assert is_url(folder) is expected


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("cached", [False, True])
def test_shards_are_read_from_any_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cached: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_tiny_folder(tmp_path / name / "data")
    data = DataConfig(
        dir=str(folder.relative_to(tmp_path)), cache_dir=str(tmp_path / "cache") if cached else ""
    )
    manifest = read_manifest(local_folder(data))
    shard = manifest.shards("train")[0]
    assert sum(table.num_rows for table in read_blocks(local_folder(data), shard)) == sum(shard.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x?y", "x%20y", "exp:1"])
def test_a_run_in_an_odd_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Trained, evaluated, registered, opened again and imported, all by relative paths."""
    monkeypatch.chdir(tmp_path)
    make_tiny_folder(tmp_path / name / "data", num_valid=12)
    run_dir = Path(name) / "run"
    settings = [f"data.dir={name}/data", f"run.dir={run_dir}", *BASE, "run.max_steps=2"]
    config = load_config(None, [*settings, "tracking.enabled=true", "tracking.machine_every_s=0"])
    train(config)
    evaluate_run(run_dir)
    if name == "x%20y":
        with pytest.raises(EnvironmentProblem, match="escape such as %20"):
            register(run_dir, "odd")
        return
    assert register(run_dir, "odd") == 1
    uri = tracking_uri(config, run_dir)
    assert sqlite_path(uri) == (tmp_path / name / "mlflow.db")
    request = {"history": [], "task": "rec", "query": None, "candidates": ["i1", "i2"]}
    assert len(open_model("models:/odd@candidate", uri).score([request])[0]) == 2

    (tmp_path / "elsewhere").mkdir()
    done = import_runs(f"{name}/mlflow.db", sqlite_uri(tmp_path / "elsewhere" / "mlflow.db"))
    assert [run.status for run in done] == ["FINISHED"] and done[0].added > 0
    files = {path.name for source in read_source(f"{name}/mlflow.db") for path, _ in source.files}
    assert {"config.yaml", "environment.json"} <= files
    assert {place.name for place in tmp_path.iterdir()} == {name, "elsewhere"}
