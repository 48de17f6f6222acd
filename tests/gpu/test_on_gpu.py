"""What only a GPU can show: the CPU's numbers, no wait in a step, training that is killed and goes on,
tables, answers, compiled layers, benchmarks.

`make test-gpu`; skipped where there is none, and in `make test`, which hides GPUs (tests/conftest.py).
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ds_configs
from data_shards.schema import read_manifest
from tests.runs import make_run
from tests.tiny_folder import make_tiny_folder
from tests.tiny_model import Made, make_tiny_model, move
from trainer.batch import Batch
from trainer.bench.model import bench_model
from trainer.cf.lightgcn import LightGCN, build_graph
from trainer.configs import load_config
from trainer.data import EvalStream, TrainStream, prefetched
from trainer.data.folder import PreparedFolder
from trainer.evaluation.sampled import evaluate_run
from trainer.models.gensr.model import GenSR
from trainer.runtime.stopping import end_with_children
from trainer.serving.recommend import Recommender
from trainer.training.optimizer import make_optimizer

DEVICE = "cuda"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-gpu"),
]
BACKBONES = ["scratch:nano", "scratch:llama_nano", "scratch:qwen3_nano"]
HISTORY = [{"item_id": "i3", "task": "rec"}, {"item_id": "i7", "task": "src"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make(folder: Path) -> Callable[..., Made]:
    def made(*overrides: str) -> Made:
        torch.manual_seed(0)
        model, batch = make_tiny_model(folder, *overrides)
        return model, model.prepare(batch)

    return made


def scores_and_gradients(model: GenSR, batch: Batch, bf16: bool = False) -> list[Tensor]:
    """Scores, then the gradients in the order of the parameters, on the CPU in float32."""
    with torch.autocast(batch.candidates.device.type, dtype=torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            scores = model.score(batch)
        loss, _ = model(batch)
    loss.backward()
    return [
        scores.float().cpu(),
        *(p.grad.to_dense().float().cpu() for p in model.parameters() if p.grad is not None),
    ]


@pytest.mark.parametrize("variant", ["paper", "extended"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_scores_and_gradients_are_those_of_the_cpu(
    make: Callable[..., Made], backbone: str, variant: str
) -> None:
    model, batch = make(f"model.backbone={backbone}", f"model.variant={variant}", "model.dropout=0")
    expected = scores_and_gradients(model, batch)
    model.zero_grad()
    found = scores_and_gradients(model, move(model, batch, DEVICE))
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bf16_is_near(make: Callable[..., Made], backbone: str) -> None:
    """Rounded to 8 bits, summed in float32: the whole gradient keeps its direction and length."""
    model, batch = make(f"model.backbone={backbone}", "model.dropout=0")
    batch = move(model, batch, DEVICE)
    exact, *exact_gradients = scores_and_gradients(model, batch)
    model.zero_grad()
    rounded, *rounded_gradients = scores_and_gradients(model, batch, bf16=True)
    assert float((rounded - exact).abs().max()) < 0.05 * max(1.0, float(exact.abs().max()))
    one, other = (
        torch.cat([gradient.flatten() for gradient in gradients])
        for gradients in (rounded_gradients, exact_gradients)
    )
    assert float(torch.cosine_similarity(one, other, dim=0)) > 0.99
    assert float(one.norm() / other.norm()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    "setting", ["model.dropout=0.1", "model.lora.rank=4", "model.activation_checkpointing=true"]
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_step_waits_for_nothing(
    make: Callable[..., Made], folder: Path, backbone: str, setting: str
) -> None:
    """torch refuses every wait after the first step, which loads libraries. Batches are pinned and copied by
    the loader's thread, as in training."""
    config = load_config(None, ["data.history_max=6", f"model.backbone={backbone}", setting])
    model, batch = make("data.history_max=6", f"model.backbone={backbone}", setting)
    move(model, batch, DEVICE)
    model.train()
    optimizer = make_optimizer(model, config.optim)
    stream = TrainStream(PreparedFolder.at(folder), config.data, 0, 16, 16, num_folds=2)
    for number, host_batch in zip(
        range(3), prefetched(iter(stream), prepare=model.prepare, device=DEVICE), strict=False
    ):
        if number:
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                loss, _ = model(host_batch.to(DEVICE))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


def test_compiled_layers_give_the_same(make: Callable[..., Made]) -> None:
    model, batch = make("model.backbone=scratch:nano", "model.dropout=0")
    batch = move(model, batch, DEVICE)
    expected = scores_and_gradients(model, batch)
    model.zero_grad()
    model.backbone.compile_layers()
    for one, other in zip(scores_and_gradients(model, batch), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(1.0, float(other.abs().max())))


