"""The contract under two processes: gradients are the union batch's, ZeRO-3 trains, an interrupted run goes
on where it was. One launch of tests/distributed/worker.py; the tests read what it left."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.contract.models import BASE, COUNTED, TINY, TRAINED, no_dropout
from tests.distributed.launching import ZERO3, launch, losses, records, results
from trainer.data.folder import PreparedFolder
from trainer.runs.weights import load_run_model

RESUMED = ("sasrec", "unisar")  # under ZeRO-2; every model under one process: test_models.py
# Models built differently from each other; the others are cut into parts by `make test-long`
ZERO3_FIRST = ("gensr", "idgenrec", "two_tower", "unisar")
STEPS = ("run.max_steps=3", "run.validate_every_steps=3", "run.timeout_s=120")

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1000)]


def overrides(name: str, *more: str) -> list[str]:
    return [f"model.name={name}", *BASE, *STEPS, *TINY.get(name, ()), *more]


def gradients(name: str) -> dict[str, Any]:
    settings = overrides(name, *no_dropout(name), "optim.global_batch_size=32")
    return {"name": f"gradients-{name}", "gradients": True, "overrides": settings}


def zero2(name: str) -> list[dict[str, Any]]:
    run = {"deepspeed": "zero2.json", "overrides": overrides(name)}
    return [
        {**run, "name": f"undisturbed-{name}"},
        {**run, "name": f"interrupted-{name}", "stop_at": 1},
        {**run, "name": f"resumed-{name}", "run": f"interrupted-{name}", "resume": True},
    ]


def zero3(name: str) -> dict[str, Any]:
    return {"name": f"zero3-{name}", "deepspeed": ZERO3, "overrides": overrides(name)}


SCENARIOS = [
    *(gradients(name) for name in TRAINED),
    *(scenario for name in RESUMED for scenario in zero2(name)),
    *({"name": f"counted-{name}", "overrides": overrides(name)} for name in COUNTED),
]


@pytest.fixture(scope="module")
def folder(
    texts: PreparedFolder, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """Everything was run when this returns: FOLDER/NAME is a run folder."""
    folder = tmp_path_factory.mktemp("contract_distributed")
    (folder / "data").symlink_to(texts.path, target_is_directory=True)
    chosen = {item.name for item in request.session.items}  # without those that a marker left out
    cut = [zero3(name) for name in TRAINED if f"{test_zero3_trains.__name__}[{name}]" in chosen]
    launch(folder, 2, [*SCENARIOS, *cut])
    return folder


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_two_ranks_are_those_of_the_union_batch(folder: Path, name: str) -> None:
    for result in results(folder, f"gradients-{name}"):
        assert result.get("same_names"), result
        assert result["worst"] < 1e-6 * max(1.0, result["largest"]), result


@pytest.mark.parametrize(
    "name", [name if name in ZERO3_FIRST else pytest.param(name, marks=pytest.mark.long) for name in TRAINED]
)
def test_zero3_trains(folder: Path, name: str) -> None:
    """Every weight is cut into parts, also where it is used outside of its module's forward()."""
    run = folder / f"zero3-{name}"
    assert [r.get("status") for r in results(folder, run.name)] == ["finished"] * 2, results(folder, run.name)
    assert len(losses(run)) == 3 and all(torch.tensor(losses(run)).isfinite())
    model, _config, _folder = load_run_model(run)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", RESUMED)
def test_zero2_resumes_bit_for_bit(folder: Path, name: str) -> None:
    undisturbed, interrupted = folder / f"undisturbed-{name}", folder / f"interrupted-{name}"
    assert [r.get("status") for r in results(folder, interrupted.name)] == ["stopped"] * 2
    assert [r.get("status") for r in results(folder, f"resumed-{name}")] == ["finished"] * 2
    assert records(interrupted) == records(undisturbed)
    one, other = (load_file(run / "model" / "model.safetensors") for run in (interrupted, undisturbed))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name", COUNTED)
def test_models_without_steps_are_counted_on_two_processes(folder: Path, name: str) -> None:
    run = folder / f"counted-{name}"
    assert [r.get("status") for r in results(folder, run.name)] == ["finished"] * 2, results(folder, run.name)
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert [r["kind"] for r in records(run)] == ["valid"]
    load_run_model(run)
