"""What a training run tells its callbacks, when, and on which ranks."""

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_folder import make_tiny_folder
from trainer.configs import load_config
from trainer.training.callbacks import Callback, Listeners
from trainer.training.loop import train


class Recorder(Callback):
    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def on_step(self, step: int, num_steps: int) -> None:
        self.told.append(("step", step, num_steps))

    def on_log(self, step: int, record: Any) -> None:
        self.told.append(("log", step, set(record)))

    def on_validation(self, step: int, metrics: Any, is_best: bool) -> None:
        self.told.append(("validation", step, "mean/ndcg@10" in metrics, is_best))

    def on_checkpoint(self, step: int, folder: Path) -> None:
        whole = (folder / "state.json").is_file() and (folder.parent / "latest").read_text().strip()
        self.told.append(("checkpoint", step, whole == folder.name == f"step-{step:08d}"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("data") / "tiny")


def small(data: Path, run_dir: Path) -> Any:
    settings = [
        "run.max_steps=4",
        "run.log_every_steps=2",
        "run.validate_every_steps=2",
        "run.valid_events=8",
    ]
    settings += ["optim.global_batch_size=8", "optim.micro_batch_size=8", "model.backbone=scratch:nano"]
    settings += [
        "data.item_tokens=8",
        "data.history_tokens=4",
        "tracking.enabled=false",
        "run.valid_events=8",
    ]
    return load_config("demo", [f"data.dir={data}", f"run.dir={run_dir}", *settings])


def test_a_run_tells_everything_in_order(data: Path, tmp_path: Path) -> None:
    seen = Recorder()
    train(small(data, tmp_path / "run"), callbacks=[seen])
    of = {kind: [entry[1:] for entry in seen.told if entry[0] == kind] for kind, *_ in seen.told}
    assert of["step"] == [(step, 4) for step in (1, 2, 3, 4)]
    assert [step for step, _ in of["log"]] == [2, 4]
    assert all({"loss", "lr", "events_per_s", "train_s"} <= names for _, names in of["log"])
    assert [entry[:2] for entry in of["validation"]] == [(2, True), (4, True)] and of["validation"][0][2]
    assert of["checkpoint"] == [(2, True), (4, True)]
    assert [entry[0] for entry in seen.told[:4]] == ["step", "step", "log", "validation"]


def test_an_error_of_a_callback_ends_the_run(data: Path, tmp_path: Path) -> None:
    class Broken(Callback):
        def on_step(self, step: int, num_steps: int) -> None:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        train(small(data, tmp_path / "run"), callbacks=[Broken()])
    assert "ZeroDivisionError: mine" in (tmp_path / "run" / "train.log").read_text()


def test_other_ranks_tell_nobody() -> None:
    seen = Recorder()
    Listeners([seen], enabled=False).on_step(1, 2)
    Listeners([Callback(), seen]).on_step(1, 2)
    assert seen.told == [("step", 1, 2)]
