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
from trainer.data import PreparedFolder, TrainStream, prefetched
from trainer.models.gensr.cost import backbone_size, flops_per_event
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import build_model
from trainer.runtime.device import autocast, has_gpu
from trainer.runtime.launch import Launch, make_accelerator
from trainer.runtime.memory import keep_freed_memory
from trainer.training.costs import measured_flops
from trainer.training.optimizer import make_optimizer
from trainer.training.step import micro_step


def main(request: dict[str, Any]) -> None:
    config, folder, tables, _, device = open_folder(request)
    accelerator = make_accelerator(config, Launch(), grad_accum_steps=1)
    module = build_model(config, folder, tables)
    assert isinstance(module, GenSR)
    keep_freed_memory()
    training, num_candidates = request["mode"] == "train", 1 + config.data.num_negatives
    model, optimizer = accelerator.prepare(module.train(training), make_optimizer(module, config.optim))
    source = prefetched(stream(request, folder, config), prepare=module.prepare, device=device)
    prompts = PromptLengths(module)
    laps = device == "cpu"
    meter = Meter(device, warmup=request["warmup"], laps=laps)
    with profiler(request.get("trace", "")):
        for _ in range(request["warmup"] + request["steps"]):
            with meter.step():
                batch = next(source).to(device)
                meter.count(batch.candidates.numel())
                meter.lap("data")
                if training:
                    micro_step(accelerator, model, optimizer, batch, config.optim.grad_clip, lap=meter.lap)
                else:
                    with torch.inference_mode(), autocast(device, config.run.precision):
                        module.score(batch)
                    meter.lap("forward")
    meter.stop()
    if training and not laps:  # as many steps more, for the parts alone
        extra = Meter(device, warmup=1)
        for batch in itertools.islice(source, 1 + request["steps"]):
            with extra.step():
                batch = batch.to(device)
                extra.lap("data")
                micro_step(accelerator, model, optimizer, batch, config.optim.grad_clip, lap=extra.lap)
        meter.parts = extra.parts
    mean_tokens = prompts.mean()
    answer = {**meter.report(), "prompt_tokens": round(mean_tokens, 1), "mfu": None}
    if device == "cuda" and training:
        tokens = mean_tokens * num_candidates
        size = backbone_size(module.backbone)
        an_event = flops_per_event(module.settings, size, num_candidates, tokens)
        flops = an_event / num_candidates * meter.examples / meter.wall_s
        answer["mfu"] = round(
            flops
            / measured_flops(
                device=device, dtype=torch.bfloat16 if config.run.precision == "bf16" else torch.float32
            ),
            3,
        )
    print(json.dumps(answer))


def stream(request: dict[str, Any], folder: PreparedFolder, config: Config) -> Iterator[Batch]:
    """Batches of `pairs` pairs: events × (1 + negatives) in training, × candidates in evaluation."""
    if request["mode"] == "train":
        events = request["pairs"] // (1 + config.data.num_negatives)
        return iter(TrainStream(folder, config.data, config.run.seed, events, events))
    return scored_events(request, folder, config)


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