def test_the_cf_tables_loss_and_gradients_are_those_of_the_cpu() -> None:
    generator = np.random.default_rng(0)
    keys = np.unique(generator.integers(0, 500 * 300, 4000))
    users, items = keys // 300, keys % 300
    graph, model = build_graph(users, items, 500, 300), LightGCN(500, 300, 64)
    user, positive = torch.from_numpy(users), torch.from_numpy(items)
    negative = torch.from_numpy(generator.integers(0, 350, len(users)))  # some of them outside the graph
    results = []
    for device in ("cpu", DEVICE):
        model.to(device).zero_grad()
        loss = model.loss(
            graph.to(device), user.to(device), positive.to(device), negative.to(device), reg=0.01
        )
        loss.backward()
        results.append(
            [loss.detach().cpu(), *(p.grad.cpu().clone() for p in model.parameters() if p.grad is not None)]
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("launch_file", ["", "accelerate_gpu_1_zero2.yaml"])
def test_a_training_that_is_killed_goes_on(folder: Path, tmp_path: Path, launch_file: str) -> None:
    """From the real command, in bf16: every step is there once, the losses are finite and fall, and the model
    evaluates on the GPU."""
    run_dir = tmp_path / "run"
    launcher = (
        ["-m", "accelerate.commands.launch", "--config_file", str(ds_configs.path(launch_file))]
        if launch_file
        else []
    )
    settings = [
        f"data.dir={folder}",
        f"run.dir={run_dir}",
        "model.backbone=scratch:nano",
        "data.history_max=6",
        "data.item_tokens=8",
        "data.history_tokens=4",
        "optim.global_batch_size=16",
        "optim.micro_batch_size=8",
        "optim.lr=0.002",
        "run.precision=bf16",
        "run.max_steps=400",
        "run.log_every_steps=1",
        "run.checkpoint_every_steps=10",
        "run.validate_every_steps=200",
        "run.valid_events=16",
        "tracking.enabled=false",
    ]
    command = [sys.executable, *launcher, "-m", "trainer", "train", "demo", *settings, "--resume", "auto"]
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        while not (run_dir / "checkpoints" / "latest").exists():
            assert first.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)
        end_with_children(first.pid)
        assert first.wait(60) == -signal.SIGKILL
        assert subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode == 0, (
            tmp_path / "log"
        ).read_text()[-3000:]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
    assert list(losses) == list(range(1, 401))
    assert np.isfinite(list(losses.values())).all()
    assert np.mean([losses[step] for step in range(350, 401)]) < np.mean(
        [losses[step] for step in range(1, 51)]
    )
    assert evaluate_run(run_dir, with_baselines=False)["rec"]["num_events"] > 0


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.02)])
def test_answers_are_those_of_the_cpu(
    prepared: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    run_dir = make_run(tmp_path, prepared, f"run.precision={precision}")
    on_cpu, on_gpu = (Recommender.from_run(run_dir, device) for device in ("cpu", None))
    assert (on_gpu.scorer.model.tables.cf.device.type, on_gpu.scorer.precision) == (DEVICE, precision)
    for request in (
        {"task": "rec", "history": HISTORY, "k": 10, "explain": True},
        {"task": "src", "history": HISTORY, "query": "red lamp", "k": 5},
    ):
        one, other = on_gpu.recommend(request), on_cpu.recommend(request)
        assert one["scores"] == pytest.approx(other["scores"], abs=tolerance)


def test_scoring_over_several_shapes_makes_no_plan_for_each(make: Callable[..., Made], folder: Path) -> None:
    """cuDNN's attention would take half a second for a new shape (trainer/models/backbones/backbone.py)."""
    model, batch = make("model.backbone=scratch:nano")
    move(model.eval(), batch, DEVICE)
    config, _manifest = load_config(None, ["data.history_max=6"]), read_manifest(folder)
    seconds = []
    for num_events in range(1, 9):
        host_batch = next(iter(EvalStream(PreparedFolder.at(folder), "valid", config.data, num_events)))
        torch.cuda.synchronize()
        started_s = time.monotonic()
        with torch.inference_mode(), torch.autocast(DEVICE, dtype=torch.bfloat16):
            model.score(model.prepare(host_batch).to(DEVICE))
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - started_s)
    assert np.median(seconds[1:]) < 0.2, seconds


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_the_benchmark_measures(mode: str) -> None:
    document = bench_model(mode, ["model.backbone=scratch:nano"], pairs=100, steps=2, turns=1)  # type: ignore[arg-type]
    assert document["hardware"]["device"] == torch.cuda.get_device_name()
    assert document["ratio_to_reference"] > 0 and document["peak_memory_bytes"] > 0
