"""Variables of accelerate that another launch or a site's script has left: refused with both values, where
they would change the run."""

import pytest
import torch

from trainer.configs import load_config
from trainer.errors import ConfigError, EnvironmentProblem
from trainer.runtime.launch import TORCHS_LINEAR, Launch, make_accelerator

STEPS = 2


def accelerator_with(monkeypatch: pytest.MonkeyPatch, **environment: str) -> object:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return make_accelerator(load_config(None, ["run.threads=1"]), Launch(), STEPS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", r"=4: 4 there, 2 in the run"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", r"INDUCTOR there, NO in the run"),
        ("ACCELERATE_USE_FSDP", "true", r"ACCELERATE_USE_FSDP=true"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", r"ACCELERATE_USE_MEGATRON_LM=1"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", r"ACCELERATE_USE_PARALLELISM_CONFIG=true"),
    ],
)
def test_a_variable_that_changes_the_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        accelerator_with(monkeypatch, **{name: value})


def test_variables_that_agree_or_lose_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = accelerator_with(
        monkeypatch,
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS=str(STEPS),
        ACCELERATE_DYNAMO_BACKEND="no",
        ACCELERATE_USE_FSDP="false",
        ACCELERATE_MIXED_PRECISION="fp16",  # the argument wins
    )
    assert accelerator.mixed_precision == "no"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_cannot_meet_are_told_how(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """mpirun and srun start them; accelerate and torch speak of exporting a variable."""
    for left in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(left, "")  # accelerate sets some, to be undone
        monkeypatch.delenv(left)
    with pytest.raises(EnvironmentProblem, match="Start with accelerate launch or torchrun; or unset"):
        accelerator_with(monkeypatch, **{name: "2"})


def test_zero3_leaves_a_later_run_torchs_linear_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's adds up gradients in another order: on some CPUs the later run ends a bit off."""
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: None)
    accelerator_with(monkeypatch)
    assert torch.nn.functional.linear is TORCHS_LINEAR
