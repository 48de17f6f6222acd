"""torch.compile in training."""

import time

from benchmarks.gpu import speed
from benchmarks.gpu.report import Report, failure
from benchmarks.gpu.task import Task


def run(task: Task, report: Report) -> None:
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
