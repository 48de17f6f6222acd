"""torch.compile in training, and a CUDA graph of scoring one batch, whose shapes are static."""

import gc
import time

import torch

from benchmarks import gensr_steps
from benchmarks.gpu import speed
from benchmarks.gpu.report import Report, failure
from benchmarks.gpu.task import Task
from trainer.runtime.device import autocast, has_gpu

REPLAYS = 20


def run(task: Task, report: Report) -> None:
    graph_of_scoring(task, report)
    # rehearsed in scoring: without a backward pass a CPU compiles for a minute, not for several
    mode = "evaluate" if task.rehearse else "train"
    pairs, _, steps = speed.sizes(task, mode)
    rates = {}
    for compiled in ("false", "true"):
        settings = ("model.prompt=compact", "run.precision=bf16", f"model.compile={compiled}")
        started_s = time.monotonic()
        what = f"{speed.NAME[mode]}, compact prompt, model.compile={compiled}"
        try:
            found = speed.measure(speed.request_of(task, mode, pairs, steps, *settings))
        except Exception as error:  # the compiler raises errors of many kinds: one is a result
            report.note(what, failure(error))
            return
        rates[compiled] = found["per_s"]
        report.add(what, found["per_s"], speed.UNIT[mode])
        report.add(f"{what}: with warming up", time.monotonic() - started_s, "s")
    report.add(f"{speed.NAME[mode]}: compiled / not", rates["true"] / rates["false"], "×")


def graph_of_scoring(task: Task, report: Report) -> None:
    """One batch scored as ever, and by replaying its recorded kernels. 100 pairs:
    few enough to wait for launches."""
    if not has_gpu():
        report.note("CUDA graph of scoring", "skipped: no GPU")
        return
    request = speed.request_of(task, "evaluate", 100, 1, "model.prompt=compact", "run.precision=bf16")
    steps = gensr_steps.Steps(request)
    batch = next(steps.source).to(steps.device)

    def seconds(call: object) -> float:
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        for _ in range(REPLAYS):
            call()  # type: ignore[operator]
        torch.cuda.synchronize()
        return (time.perf_counter() - started_s) / REPLAYS

    def score() -> torch.Tensor:
        return steps.module.score(batch)

    with torch.inference_mode(), autocast(steps.device, "bf16"):
        # autocast's cache of cast weights would belong to the graph
        torch.set_autocast_cache_enabled(False)
        score()
        eager_s = seconds(score)
        report.add("scoring 100 pairs", 1000 * eager_s, "ms")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            score()
        torch.cuda.current_stream().wait_stream(side)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                scores = score()
            graph.replay()
            torch.cuda.synchronize()
            difference = float((scores - score()).abs().max())
            report.add("scoring 100 pairs, CUDA graph", 1000 * seconds(graph.replay), "ms")
            report.add("CUDA graph: largest difference of a score", difference)
        except RuntimeError as error:
            report.note("CUDA graph of scoring", failure(error))
    gc.collect()
