"""optim.sparse_rows over gloo: two processes train as one does, with DDP and under every ZeRO stage; an
interrupted run ends where the undisturbed one does, and goes on in another layout.

All of it happens in one launch of worker.py; the tests read what it left."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.contract.models import no_dropout
from tests.distributed.launching import ZERO3, launch, losses, records, results
from trainer.configs import load_config
from trainer.training.loop import train

pytestmark = [pytest.mark.distributed, pytest.mark.long, pytest.mark.timeout(600)]

MODEL = "nrhub"  # tables of users, items and queries, and layers beside them; negatives are the stream's
BASE = [
    f"model.name={MODEL}",
    *no_dropout(MODEL),
    "data.history_max=6",
    "optim.sparse_rows=1",
    "optim.global_batch_size=32",
    "optim.grad_clip=0.05",  # every step is clipped
    "optim.warmup_steps=1",
    "optim.lr=0.01",
    "run.max_steps=4",
    "run.log_every_steps=1",
    "run.validate_every_steps=4",
    "run.checkpoint_every_steps=2",
    "run.valid_events=8",
    "run.eval_batch_size=4",
    "run.threads=1",
    "tracking.enabled=false",
]
TWO = [*BASE, "optim.micro_batch_size=8"]  # two accumulation steps on two processes
STAGES = {"ddp": None, "zero0": "zero0.json", "zero1": "zero1.json", "zero2": "zero2.json", "zero3": ZERO3}
RESUMED = ("ddp", "zero3")


def scenario(name: str, stage: str, **more: Any) -> dict[str, Any]:
    deepspeed = {"deepspeed": STAGES[stage]} if STAGES[stage] else {}
    return {"name": name, "overrides": TWO, **deepspeed, **more}


SCENARIOS = [
    *(scenario(stage, stage) for stage in STAGES),
    *(
        one
        for stage in RESUMED
        for one in (
            scenario(f"{stage}-interrupted", stage, stop_at=2),
            scenario(f"{stage}-resumed", stage, run=f"{stage}-interrupted", resume=True),
        )
    ),
    scenario("moved", "zero1", stop_at=2),
    scenario("moved-on", "ddp", run="moved", resume=True),
]


@pytest.fixture(scope="module")
def folder(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse_rows")
    (folder / "data").symlink_to(prepared, target_is_directory=True)
    places = [f"data.dir={folder / 'data'}", f"run.dir={folder / 'single'}"]
    train(load_config(None, [*places, *BASE, "optim.micro_batch_size=32"]))
    launch(folder, 2, SCENARIOS)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_file(run / "model" / "model.safetensors")
    return state


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_train_like_one(folder: Path, name: str) -> None:
    assert [r.get("status") for r in results(folder, name)] == ["finished"] * 2, results(folder, name)
    assert losses(folder / name) == pytest.approx(losses(folder / "single"), abs=1e-5)
    one, two = weights(folder / "single"), weights(folder / name)
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
    assert any(key.endswith("items.weight") for key in one)
    for key in one:  # Adam turns a rounding error in a gradient near 0 into a step of lr
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-3)
        assert float((two[key] - one[key]).abs().mean()) < 1e-5, key


@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_ends_where_the_undisturbed_one_does(folder: Path, name: str) -> None:
    assert [r.get("status") for r in results(folder, f"{name}-interrupted")] == ["stopped"] * 2
    assert [r.get("status") for r in results(folder, f"{name}-resumed")] == ["finished"] * 2
    assert records(folder / f"{name}-interrupted") == records(folder / name)
    one, two = weights(folder / name), weights(folder / f"{name}-interrupted")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_another_layout_goes_on(folder: Path) -> None:
    done = results(folder, "moved-on")
    assert [r.get("status") for r in done] == ["finished"] * 2, done
    assert losses(folder / "moved") == pytest.approx(losses(folder / "single"), abs=1e-5)
    one, two = weights(folder / "single"), weights(folder / "moved")
    assert all(float((one[key] - two[key]).abs().mean()) < 1e-5 for key in one)
