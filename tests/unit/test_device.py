"""No step waits for its device. The device of these tests is torch's "meta": it computes shapes and holds no values, so whoever asks it for one fails."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tiny_folder import make_tiny_folder
from trainer.batch import Batch
from trainer.catalog import load_tables
from trainer.cf.table_file import load_cf
from trainer.config import load_config
from trainer.data import TrainStream
from trainer.loading import build_model
from trainer.model.backbone import Backbone
from trainer.model.gensr import GenSR

Made = tuple[GenSR, Batch]


class NothingFromTheHost(TorchDispatchMode):
    """Refuses operations that mix the device's tensors with the CPU's: on a GPU each is a copy that is waited for. Scalars travel with the kernel."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        assert not any(tensor.device.type == "cpu" and tensor.ndim for tensor in tensors), f"{func} reads a tensor of the CPU"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    from data_shards.schema import read_manifest

    folder: Path = make_tiny_folder(tmp_path_factory.mktemp("tiny"))

    def made(*overrides: str) -> Made:
        config = load_config(None, ["data.history_max=6", "model.contrastive_weight=0.1", "model.listwise_weight=1", *overrides])
        manifest = read_manifest(folder)
        model = build_model(config, manifest, load_tables(folder, manifest, load_cf(folder, manifest)), folder).train()
        batch = next(iter(TrainStream(folder, manifest, config.data, 0, 16, 16, num_folds=2)))
        return model, batch

    return made


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch lacks for "meta": autocast, and sums of sparse gradients."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(Backbone, "embed", lambda self, tokens: F.embedding(tokens.long(), self.embedding_weight()))


def to_meta(model: GenSR, batch: Batch) -> Batch:
    model.to("meta")
    model.set_tables(model.tables.to("meta"))
    return batch.to("meta")


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("backbone", ["scratch:nano", "scratch:llama_nano", "scratch:qwen3_nano"])
@pytest.mark.parametrize("setting", ["model.variant=paper", "model.variant=extended", "model.activation_checkpointing=true", "model.lora.rank=4"])
def test_a_training_step_asks_its_device_for_nothing(make: Callable[..., Made], backbone: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(f"model.backbone={backbone}", setting)
    batch = to_meta(model, model.grouped(batch))
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
@pytest.mark.parametrize("backbone", ["scratch:nano", "scratch:qwen3_nano"])
def test_scoring_asks_its_device_for_nothing(make: Callable[..., Made], backbone: str) -> None:
    model, batch = make(f"model.backbone={backbone}")
    batch = to_meta(model.eval(), model.grouped(batch))
    with NothingFromTheHost(), torch.inference_mode():
        assert model(batch, mode="score").shape == batch.candidates.shape


@pytest.mark.usefixtures("on_meta")
def test_the_test_device_cannot_be_read(make: Callable[..., Made]) -> None:
    """A batch whose groups were not decided on the CPU makes the model ask; a table left on the CPU is noticed."""
    model, batch = make("model.backbone=scratch:nano")
    grouped = to_meta(model, model.grouped(batch))
    with pytest.raises(NotImplementedError, match="no data"):
        model(replace(grouped, groups=None))
    model.set_tables(replace(model.tables, cf=torch.zeros(model.tables.cf.shape)))
    with NothingFromTheHost(), pytest.raises(AssertionError, match="reads a tensor of the CPU"):
        model(grouped)
