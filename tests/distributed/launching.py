"""Start worker.py on some ranks, and read what it left."""

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import ds_configs
from trainer.demo import free_port
from trainer.runtime.stopping import end_with_children

ROOT = Path(__file__).parents[2]
ZERO3 = "zero3_small.json"
COMPILED = "compiled"

# Ranks are forked from a process that has the libraries in memory: their imports take 10 s of a core each
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(
    [
        "accelerate",
        "deepspeed",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # initialize() imports it, and torch's compiler with it
        "trainer.data.item_tables",
        "trainer.models.gensr.model",
        "trainer.runs.weights",
        "trainer.training.loop",
    ]
)


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
    (folder / "launch.log").write_text("")
    port, own = free_port(), {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    shared = {**os.environ, **own, "TORCH_EXTENSIONS_DIR": str(folder / COMPILED)}
    ranks = [
        forkserver.Process(
            target=run_rank, args=(folder, {**shared, **variables_of(rank, num_processes, port)})
        )
        for rank in range(num_processes)
    ]
    for rank in ranks:
        rank.start()
    try:
        end_s = time.monotonic() + timeout_s
        left = list(ranks)
        while left and all(rank.exitcode in (None, 0) for rank in ranks) and time.monotonic() < end_s:
            wait([rank.sentinel for rank in left], timeout=1)
            left = [rank for rank in left if rank.exitcode is None]
    finally:
        for rank in ranks:  # one that waits for a lost peer would hold a port and a core
            if rank.pid is not None:
                end_with_children(rank.pid)
            rank.join()
    return [results(folder, scenario["name"])[0] for scenario in scenarios]


def run_rank(folder: Path, environment: dict[str, str]) -> None:
    """In a forked process: what the launcher would start."""
    log = os.open(folder / "launch.log", os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.clear()
    os.environ.update(environment)
    # where a table was made before, by the same pytest, the process that forks keeps SIGTERM from itself
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    from tests.distributed.worker import main

    main(folder)


def variables_of(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets on one machine."""
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
        "MASTER_PORT": port,
    }
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def write_small_zero3(folder: Path) -> None:
    """DeepSpeed leaves small tensors whole: at 0 even a tiny model is partitioned."""
    zero3 = json.loads(ds_configs.path("zero3.json").read_text())
    zero3["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
    (folder / ZERO3).write_text(json.dumps(zero3))


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
