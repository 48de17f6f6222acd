"""Training steps or scoring as gensr does them, measured. argv: a JSON object (see reference.py), also
`trace`: a file for torch's profiler."""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import Meter, open_folder, scored_events
from trainer.batch import Batch
from trainer.config import Config
from trainer.data import TrainStream, prefetched
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import build_model
from trainer.runtime.device import autocast, has_gpu
from trainer.runtime.memory import keep_freed_memory
from trainer.training.costs import flops_per_event, measured_flops
from trainer.training.optimizer import make_optimizer
from trainer.training.plan import size_of


def main(request: dict[str, Any]) -> None:
    config, manifest, tables, _, device = open_folder(request)
    model = build_model(config, manifest, tables, request["folder"]).to(device)
    keep_freed_memory()
    training, num_candidates = request["mode"] == "train", 1 + config.data.num_negatives
    model.train(training)
    optimizer = make_optimizer(model, config.optim)
    source = prefetched(stream(request, manifest, config), prepare=model.grouped, device=device)
    prompts = PromptLengths(model)
    laps = device == "cpu"
    meter = Meter(device, warmup=request["warmup"], laps=laps)
    with profiler(request.get("trace", "")):
        for _ in range(request["warmup"] + request["steps"]):
            with meter.step():
                batch = next(source).to(device)
                meter.count(batch.candidates.numel())
                meter.lap("data")
                if training:
                    one_step(model, batch, optimizer, meter, config)
                else:
                    with torch.inference_mode(), autocast(device, config.run.precision):
                        model.score(batch)
                    meter.lap("forward")
    meter.stop()
    if training and not laps:  # as many steps more, for the parts alone
        extra = Meter(device, warmup=1)
        for batch in itertools.islice(source, 1 + request["steps"]):
            with extra.step():
                batch = batch.to(device)
                extra.lap("data")
                one_step(model, batch, optimizer, extra, config)
        meter.parts = extra.parts
    mean_tokens = prompts.mean()
    answer = {**meter.report(), "prompt_tokens": round(mean_tokens, 1), "mfu": None}
    if device == "cuda" and training:
        flops = (
            flops_per_event(config, size_of(model), mean_tokens * num_candidates)
            / num_candidates
            * meter.examples
            / meter.wall_s
        )
        answer["mfu"] = round(
            flops
            / measured_flops(
                device=device, dtype=torch.bfloat16 if config.run.precision == "bf16" else torch.float32
            ),
            3,
        )
    print(json.dumps(answer))


def one_step(
    model: GenSR, batch: Batch, optimizer: torch.optim.Optimizer, meter: Meter, config: Config
) -> None:
    """As trainer/training/loop.py has it, on one process."""
    with autocast(batch.candidates.device, config.run.precision):
        loss, _ = model(batch)
    meter.lap("forward")
    loss.backward()
    meter.lap("backward")
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    meter.lap("optimiser")


def stream(request: dict[str, Any], manifest: Any, config: Any) -> Iterator[Batch]:
    """Batches of `pairs` pairs: events × (1 + negatives) in training, × candidates in evaluation."""
    if request["mode"] == "train":
        events = request["pairs"] // (1 + config.data.num_negatives)
        return iter(TrainStream(request["folder"], manifest, config.data, config.run.seed, events, events))
    return scored_events(request, manifest, config)


class PromptLengths:
    """Mean length of the prompts that an encoder-decoder's encoder reads, padding included."""

    def __init__(self, model: GenSR) -> None:
        self.tokens = self.prompts = 0
        model.backbone.stacks[0].register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, encoder: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        num_prompts, length = named["inputs_embeds"].shape[:2]
        self.prompts += num_prompts
        self.tokens += num_prompts * length

    def mean(self) -> float:
        return self.tokens / self.prompts


@contextlib.contextmanager
def profiler(trace: str) -> Iterator[None]:
    if not trace:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU] + (
        [torch.profiler.ProfilerActivity.CUDA] if has_gpu() else []
    )
    with torch.profiler.profile(activities=activities) as profile:
        yield
    Path(trace).parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(trace)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
