"""A run resumes with another number of processes, under another ZeRO stage, with DeepSpeed or without: the
same state, events and loss curve.

Launches of one, two, four and one processes hand the same run folders on; the tests read what they left.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import ZERO3, launch, losses, records
from tests.tiny_folder import make_tiny_folder

SETTINGS = [
    "model.backbone=scratch:nano",
    "model.dropout=0",
    "model.evidence=true",  # whose counts are buffers, of no optimizer
    "model.evidence_queries=true",
    "data.item_tokens=8",
    "data.history_tokens=4",
    "data.history_max=8",
    "optim.global_batch_size=16",
    "optim.micro_batch_size=4",
    "optim.warmup_steps=2",
    "optim.lr=1e-4",  # AdamW turns a rounding error in a gradient near 0 into a step of lr
    "run.max_steps=8",
    "run.log_every_steps=1",
    "run.validate_every_steps=8",
    "run.valid_events=8",
    "run.eval_batch_size=4",
    "run.threads=1",
    "tracking.enabled=false",
]
LORA = [*SETTINGS, "model.lora.rank=2", "model.lora.dropout=0"]

# run → (processes, DeepSpeed JSON or "" without, stopped at step: its own count) of each part; the last one
# finishes. A stop asked for in step k is agreed one step later where there are several ranks.
ROUTES: dict[str, list[tuple[int, str, int]]] = {
    "undisturbed": [(1, "", 0)],
    "processes": [(1, "zero2.json", 2), (2, "zero2.json", 1), (1, "zero2.json", 0)],
    "four": [(1, "zero2.json", 2), (2, "zero2.json", 1), (4, "zero2.json", 1), (1, "zero2.json", 0)],
    "stages": [(1, "zero1.json", 2), (2, ZERO3, 1), (4, "zero2.json", 0)],
    "without": [(1, "", 2), (2, "zero2.json", 1), (4, "", 1), (1, "zero0.json", 0)],
    "replicated": [(1, "zero0.json", 2), (2, ZERO3, 1), (1, "", 0)],
}
LORA_ROUTES: dict[str, list[tuple[int, str, int]]] = {
    "lora_undisturbed": [(1, "", 0)],
    "lora": [(1, ZERO3, 2), (2, ZERO3, 1), (1, "zero2.json", 0)],
}
LAUNCHES = (1, 2, 4, 1)
SHORT = ("processes",)  # the other routes are gone by `make test-long`

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1500)]


def reference_of(name: str) -> str:
    return "lora_undisturbed" if name in LORA_ROUTES else "undisturbed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    make_tiny_folder(folder / "data")
    chosen = {item.name for item in request.session.items}  # without those that a marker left out
    curve = test_the_loss_curve_is_the_undisturbed_ones.__name__
    routes = {**ROUTES, **LORA_ROUTES}
    named = [name for name in routes if f"{curve}[{name}]" in chosen]
    left = {name: list(routes[name]) for name in dict.fromkeys([*map(reference_of, named), *named])}
    outcomes: dict[str, list[dict[str, Any]]] = {name: [] for name in left}
    for num_processes in LAUNCHES:
        scenarios: list[dict[str, Any]] = []
        for name, route in left.items():
            if route and route[0][0] == num_processes:
                _, deepspeed, stop_at = route.pop(0)
                scenario = {
                    "name": name,
                    "overrides": LORA if name in LORA_ROUTES else SETTINGS,
                    "stop_at": stop_at,
                    "resume": True,
                    "states": True,
                }
                scenarios.append({**scenario, **({"deepspeed": deepspeed} if deepspeed else {})})
        if not scenarios:
            continue
        for scenario, outcome in zip(scenarios, launch(folder, num_processes, scenarios), strict=True):
            outcomes[str(scenario["name"])].append(outcome)
    assert not any(left.values())
    (folder / "outcomes.json").write_text(json.dumps(outcomes))
    return folder


def test_every_part_ran_and_weights_and_optimizer_came_over_exactly(folder: Path) -> None:
    """Compared through DeepSpeed's debugging interface: what was in memory at the save is in memory after the
    conversion."""
    outcomes = json.loads((folder / "outcomes.json").read_text())
    assert outcomes, "no route was chosen: select one of test_the_loss_curve_is_the_undisturbed_ones, too"
    for name, parts in outcomes.items():
        assert [part.get("status") for part in parts] == ["stopped"] * (len(parts) - 1) + ["finished"], (
            name,
            parts,
        )
        assert [part.get("converted") for part in parts] == [None] + [True] * (len(parts) - 1), name
        assert not list((folder / name / "checkpoints").glob(".partial-*"))


@pytest.mark.parametrize(
    "name",
    [
        name if name in SHORT else pytest.param(name, marks=pytest.mark.long)
        for name in {**ROUTES, **LORA_ROUTES}
        if not name.endswith("undisturbed")
    ],
)
def test_the_loss_curve_is_the_undisturbed_ones(folder: Path, name: str) -> None:
    assert [r["step"] for r in records(folder / name) if r["kind"] == "train"] == list(range(1, 9)), (
        "no step lost or repeated"
    )
    assert losses(folder / name) == pytest.approx(losses(folder / reference_of(name)), abs=1e-6)
