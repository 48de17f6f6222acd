"""Two processes over gloo: ZeRO 0–3 and DDP train the same model as one process, and an interrupted run ends
where the undisturbed one does.

All of it happens in one launch (worker.py); the tests read what it left. What differs little from another
scenario is run by `make test-long` only.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import COMPILED, ZERO3, launch, losses, records, results
from tests.tiny_folder import make_tiny_folder
from trainer.configs import load_config
from trainer.data.folder import PreparedFolder
from trainer.experiments.analyses.gradients import measure
from trainer.experiments.analyses.options import Options
from trainer.training.loop import EXIT_RESUME_ME, train

BASE = [
    "model.backbone=scratch:nano",
    "data.item_tokens=8",
    "data.history_tokens=4",
    "data.history_max=8",
    "optim.global_batch_size=16",
    "optim.warmup_steps=2",
    "run.max_steps=6",
    "run.log_every_steps=1",
    "run.validate_every_steps=6",
    "run.valid_events=8",
    "run.eval_batch_size=4",
    "run.threads=1",
    "tracking.enabled=false",
]
RANDOM = [*BASE, "model.dropout=0.1", "optim.micro_batch_size=4"]  # two accumulation steps on two processes
EXACT = [
    *BASE,
    "run.max_steps=3",
    "run.validate_every_steps=3",
    "model.dropout=0",
    "model.gather_negatives=true",
    "model.contrastive_weight=0.1",
    "optim.global_batch_size=64",
    "optim.micro_batch_size=32",  # enough for two groups of searches by length
]
KEPT = [*EXACT, "run.checkpoint_every_steps=2"]
# under ZeRO-3 a step takes ten times as long
SHORT = [*RANDOM, "run.max_steps=3", "run.validate_every_steps=3"]
LORA = [*SHORT, "model.lora.rank=2"]
DECODERS = ("qwen3_nano", "llama_nano")

# stops in another step each; six steps are one epoch
STAGES = {"3": ZERO3, "0": "zero0.json", "1": "zero1.json", "2": "zero2.json"}
SETTINGS = {stage: SHORT if stage == "3" else RANDOM for stage in STAGES}
SCENARIOS: list[dict[str, Any]] = [
    scenario
    for stop_at, (stage, file) in enumerate(STAGES.items(), start=1)
    for scenario in (
        {"name": f"undisturbed{stage}", "deepspeed": file, "overrides": SETTINGS[stage]},
        {"name": f"interrupted{stage}", "deepspeed": file, "overrides": SETTINGS[stage], "stop_at": stop_at},
        {
            "name": f"resumed{stage}",
            "run": f"interrupted{stage}",
            "deepspeed": file,
            "overrides": SETTINGS[stage],
            "resume": True,
        },
    )
] + [
    {
        "name": "other_lr",
        "run": "interrupted2",
        "deepspeed": "zero2.json",
        "overrides": [*RANDOM, "optim.lr=0.5"],
        "resume": True,
    },
    {"name": "lora", "deepspeed": ZERO3, "overrides": LORA},
    {"name": "lora_interrupted", "deepspeed": ZERO3, "overrides": LORA, "stop_at": 1},
    {
        "name": "lora_resumed",
        "run": "lora_interrupted",
        "deepspeed": ZERO3,
        "overrides": LORA,
        "resume": True,
    },
    *(
        {"name": f"lora_bf16_{stage}", "deepspeed": STAGES[stage], "overrides": [*LORA, "run.precision=bf16"]}
        for stage in "23"
    ),
    *(
        {
            "name": name,
            "deepspeed": ZERO3,
            "overrides": [*LORA, f"model.backbone=scratch:{name}"],
        }
        for name in DECODERS
    ),
    {"name": "ddp", "overrides": KEPT},
    {"name": "zero0", "deepspeed": "zero0.json", "overrides": EXACT},
    {"name": "zero1", "deepspeed": "zero1.json", "overrides": EXACT},
    {"name": "zero2", "deepspeed": "zero2.json", "overrides": KEPT},
    {"name": "zero3", "deepspeed": ZERO3, "overrides": KEPT},
    {"name": "zero2_offload", "deepspeed": "zero2_offload.json", "overrides": EXACT},
    {"name": "zero3_offload", "deepspeed": "zero3_offload.json", "overrides": EXACT},
    {"name": "bf16", "deepspeed": "zero2.json", "overrides": [*EXACT, "run.precision=bf16"]},
    {"name": "poisoned", "deepspeed": "zero2.json", "overrides": EXACT, "poison": 1},
    {"name": "left_out", "overrides": [*EXACT, "run.on_nan=skip"], "poison": 1},
    {"name": "left_out2", "deepspeed": "zero2.json", "overrides": [*EXACT, "run.on_nan=skip"], "poison": 1},
    {"name": "left_out3", "deepspeed": ZERO3, "overrides": [*EXACT, "run.on_nan=skip"], "poison": 1},
    {"name": "gradients", "overrides": EXACT, "gradients": True},
]

LONG = (
    *("0", "1", "zero0", "zero1", "zero2_offload", "zero3_offload"),
    *("left_out2", "left_out3", "lora_bf16_2", "lora_bf16_3", "llama_nano"),
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1000)]


def names(*all_names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in all_names]


def is_long(scenario: dict[str, Any]) -> bool:
    return re.sub("^(undisturbed|interrupted|resumed)", "", scenario["name"]) in LONG


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Everything was run when this returns: FOLDER/NAME is a run folder, FOLDER/results-RANK.json what
    train() gave."""
    folder = tmp_path_factory.mktemp("two_processes")
    make_tiny_folder(folder / "data")
    chosen = [item for item in request.session.items if item.path == Path(__file__)]
    everything = any(item.get_closest_marker("long") for item in chosen)
    launch(folder, 2, [scenario for scenario in SCENARIOS if everything or not is_long(scenario)])
    train(
        load_config(
            None,
            [
                f"data.dir={folder / 'data'}",
                f"run.dir={folder / 'single'}",
                *EXACT,
                "optim.micro_batch_size=64",
            ],
        )
    )
    return folder


