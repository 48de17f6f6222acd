"""Start worker.py under torchrun, and read what it left."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

import ds_configs

ROOT = Path(__file__).parents[2]
ZERO3 = "zero3_small.json"


def launch(
    folder: Path, num_processes: int, scenarios: list[dict[str, Any]], timeout_s: float = 900
) -> list[dict[str, Any]]:
    """Run the scenarios (see worker.py) one after another in one launch. Returns what each gave on rank 0.

    Results of all ranks lie in FOLDER/results-RANK.json, the output in FOLDER/launch.log.
    """
    write_small_zero3(folder)
    for earlier in folder.glob("results-*.json"):
        earlier.unlink()
    whole = [{**s, "deepspeed": str(folder / ZERO3)} if s.get("deepspeed") == ZERO3 else s for s in scenarios]
    (folder / "scenarios.json").write_text(json.dumps(whole))
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(num_processes),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(Path(__file__).with_name("worker.py")), str(folder)]
    with (folder / "launch.log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
        )
        try:
            process.wait(timeout=timeout_s)
        finally:
            end_with_children(process.pid)
    return [results(folder, scenario["name"])[0] for scenario in scenarios]


def write_small_zero3(folder: Path) -> None:
    """DeepSpeed leaves small tensors whole: at 0 even a tiny model is partitioned."""
    zero3 = json.loads(ds_configs.path("zero3.json").read_text())
    zero3["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
    (folder / ZERO3).write_text(json.dumps(zero3))


def end_with_children(pid: int) -> None:
    """A rank left behind would hold a port and a core."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    """What a scenario gave on every rank."""
    ranks = sorted(folder.glob("results-*.json"))
    found = [json.loads(path.read_text()).get(name) for path in ranks]
    assert found and None not in found, (folder / "launch.log").read_text()[-3000:]
    return found


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the columns that tell the time."""
    timed = ("events_per_s", "memory_gb", "train_s")
    return [
        {k: v for k, v in json.loads(line).items() if k not in timed}
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


def losses(run_dir: Path) -> list[float]:
    return [r["loss"] for r in records(run_dir) if r["kind"] == "train"]
