"""Training steps or scoring as gensr does them, measured. argv: a JSON object (see reference.py), also
`trace`: a file for torch's profiler; `tasks`: whose events are trained on (both)."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import Meter, forget_building, open_folder, scored_events
from data_shards.schema import REC, SRC
from trainer.batch import Batch
from trainer.config import Config
from trainer.data import PreparedFolder, TrainStream, prefetched
from trainer.models.backbones.cost import backbone_size, flops_per_event
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import build_model
from trainer.runtime.device import autocast, has_gpu
from trainer.runtime.launch import Launch, make_accelerator
from trainer.runtime.memory import keep_freed_memory
from trainer.training.costs import measured_flops
from trainer.training.optimizer import make_optimizer
from trainer.training.step import micro_step


class Steps:
    """The model and its batches as training has them; a call is one step, of training or of scoring."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.config, folder, tables, _, self.device = open_folder(request)
        self.accelerator = make_accelerator(self.config, Launch(), grad_accum_steps=1)
        # billions of random weights are drawn there in a second; files are read without it, onto the CPU
        with torch.device(self.device) if request.get("weights_on_device") else contextlib.nullcontext():
            module = build_model(self.config, folder, tables)
        assert isinstance(module, GenSR)
        keep_freed_memory()
        self.module, self.training = module, request["mode"] == "train"
        self.model, self.optimizer = self.accelerator.prepare(
            module.train(self.training), make_optimizer(module, self.config.optim)
        )
        self.source = prefetched(
            stream(request, folder, self.config), prepare=module.prepare, device=self.device
        )
        self.prompts = PromptLengths(module)
        forget_building()

    def __call__(self, meter: Meter) -> None:
        with meter.step():
            batch = next(self.source).to(self.device)
            meter.count(batch.candidates.numel())
            meter.lap("data")
            if self.training:
                micro_step(
                    self.accelerator,
                    self.model,
                    self.optimizer,
                    batch,
                    self.config.optim.grad_clip,
                    lap=meter.lap,
                )
            else:
                with torch.inference_mode(), autocast(self.device, self.config.run.precision):
                    self.module.score(batch)
                meter.lap("forward")

    def flops_per_example(self) -> float:
        """Of a (history, candidate) pair, at the prompt lengths that were seen."""
        num_candidates = 1 + self.config.data.num_negatives
        tokens = self.prompts.mean() * num_candidates
        size = backbone_size(self.module.backbone)
        flops = flops_per_event(self.module.settings, size, num_candidates, tokens) / num_candidates
        return flops if self.training else flops / 3  # forward alone, of 2 forward and 4 backward


def measured(request: dict[str, Any]) -> dict[str, Any]:
    """What `steps` steps after `warmup` took. mfu: on a GPU; request["mfu"] asks for it elsewhere."""
    steps = Steps(request)
    laps = steps.device == "cpu"
    meter = Meter(steps.device, warmup=request["warmup"], laps=laps)
    with profiler(request.get("trace", "")):
        for _ in range(request["warmup"] + request["steps"]):
            steps(meter)
    meter.stop()
    if steps.training and not laps:  # as many steps more, for the parts alone
        extra = Meter(steps.device, warmup=1)
        for _ in range(1 + request["steps"]):
            steps(extra)
        meter.parts = extra.parts
    answer = {**meter.report(), "prompt_tokens": round(steps.prompts.mean(), 1), "mfu": None}
    if request.get("mfu", steps.device == "cuda"):
        dtype = torch.bfloat16 if steps.config.run.precision == "bf16" else torch.float32
        rate = measured_flops(device=steps.device, dtype=dtype)
        answer["mfu"] = round(steps.flops_per_example() * meter.examples / meter.wall_s / rate, 3)
    return answer


def stream(request: dict[str, Any], folder: PreparedFolder, config: Config) -> Iterator[Batch]:
    """Batches of `pairs` pairs: events × (1 + negatives) in training, × candidates in evaluation."""
    if request["mode"] == "train":
        events = request["pairs"] // (1 + config.data.num_negatives)
        tasks = tuple(request.get("tasks", (REC, SRC)))
        return iter(TrainStream(folder, config.data, config.run.seed, events, events, tasks=tasks))
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
    print(json.dumps(measured(json.loads(sys.argv[1]))))
