"""Variables of accelerate that another launch or a site's script has left: refused with both values, where
they would change the run."""

import pytest
import torch

from trainer.configs import load_config
from trainer.errors import ConfigError
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


def test_zero3_leaves_a_later_run_torchs_linear_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's adds up gradients in another order: on some CPUs the later run ends a bit off."""
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: None)
    accelerator_with(monkeypatch)
    assert torch.nn.functional.linear is TORCHS_LINEAR
