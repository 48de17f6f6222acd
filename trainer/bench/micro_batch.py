"""`gensr bench micro-batch`: the micro-batch that trains fastest on this device, found by training with each.

Every size is a process of its own (`python -m trainer.bench.micro_batch REQUEST`), so that memory is measured
from a fresh start and an exhausted device ends one process only. The steps are those of train(): its model,
stream, precision, optimizer. One process, without DeepSpeed: ZeRO leaves room for more.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from data_shards.progress import StageProgress, silent_stage
from trainer.bench.data import Measured, hardware, machine_line, measure
from trainer.config import Config
from trainer.configs import load_config
from trainer.data.folder import PreparedFolder
from trainer.errors import BenchError, ConfigError
from trainer.runs.provenance import git_commit
from trainer.runtime.device import wait_for
from trainer.runtime.launch import devices, make_accelerator, read_launch
from trainer.runtime.memory import peak_memory_bytes
from trainer.training.costs import GB, memory
from trainer.training.optimizer import make_optimizer
from trainer.training.plan import size_of, size_of_folder
from trainer.training.schedule import grad_accum_steps
from trainer.training.setup import make_model, make_streams
from trainer.training.step import micro_step

MEMORY_SHARE = 0.9  # of what the device has (a CPU: has free) may be asked for by the next size
GAIN = 1.02  # a larger size must be so much faster to be worth its memory
SLOWER = 0.7  # sizes beyond one that is so slow are not tried


def bench_micro_batch(
    preset: str | None,
    overrides: Sequence[str] = (),
    steps: int = 4,
    threads: int = 2,
    progress: StageProgress = silent_stage,
) -> dict[str, Any]:
    """→ the object that `gensr bench micro-batch --json` prints: `tried`, a row for each size that divides
    the global batch, and `best`.

    steps: micro-batches that are timed, after one to warm up. Raises ConfigError without data.dir, BenchError
    when no size fits or a process fails.
    """
    config = load_config(preset, [*overrides, "optim.micro_batch_size=1"])
    if not config.data.dir:
        raise ConfigError("data.dir=OUT must be given: the prepared folder to train on")
    whole = config.optim.global_batch_size
    sizes = [size for size in range(1, whole + 1) if whole % size == 0]
    tried: list[dict[str, Any]] = []
    for number, size in enumerate(sizes):
        progress(f"micro-batch {size}", number, len(sizes))
        if (needed := expected_bytes(tried, size)) and needed > MEMORY_SHARE * tried[0][
            "device_memory_bytes"
        ]:
            tried.append({"micro_batch_size": size, "stopped": f"would take {needed / GB:.1f} GB"})
            break
        request = {
            "preset": preset,
            "overrides": [*overrides, f"optim.micro_batch_size={size}"],
            "steps": steps,
        }
        row = _measured(request, threads).answer
        tried.append({"micro_batch_size": size, **row})
        if "stopped" in row or row["events_per_s"] < SLOWER * max(done["events_per_s"] for done in tried):
            break
    done = [row for row in tried if "stopped" not in row]
    if not done:
        raise BenchError(
            f"not even one event fits: {tried[0]['stopped']}. Set model.activation_checkpointing=true, or "
            "use a smaller backbone"
        )
    return {
        "tried": tried,
        "best": best_of(done),
        "configuration": {"preset": preset, "overrides": list(overrides), "steps": steps, "threads": threads},
        "hardware": {**hardware(), "device": done[0]["device"]},
        "commit": git_commit(),
    }


def _measured(request: dict[str, Any], threads: int) -> Measured:
    return measure([sys.executable, "-m", "trainer.bench.micro_batch", json.dumps(request)], threads)


def expected_bytes(tried: Sequence[dict[str, Any]], size: int) -> float:
    """Memory of a size, on a straight line through the last two measured; 0 where there are no two."""
    if len(tried) < 2:
        return 0.0
    (x0, y0), (x1, y1) = ((row["micro_batch_size"], row["peak_memory_bytes"]) for row in tried[-2:])
    return float(y1 + max(y1 - y0, 0) / (x1 - x0) * (size - x1))


def best_of(done: Sequence[dict[str, Any]]) -> int:
    """The smallest size that no larger one beats by more than GAIN."""
    fastest = max(row["events_per_s"] for row in done)
    return int(next(row["micro_batch_size"] for row in done if row["events_per_s"] * GAIN >= fastest))


def bench_micro_batch_lines(document: dict[str, Any]) -> list[str]:
    """The object as lines for people."""
    lines = ["  micro-batch    events/s    memory    calculated beforehand"]
    for row in document["tried"]:
        left = f"  {row['micro_batch_size']:>11}"
        if "stopped" in row:
            lines.append(f"{left}    {row['stopped']}")
        else:
            lines.append(
                f"{left}  {row['events_per_s']:>10,.2f}  {row['peak_memory_bytes'] / GB:>5.1f} GB  "
                f"{row['calculated_memory_bytes'] / GB:>5.1f} GB"
            )
    return [
        *lines,
        f"  optim.micro_batch_size={document['best']} is the smallest within {GAIN - 1:.0%} of the fastest",
        machine_line(document, " one process, no ZeRO;"),
    ]


# ---- the measured process ----------------------------------------------------------------------------------


def try_one(request: dict[str, Any]) -> dict[str, Any]:
    """Speed and memory of one size, or {"stopped": why} where it exhausts the device's memory."""
    try:
        return _train_some(load_config(request["preset"], request["overrides"]), request["steps"])
    except torch.cuda.OutOfMemoryError:
        total = torch.cuda.get_device_properties(0).total_memory
        return {"stopped": f"out of memory: the device has {total / GB:.0f} GB"}


def _train_some(config: Config, steps: int) -> dict[str, Any]:
    folder = PreparedFolder.open(config.data)
    num_passes = grad_accum_steps(config, 1)
    accelerator = make_accelerator(config, read_launch(), 1)  # every micro-batch updates, so that it is timed
    module, cf, holdout = make_model(config, folder, accelerator)
    model, optimizer = accelerator.prepare(module, make_optimizer(module, config.optim))
    stream, _ = make_streams(config, folder, accelerator, module.tasks, cf, holdout, 0)
    on_gpu = accelerator.device.type == "cuda"
    has = (
        torch.cuda.get_device_properties(0).total_memory
        if on_gpu
        else psutil.virtual_memory().available + psutil.Process().memory_info().rss
    )

    laps: dict[str, list[float]] = {}
    started_s = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal started_s
        wait_for(accelerator.device)
        laps.setdefault(part, []).append(time.perf_counter() - started_s)
        started_s = time.perf_counter()

    for batch in itertools.islice(stream, 1 + steps):  # the first one warms up
        ready = module.prepare(batch).to(accelerator.device)
        lap("data")
        micro_step(accelerator, model, optimizer, ready, config.optim.grad_clip, lap=lap)
    learning_s, updating_s = (
        sum(statistics.fmean(laps[part][1:]) for part in parts)
        for parts in (("forward", "backward"), ("optimiser",))
    )
    calculated = memory(config, size_of(module), size_of_folder(folder), None, 1)
    return {
        "events_per_s": config.optim.global_batch_size / (num_passes * learning_s + updating_s),
        "peak_memory_bytes": peak_memory_bytes(),
        "calculated_memory_bytes": int(calculated.total),
        "device_memory_bytes": int(has),
        "device": devices(accelerator),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(try_one(json.loads(sys.argv[1]))) + "\n")
