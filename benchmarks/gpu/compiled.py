"""torch.compile in training, of recommendation events: without queries prompts are equally long and need no
mask, which halves the kinds of layers that are compiled."""

import time
from typing import Any

from benchmarks import gensr_steps
from benchmarks.gpu import speed
from benchmarks.gpu.report import Report, failure
from benchmarks.gpu.task import Task
from benchmarks.measuring import Meter
from data_shards.schema import REC
from trainer.runtime.device import wait_for


def run(task: Task, report: Report) -> None:
    # rehearsed in scoring: without a backward pass a CPU compiles for a minute, not for several
    mode = "evaluate" if task.rehearse else "train"
    pairs, _, num_steps = speed.sizes(task, mode)
    rates = {}
    for compiled in ("false", "true"):
        settings = ("model.prompt=compact", "run.precision=bf16", f"model.compile={compiled}")
        what = f"{speed.NAME[mode]}, compact prompt, model.compile={compiled}"
        request = speed.request_of(task, mode, pairs, num_steps, *settings) | {"tasks": [REC]}
        try:
            rates[compiled] = measure(report, what, request)
        except Exception as error:  # the compiler raises errors of many kinds: one is a result
            report.note(what, failure(error))
            return
        report.add(what, rates[compiled], speed.UNIT[mode])
    report.add(f"{speed.NAME[mode]}: compiled / not", rates["true"] / rates["false"], "×")


def measure(report: Report, what: str, request: dict[str, Any]) -> float:
    """Examples a second. What the first step took, which compiles, is reported before the others begin."""
    steps = gensr_steps.Steps(request)
    meter = Meter(steps.device, warmup=request["warmup"], laps=False)
    started_s = time.monotonic()
    for number in range(request["warmup"] + request["steps"]):
        steps(meter)
        if not number:
            wait_for(steps.device)
            report.add(f"{what}: the first step", time.monotonic() - started_s, "s")
    meter.stop()
    return meter.examples / meter.wall_s
