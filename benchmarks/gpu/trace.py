"""torch's profiler over a step of training and of scoring: which share of the device's time is matrix
products, how many kernels are launched, how long the device waits for the next one."""

import re
import time
from collections.abc import Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks import gensr_steps
from benchmarks.gpu import speed
from benchmarks.gpu.report import Report
from benchmarks.gpu.task import Task
from benchmarks.measuring import Meter
from trainer.runtime.device import has_gpu, wait_for

KINDS = {  # of kernels, and of operators where there is no GPU; the first that fits
    "attention": r"flash|fmha|attention|sdpa",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|aten::(add)?mm|aten::(b|badd)bmm|aten::linear",
    "copies and casts": r"memcpy|memset|copy|cast|aten::(to|_to_copy|clone)",
    "reductions and norms": r"reduce|norm|softmax",
    "optimiser": r"adam|multi_tensor",
}
# Of the host for the device. cudaDeviceSynchronize is this file's own: a step calls it nowhere.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.I)), "the rest")


def summary(events: Iterable[Any], wall_s: float, on_gpu: bool) -> dict[str, Any]:
    """Of kineto's events: shares by kind, launches, waits; `idle`: the share of the clock in which no kernel
    ran. On a CPU operators stand for kernels, and those inside others count twice."""
    kinds: dict[str, float] = {}
    launches, waits, waiting_s, busy_s = 0, 0, 0.0, 0.0
    for event in events:
        name, seconds = event.name(), event.duration_ns() / 1e9
        if name in WAITS:
            waits, waiting_s = waits + 1, waiting_s + seconds
        launches += "LaunchKernel" in name
        is_kernel = "CUDA" in str(event.device_type())
        # Optimizer.step and the like are annotations: their kernels are listed, too
        if is_kernel == on_gpu and not event.is_user_annotation():
            kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + seconds
            busy_s += seconds
    return {
        "shares": {kind: seconds / busy_s for kind, seconds in kinds.items()} if busy_s else {},
        "busy_s": busy_s,
        "idle": max(0.0, 1 - busy_s / wall_s),
        "launches": launches,
        "waits": waits,
        "waiting_s": waiting_s,
    }


def run(task: Task, report: Report) -> None:
    # Where there are kernels, the CPU's operators are not wanted: they are most of the events, and torch's
    # summary of them takes longer than the part has. CUDA's activities hold the host's calls of CUDA, too.
    activities = [ProfilerActivity.CUDA if has_gpu() else ProfilerActivity.CPU]
    for mode in ("train", "evaluate"):
        pairs, _, _ = speed.sizes(task, mode)
        what = speed.NAME[mode]
        request = speed.request_of(task, mode, pairs, 1, "model.prompt=paper", "run.precision=bf16")
        steps_of = gensr_steps.Steps(request)
        meter = Meter(steps_of.device, warmup=0, laps=False)
        for _ in range(request["warmup"]):
            steps_of(meter)
        wait_for(steps_of.device)
        with profile(activities=activities) as profiler:
            started_s = time.perf_counter()
            steps_of(meter)
            wait_for(steps_of.device)
            wall_s = time.perf_counter() - started_s
        found = summary(profiler.profiler.kineto_results.events(), wall_s, has_gpu())
        for kind, share in sorted(found["shares"].items(), key=lambda pair: -pair[1]):
            report.add(f"{what}: {kind}", 100 * share, "% of the device's time")
        report.add(f"{what}: no kernel runs", 100 * found["idle"], "% of the clock, under the profiler")
        report.add(f"{what}: launches a step", found["launches"])
        report.add(f"{what}: waits a step", found["waits"])
        report.keep(what, found)
        profiler.export_chrome_trace(str(task.out / f"trace-{mode}.json.gz"))
