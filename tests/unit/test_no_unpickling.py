"""A checkpoint and a run folder from elsewhere: nothing in them is ever run."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launching import launch
from tests.integration.test_train import BASE
from tests.payload import Payload
from tests.tiny_folder import make_tiny_folder
from trainer.config import Config
from trainer.configs import load_config
from trainer.errors import DataError, GensrError, RunError
from trainer.evaluation.sampled import evaluate_run
from trainer.runs.checkpoint import checksum, listed
from trainer.runs.weights import load_run_config
from trainer.runs.weights_only import FORCE, no_unpickling
from trainer.serving.recommend import Recommender
from trainer.training.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny") / "data", num_train=48, num_valid=12)


def config_of(data: Path, run_dir: Path, steps: int) -> Config:
    more = [f"run.max_steps={steps}", "run.accept_changes=run.max_steps"]
    return load_config(None, [f"data.dir={data}", f"run.dir={run_dir}", *BASE, *more])


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    train(config_of(data, run_dir, 2))
    return run_dir


def with_deepspeed(folder: Path, runs: list[str], steps: int) -> list[dict[str, Any]]:
    """Train or resume FOLDER/NAME of each name on one process under ZeRO-2, whose checkpoints are DeepSpeed's
    own files → what each gave: a status, or an error and its message."""
    settings = [*BASE, f"run.max_steps={steps}", "run.accept_changes=run.max_steps"]
    run = {"deepspeed": "zero2.json", "overrides": settings, "resume": True}
    return launch(folder, 1, [{"name": name, **run} for name in runs])


def plant(folder: Path, name: str, target: Path) -> None:
    """A payload in place of a file of a checkpoint, with checksums that fit: bare, and as torch.save writes
    it."""
    path = folder / name
    if name.endswith((".pkl", ".pt", ".bin")):
        torch.save({"state": Payload(target), "step": 0}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(target)))
    files = json.loads((folder / "files.json").read_text())
    (folder / "files.json").write_text(json.dumps({**files, name: checksum(path)}))


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / next(iter(listed(run_dir)))


def only_newest(run_dir: Path) -> Path:
    for name in list(listed(run_dir))[1:]:
        shutil.rmtree(run_dir / "checkpoints" / name)
    return newest(run_dir)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "model.safetensors"])
def test_no_file_of_a_checkpoint_runs_anything(data: Path, plain: Path, tmp_path: Path, name: str) -> None:
    run_dir, target = tmp_path / "run", tmp_path / "touched"
    shutil.copytree(plain, run_dir)
    plant(only_newest(run_dir), name, target)
    with pytest.raises(Exception) as caught:
        train(config_of(data, run_dir, 4), resume="auto")
    assert not target.exists()
    if name != "model.safetensors":
        assert isinstance(caught.value, RunError) and "was run" in str(caught.value)


def test_random_states_that_are_cut_short_are_refused(data: Path, plain: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(plain, run_dir)
    folder = only_newest(run_dir)
    path = folder / "random_states_0.pkl"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        files = json.loads((folder / "files.json").read_text())
        (folder / "files.json").write_text(json.dumps({**files, path.name: checksum(path)}))
        with pytest.raises(RunError, match="another dropout"):
            train(config_of(data, run_dir, 4), resume="auto")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_file_of_deepspeed_runs_anything(data: Path, tmp_path: Path) -> None:
    """Neither on a resume under the same layout nor in the conversion to another; both work with honest
    files."""
    (tmp_path / "data").symlink_to(data, target_is_directory=True)
    (trained,) = with_deepspeed(tmp_path, ["first"], 2)
    assert trained["status"] == "finished"
    first = tmp_path / "first"
    folder = only_newest(first)
    pickles = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".pt", ".pkl")
    )
    assert len(pickles) == 3
    for name in ("honest", "converted"):
        shutil.copytree(first, tmp_path / name)
    assert train(config_of(data, tmp_path / "converted", 3), resume="auto").step == 3
    target, planted = tmp_path / "touched", [f"bad-{number}" for number in range(3)]
    for name, file in zip(planted, pickles, strict=True):
        shutil.copytree(first, tmp_path / name)
        plant(newest(tmp_path / name), file, target)
    honest, *bad = with_deepspeed(tmp_path, ["honest", *planted], 3)
    assert honest == {"status": "finished", "step": 3, "exit_code": 0}
    for outcome in bad:
        assert outcome["error"] == "RunError" and "nothing in it was run" in outcome["message"], outcome
    assert not target.exists()
    for name, file in zip(planted, pickles, strict=True):
        if not file.endswith(".pkl"):  # the conversion draws random numbers anew
            with pytest.raises(GensrError):
                train(config_of(data, tmp_path / name, 3), resume="auto")
            assert not target.exists()


def test_no_file_of_a_run_folder_runs_anything(plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    names = sorted(str(path.relative_to(plain)) for path in (plain / "model").rglob("*") if path.is_file())
    for name in [*names, "config.yaml", "status.json", "environment.json", "metrics.jsonl"]:
        run_dir = tmp_path / "run"
        shutil.copytree(plain, run_dir)
        (run_dir / name).write_bytes(pickle.dumps(Payload(target)))
        for verb in (evaluate_run, Recommender.from_run):
            with pytest.raises(Exception) if name.startswith(("model/", "config")) else no_unpickling("x"):
                verb(run_dir)
        assert not target.exists(), name
        shutil.rmtree(run_dir)


def test_a_command_in_a_run_folder_is_not_run(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, target = tmp_path / "run", tmp_path / "touched"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(json.dumps({"data": {"dir": f"pipe:touch {target} {{}}"}}))
    for verb in (evaluate_run, Recommender.from_run, load_run_config):
        with pytest.raises(DataError, match=r"runs the program 'touch'.*GENSR_ALLOW_PIPE=1"):
            verb(run_dir)
    assert not target.exists()
    monkeypatch.setenv("GENSR_ALLOW_PIPE", "1")
    assert load_run_config(run_dir).data.dir.startswith("pipe:touch")


def test_the_block_leaves_the_environment_as_it_was(tmp_path: Path) -> None:
    torch.save({"a": Payload(tmp_path / "touched")}, tmp_path / "file.pt")
    with pytest.raises(RunError, match="nothing in it was run"), no_unpickling(tmp_path):
        torch.load(tmp_path / "file.pt", weights_only=False)
    assert FORCE not in os.environ and not (tmp_path / "touched").exists()
