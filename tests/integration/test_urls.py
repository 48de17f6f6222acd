"""Training, evaluation and resumption with the prepared folder behind http, as `data.dir=http://…`: the same
run, bit for bit."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.test_train import BASE
from tests.tiny_folder import make_tiny_folder
from trainer.config import Config
from trainer.configs import load_config
from trainer.data import node_cache
from trainer.evaluation.sampled import evaluate_run
from trainer.serving.scorer import Scorer
from trainer.training.loop import train
from trainer.training.plan import dry_run


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny"), train_blocks=[[16], [16, 8], [8]], num_valid=12)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def config_of(data: str, run_dir: Path, *overrides: str) -> Config:
    return load_config(
        None,
        [
            f"data.dir={data}",
            f"run.dir={run_dir}",
            *BASE,
            "run.max_steps=4",
            "run.validate_every_steps=2",
            *overrides,
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True], ids=["streamed", "kept"])
def test_a_run_over_http_is_the_run_on_the_folder(
    folder: Path, url: str, tmp_path: Path, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    node_cache._cached_folder.cache_clear()
    cache = f"data.cache_dir={tmp_path / 'cache'}" if keep else "data.cache_dir="
    local, remote = tmp_path / "local", tmp_path / "remote"
    assert dry_run(config_of(url, remote, cache)).facts["data"]["train_events"] == 48
    train(config_of(str(folder), local))
    assert train(config_of(url, remote, cache)).status == "finished"
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (local, remote))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    there, here = evaluate_run(remote), evaluate_run(local)
    assert (
        all(there[key] == here[key] for key in ("rec", "src", "baselines"))
        and (remote / "evaluation-test.parquet").is_file()
    )
    request = {"history": [], "task": "rec", "query": None, "candidates": ["i1", "i2", "i3"]}
    assert Scorer.from_run(remote).score(request) == Scorer.from_run(local).score(request)