@pytest.mark.parametrize("stage", names(*STAGES))
def test_a_stopped_run_saves_on_all_ranks_at_the_same_step(folder: Path, stage: str) -> None:
    step = 2 + list(STAGES).index(stage)  # asked one step earlier
    for result in results(folder, f"interrupted{stage}"):
        assert result == {"status": "stopped", "step": step, "exit_code": EXIT_RESUME_ME}


@pytest.mark.parametrize("stage", names(*STAGES))
def test_the_resumed_run_equals_the_undisturbed_one_bit_for_bit(folder: Path, stage: str) -> None:
    interrupted, undisturbed = folder / f"interrupted{stage}", folder / f"undisturbed{stage}"
    assert [r["status"] for r in results(folder, f"resumed{stage}")] == ["finished", "finished"]
    assert len(losses(undisturbed)) == (3 if stage == "3" else 6)
    assert records(interrupted) == records(undisturbed)
    one, other = (load_file(run / "model" / "model.safetensors") for run in (interrupted, undisturbed))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert not list((interrupted / "checkpoints").glob(".partial-*"))


def test_lora_under_zero3_resumes_without_saving_frozen_weights(folder: Path) -> None:
    for name, status in (("lora", "finished"), ("lora_interrupted", "stopped"), ("lora_resumed", "finished")):
        assert [r.get("status") for r in results(folder, name)] == [status] * 2
    assert records(folder / "lora_interrupted") == records(folder / "lora")
    checkpoints = [folder / name / "checkpoints" / "step-00000003" for name in ("lora", "undisturbed3")]
    adapters, whole = (
        sum(path.stat().st_size for path in checkpoint.rglob("*optim_states.pt"))
        for checkpoint in checkpoints
    )
    assert adapters < 0.6 * whole
    state = load_file(folder / "lora" / "model" / "model.safetensors")
    # one decoder position attends to itself alone: what its self-attention asks for makes no difference
    trained = {
        name: tensor
        for name, tensor in state.items()
        if "lora_B" in name and not re.search(r"decoder\..*SelfAttention\.[qk]\.", name)
    }
    assert len(trained) > 10
    assert all(bool(tensor.abs().sum() > 0) for tensor in trained.values()), (
        "gathered, not empty, and trained"
    )


@pytest.mark.long
@pytest.mark.parametrize("stage", ["2", "3"])
def test_adapters_on_a_frozen_bf16_backbone_learn_as_on_a_float32_one(folder: Path, stage: str) -> None:
    assert [r.get("status") for r in results(folder, f"lora_bf16_{stage}")] == ["finished"] * 2
    assert losses(folder / f"lora_bf16_{stage}") == pytest.approx(losses(folder / "lora"), rel=0.02)


