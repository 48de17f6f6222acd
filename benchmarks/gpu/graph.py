"""A CUDA graph of scoring one batch, whose shapes are static: as ever, and by replaying its recorded kernels.
100 pairs: few enough to wait for launches.

A part of its own: a recording that fails leaves a process in which torch draws no random numbers any more.
"""

import time
from collections.abc import Callable

import torch

from benchmarks import gensr_steps
from benchmarks.gpu import speed
from benchmarks.gpu.report import Report, failure
from benchmarks.gpu.task import Task
from trainer.runtime.device import autocast, has_gpu, wait_for

REPLAYS = 20


def run(task: Task, report: Report) -> None:
    request = speed.request_of(task, "evaluate", 100, 1, "model.prompt=compact", "run.precision=bf16")
    steps = gensr_steps.Steps(request)
    batch = next(steps.source).to(steps.device)
    replays = 2 if task.rehearse else REPLAYS

    def score() -> torch.Tensor:
        return steps.module.score(batch)

    def seconds(call: Callable[[], object]) -> float:
        wait_for(steps.device)
        started_s = time.perf_counter()
        for _ in range(replays):
            call()
        wait_for(steps.device)
        return (time.perf_counter() - started_s) / replays

    with torch.inference_mode(), autocast(steps.device, "bf16"):
        # autocast's cache of cast weights would belong to the graph
        torch.set_autocast_cache_enabled(False)
        score()
        report.add("scoring 100 pairs", 1000 * seconds(score), "ms")
        if not has_gpu():
            report.note("CUDA graph of scoring", "skipped: no GPU")
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            score()
        torch.cuda.current_stream().wait_stream(side)
        try:
            graph = torch.cuda.CUDAGraph()
            # thread_local: the loader's thread may pin memory meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                scores = score()
            graph.replay()
            torch.cuda.synchronize()
            difference = float((scores - score()).abs().max())
            report.add("scoring 100 pairs, CUDA graph", 1000 * seconds(graph.replay), "ms")
            report.add("CUDA graph: largest difference of a score", difference)
        except RuntimeError as error:
            report.note("CUDA graph of scoring", failure(error))
