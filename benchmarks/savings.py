"""What each saving is worth on a CPU: a training step of gensr, and the same step with one saving removed.

    python -m benchmarks.savings FOLDER [--backbone scratch:small] [--events 32] [--precision bf16]
                                        [--turns 3]

FOLDER is a prepared folder with natural text and a CF table. Random weights, preset-like settings (compact
prompt). The steps take turns in one process; a ratio is the median over turns of seconds without the saving /
seconds with all of them. Parity of each saving is tested in tests/parity.
"""

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.models.t5.modeling_t5 import T5Attention, T5DenseGatedActDense, T5LayerNorm

from benchmarks.measuring import Meter, open_folder
from trainer.batch import Batch
from trainer.bench.data import hardware
from trainer.config import Config
from trainer.data import TrainStream
from trainer.models.backbones.backbone import Backbone
from trainer.models.backbones.t5_layers import AbsorbedCrossAttention, EncoderSelfAttention, GatedFeedForward
from trainer.models.gensr import grouping
from trainer.models.gensr.model import GenSR
from trainer.models.layers.norm import Norm
from trainer.runs.provenance import git_commit
from trainer.runs.weights import build_model
from trainer.runtime.device import autocast
from trainer.runtime.launch import Launch, make_accelerator
from trainer.training.optimizer import make_optimizer
from trainer.training.step import micro_step

SETTINGS = ("data.history_max=20", "model.variant=extended")


def as_pairs(batch: Batch) -> Batch:
    """Every (history, candidate) pair as an event of its own."""
    num_candidates = batch.candidates.shape[1]
    pairs = batch.take(torch.arange(batch.num_events).repeat_interleave(num_candidates))
    return pairs.with_candidates(batch.candidates.reshape(-1, 1), batch.labels.reshape(-1, 1))


@contextlib.contextmanager
def layers_of_transformers(model: GenSR, plain: dict[type[nn.Module], type[nn.Module]]) -> Iterator[None]:
    """transformers' own layers in place of ours."""
    modules = [(module, type(module)) for module in model.modules() if type(module) in plain]
    for module, kind in modules:
        module.__class__ = plain[kind]
    try:
        yield
    finally:
        for module, kind in modules:
            module.__class__ = kind


@contextlib.contextmanager
def one_draw_an_element() -> Iterator[None]:
    with (
        mock.patch("trainer.models.layers.dropout.dropout", F.dropout),
        mock.patch("trainer.models.backbones.t5_layers.dropout", F.dropout),
    ):
        yield


@contextlib.contextmanager
def gelu_of_transformers(model: GenSR) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(getattr(module, "act", None), nn.GELU)]
    for layer in layers:
        layer.act = NewGELUActivation()
    try:
        yield
    finally:
        for layer in layers:
            layer.act = nn.GELU(approximate="tanh")


def gradient_of_the_table(self: Backbone, tokens: Tensor) -> Tensor:
    return F.embedding(tokens.long(), self.embedding_weight())


def whole_vocabulary(self: Backbone, hidden_MD: Tensor, answers: Tensor) -> Tensor:
    return self.base.get_output_embeddings()(hidden_MD).float()[:, answers]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--backbone", default="scratch:small")
    parser.add_argument("--events", type=int, default=32, help="events a step, each with 1 + 4 candidates")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()

    overrides = [*SETTINGS, f"run.precision={arguments.precision}", f"model.backbone={arguments.backbone}"]
    config, folder, tables, _, _ = open_folder(
        {"preset": None, "overrides": overrides, "folder": arguments.folder}, "cpu"
    )
    stream = TrainStream(folder, config.data, config.run.seed, arguments.events, arguments.events)
    meter = Meter("cpu", warmup=0, laps=False)
    other = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, precision="fp32" if arguments.precision == "bf16" else "bf16"),
    )

    def build(prompt: Literal["compact", "paper"]) -> tuple[GenSR, torch.optim.Optimizer]:
        section: Any = config.model
        worded = dataclasses.replace(config, model=dataclasses.replace(section, prompt=prompt))
        net = build_model(worded, folder, tables).train()
        assert isinstance(net, GenSR)
        return net, make_optimizer(net, config.optim)

    fp32 = dataclasses.replace(config.run, precision="fp32")  # autocast below says which
    accelerator = make_accelerator(dataclasses.replace(config, run=fp32), Launch(), grad_accum_steps=1)
    model, optimizer = build("compact")
    paper, paper_optimizer = build("paper")
    unfused = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, foreach=False)

    def step(
        batch: Batch, net: GenSR = model, adam: torch.optim.Optimizer = optimizer, settings: Config = config
    ) -> None:
        with autocast("cpu", settings.run.precision):
            micro_step(accelerator, net, adam, net.prepare(batch), settings.optim.grad_clip, lap=meter.lap)

    def patched(patch: contextlib.AbstractContextManager[Any], batch: Batch) -> None:
        with patch:
            step(batch)

    without: dict[str, Callable[[Batch], None]] = {
        "the history encoded once per event": lambda batch: step(as_pairs(batch)),
        "searches of similar length together": lambda batch: patched(
            mock.patch.object(grouping, "LENGTH_GROUPS", 1), batch
        ),
        "position bias and mask computed once for all layers": lambda batch: patched(
            layers_of_transformers(model, {EncoderSelfAttention: T5Attention}), batch
        ),
        "absorbed cross-attention of one position": lambda batch: patched(
            layers_of_transformers(model, {AbsorbedCrossAttention: T5Attention}), batch
        ),
        "two answer logits, not the vocabulary": lambda batch: patched(
            mock.patch.object(type(model.backbone), "answer_rows", whole_vocabulary), batch
        ),
        "gradients of token rows, not of the table": lambda batch: patched(
            mock.patch.object(Backbone, "embed", gradient_of_the_table), batch
        ),
        "four dropout decisions per draw": lambda batch: patched(one_draw_an_element(), batch),
        "norms and feed-forward that cast once": lambda batch: patched(
            layers_of_transformers(model, {Norm: T5LayerNorm, GatedFeedForward: T5DenseGatedActDense}), batch
        ),
        "GELU as one kernel": lambda batch: patched(gelu_of_transformers(model), batch),
        "fused AdamW": lambda batch: step(batch, adam=unfused),
        f"{arguments.precision} instead of {other.run.precision}": lambda batch: step(batch, settings=other),
        "compact prompt": lambda batch: step(batch, paper, paper_optimizer),
    }

    def seconds(run: Callable[[Batch], None], batch: Batch) -> float:
        started_s = time.process_time()
        run(batch)
        return time.process_time() - started_s

    measured: dict[str, list[float]] = {name: [] for name in without}
    for turn, batch in enumerate(itertools.islice(stream, arguments.turns + 1)):  # the first one warms up
        for name, run in without.items():
            ratio = seconds(run, batch) / seconds(step, batch)
            if turn:
                measured[name].append(ratio)
    print("| removed | CPU seconds of a step, × |\n|---|---|")
    for name, ratios in measured.items():
        print(f"| {name} | {statistics.median(ratios):.2f} |")
    print(f"{vars(arguments)}; {hardware()}; commit {git_commit()}")


if __name__ == "__main__":
    main()