@pytest.mark.parametrize("name", names(*DECODERS))
def test_a_decoder_trained_with_lora_under_zero3_is_registered_and_scores(folder: Path, name: str) -> None:
    from trainer.registry.signature import example_requests
    from trainer.registry.store import open_model
    from trainer.registry.versions import register

    assert [r.get("status") for r in results(folder, name)] == ["finished"] * 2, results(folder, name)
    state = load_file(folder / name / "model" / "model.safetensors")
    trained = [tensor for key, tensor in state.items() if "lora_B" in key]
    assert len(trained) == 2 * 7 and all(bool(tensor.abs().sum() > 0) for tensor in trained)
    version = register(folder / name, f"gensr-{name}")
    requests = example_requests(PreparedFolder.at(folder / "data"))
    registered = open_model(f"models:/gensr-{name}/{version}", f"sqlite:///{folder / 'mlflow.db'}").score(
        requests
    )
    for scores, expected in zip(registered, open_model(folder / name).score(requests), strict=True):
        assert scores == pytest.approx(expected, abs=1e-5) and len(set(scores)) > 1


def test_deepspeed_compiles_nothing(folder: Path) -> None:
    """Else each first start takes a minute longer, and needs a compiler."""
    assert not (folder / COMPILED).exists()


def test_another_learning_rate_is_refused_with_both_values(folder: Path) -> None:
    for result in results(folder, "other_lr"):
        assert result["error"] == "RunError"
        assert "optim.lr" in result["message"] and "was 0.001, is 0.5 now" in result["message"]


@pytest.mark.parametrize(
    "name", names("ddp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
)
def test_two_processes_train_like_one(folder: Path, name: str) -> None:
    assert [r.get("status") for r in results(folder, name)] == ["finished"] * 2, results(folder, name)
    assert losses(folder / name) == pytest.approx(losses(folder / "single"), abs=1e-5)
    one, two = (load_file(folder / run / "model" / "model.safetensors") for run in ("single", name))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
    # AdamW turns a rounding error in a gradient near 0 into a step of lr
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-3


@pytest.mark.parametrize("name", [pytest.param("zero2", marks=pytest.mark.long), "zero3"])
def test_gradients_of_the_tasks_are_read_from_checkpoints_of_any_stage(folder: Path, name: str) -> None:
    """`gensr analyse gradients` puts the ranks' shares together in one process."""
    ddp, sharded = measure([folder / "ddp", folder / name], Options(), lambda line: None)["runs"]
    assert (
        [point["step"] for point in ddp["points"]] == [point["step"] for point in sharded["points"]] == [2, 3]
    )
    assert ddp["points"][0]["layers"] != ddp["points"][1]["layers"]
    for point, expected in zip(sharded["points"], ddp["points"], strict=True):
        for layer, same in zip(point["layers"], expected["layers"], strict=True):
            numbers = {key: value for key, value in same.items() if isinstance(value, float)}
            found = {key: layer[key] for key in numbers}
            assert found == pytest.approx(numbers, rel=0.02, abs=0.02), layer["layer"]


def test_bf16_stays_near_fp32(folder: Path) -> None:
    assert losses(folder / "bf16") == pytest.approx(losses(folder / "zero2"), abs=0.03)
    assert losses(folder / "bf16") != losses(folder / "zero2")


def test_a_loss_that_is_not_finite_ends_the_run_on_all_ranks_and_names_the_events(folder: Path) -> None:
    first, second = results(folder, "poisoned")
    assert first == second and first["error"] == "RunError"
    assert "step 3, rank 1, event ids" in first["message"]
    assert json.loads((folder / "poisoned" / "status.json").read_text())["status"] == "failed"
    assert len(losses(folder / "poisoned")) == 2  # what came before stays


@pytest.mark.parametrize("name", names("left_out", "left_out2", "left_out3"))
def test_a_loss_that_is_not_finite_is_left_out_on_all_ranks(folder: Path, name: str) -> None:
    assert [r.get("status") for r in results(folder, name)] == ["finished"] * 2, results(folder, name)
    (skipped,) = [r for r in records(folder / name) if r["kind"] == "skipped"]
    assert skipped["step"] == 3 and len(skipped["event_ids"]) == 32, "rank 1's"
    assert losses(folder / name) == pytest.approx(losses(folder / "poisoned"), abs=1e-5), "what came before"
    state = load_file(folder / name / "model" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def test_gradients_of_two_ranks_are_those_of_the_union_batch(folder: Path) -> None:
    for result in results(folder, "gradients"):
        assert result["same_names"] and result["worst"] < 1e-6 * max(1.0, result["largest"]), result
