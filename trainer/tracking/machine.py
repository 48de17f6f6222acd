"""What each node measures of itself while it trains: RUN/machine/NODE.jsonl, which rank 0's tracker sends
with everything else.

The measurements are MLflow's own (psutil; GPUs through NVML), the file is ours: no node but rank 0's needs to
reach a tracking server, and none waits.
"""

import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.runs.run_folder import RunFolder

log = logging.getLogger(__name__)


@contextlib.contextmanager
def measured(run_dir: str | Path, every_s: float, enabled: bool = True) -> Iterator[None]:
    """Measure this node every `every_s` seconds while the block runs; one process of each node does. A
    resumed run appends to the same file."""
    if not (enabled and every_s):
        yield
        return
    done = threading.Event()
    path = RunFolder(run_dir).machine / f"{node_name()}.jsonl"
    thread = threading.Thread(target=_measure, args=(path, every_s, done), name="machine", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(5.0)


def node_name() -> str:
    """This host, with the characters that MLflow takes in a metric's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", socket.gethostname().partition(".")[0])


def _measure(path: Path, every_s: float, done: threading.Event) -> None:
    try:
        monitors = _monitors()
        path.parent.mkdir(parents=True, exist_ok=True)
        step = len(path.read_bytes().splitlines()) if path.is_file() else 0
        with path.open("a", encoding="utf-8", buffering=1) as file:
            if step:
                file.write("\n")  # a killed process may have left half a line
            while not done.wait(every_s):
                values = {name: value for monitor in monitors for name, value in _sample(monitor).items()}
                file.write(
                    json.dumps({"step": step, "time_ms": int(time.time() * 1000), "values": values}) + "\n"
                )
                step += 1
    except Exception as error:  # never a reason to end a training
        log.warning("this node is not measured any more (%s: %s)", type(error).__name__, error)


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(Exception):  # no NVIDIA GPU, or no NVML
        monitors.append(GPUMonitor())
    return monitors


def _sample(monitor: Any) -> dict[str, float]:
    monitor.collect_metrics()
    values: dict[str, float] = monitor.aggregate_metrics()
    monitor.clear_metrics()
    return values
