"""No step waits for its device. The device of these tests is torch's "meta": it computes shapes and holds no
values, so whoever asks it for one fails."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tiny_folder import make_tiny_folder
from tests.tiny_model import Made, make_tiny_model, move
from trainer.models.backbones.backbone import Backbone
from trainer.models.gensr.evidence import Evidence


class NothingFromTheHost(TorchDispatchMode):
    """Refuses operations that mix the device's tensors with the CPU's: on a GPU each is a copy that is waited
    for. Scalars travel with the kernel."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        assert not any(tensor.device.type == "cpu" and tensor.ndim for tensor in tensors), (
            f"{func} reads a tensor of the CPU"
        )
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    folder = make_tiny_folder(tmp_path_factory.mktemp("tiny"))
    return lambda *overrides: make_tiny_model(folder, *overrides)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch lacks for "meta": autocast, and sums of sparse gradients."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(
        Backbone, "embed", lambda self, tokens: F.embedding(tokens.long(), self.embedding_weight())
    )


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("backbone", ["scratch:nano", "scratch:llama_nano", "scratch:qwen3_nano"])
@pytest.mark.parametrize(
    "setting",
    [
        "model.variant=paper",
        "model.variant=extended",
        "model.activation_checkpointing=true",
        "model.lora.rank=4",
        "model.evidence=true model.evidence_categories=true model.evidence_queries=true",
    ],
)
def test_a_training_step_asks_its_device_for_nothing(
    make: Callable[..., Made], backbone: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make(f"model.backbone={backbone}", *setting.split())
    batch = move(model, model.prepare(batch), "meta")
    real_tensor = torch.tensor

    def only_empty_ones(data: Any, *arguments: Any, **settings: Any) -> Tensor:
        assert data == [], f"torch.tensor({data}) on the device copies it there"
        return real_tensor(data, *arguments, **settings)

    monkeypatch.setattr(torch, "tensor", only_empty_ones)
    with NothingFromTheHost():
        loss, report = model(batch)
        loss.backward()
    assert {loss.device.type, *(value.device.type for value in report.values())} == {"meta"}


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize(
    "settings",
    [
        ("evidence=true",),
        ("mined_negatives=2",),
        ("evidence=true", "evidence_queries=true", "mined_negatives=2"),
    ],
)
def test_evidence_and_mining_ask_their_device_for_nothing(
    make: Callable[..., Made], settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is mined from is opened by the first step, before others may not wait any more. Mining alone does
    not compute the evidence that nobody reads."""
    model, batch = make("model.backbone=scratch:nano", *(f"model.{setting}" for setting in settings))
    if not model.reads_evidence:
        monkeypatch.setattr(Evidence, "shared_words", None)
    model.fit()
    model(batch)
    batch = move(model, model.prepare(batch), "meta")
    model._mine = [on_device(mine, "meta") for mine in model._mine]
    with NothingFromTheHost():
        loss, _ = model(batch)
        loss.backward()
    assert loss.device.type == "meta"


def on_device(value: Any, device: str) -> Any:
    """A dataclass of tensors."""
    if isinstance(value, Tensor):
        return value.to(device)
    return replace(value, **{name: on_device(part, device) for name, part in vars(value).items()})


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("backbone", ["scratch:nano", "scratch:qwen3_nano"])
def test_scoring_asks_its_device_for_nothing(make: Callable[..., Made], backbone: str) -> None:
    model, batch = make(f"model.backbone={backbone}")
    batch = move(model.eval(), model.prepare(batch), "meta")
    with NothingFromTheHost(), torch.inference_mode():
        assert model(batch, mode="score").shape == batch.candidates.shape


@pytest.mark.usefixtures("on_meta")
def test_the_test_device_cannot_be_read(make: Callable[..., Made]) -> None:
    """A batch whose groups were not decided on the CPU makes the model ask; a table left on the CPU is
    noticed."""
    model, batch = make("model.backbone=scratch:nano")
    grouped = move(model, model.prepare(batch), "meta")
    with pytest.raises(NotImplementedError, match="no data"):
        model(replace(grouped, groups=None))
    model.set_tables(replace(model.tables, cf=torch.zeros(model.tables.cf.shape)))
    with NothingFromTheHost(), pytest.raises(AssertionError, match="reads a tensor of the CPU"):
        model(grouped)
