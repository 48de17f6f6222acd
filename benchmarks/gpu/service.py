"""Latency of `gensr serve`, by number of clients: a model of flan-t5-base's shape with random weights, 100
candidates a request."""

import json
import shutil
import socket
import subprocess
import sys
import time
from http.client import HTTPException
from pathlib import Path

import torch

from benchmarks import load_test
from benchmarks.gpu.report import Report
from benchmarks.gpu.task import ROOT, Task
from data_shards.settings import to_yaml
from trainer.configs import load_config
from trainer.data.folder import PreparedFolder
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import build_model, save_model
from trainer.runtime.device import default_device


def untrained_run(task: Task) -> Path:
    """A run folder as training leaves it, as far as the service reads it."""
    run_dir = task.work / "served"
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    data = task.text_folder()
    settings = [f"data.dir={data}", f"run.dir={run_dir}", f"model.backbone={task.backbone}"]
    config = load_config(None, [*settings, "run.precision=bf16"])
    folder = PreparedFolder.at(data)
    torch.manual_seed(0)
    device = default_device()
    with torch.device(device):  # a GPU draws the random weights in a moment, a CPU in seconds
        model = build_model(config, folder, folder.tables(GenSR.needs, with_folds=True).to(device))
    save_model(run_dir / "model", model, model.state_dict(), config, folder)
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (run_dir / "environment.json").write_text(json.dumps({"git": None}), encoding="utf-8")
    return run_dir


def run(task: Task, report: Report) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trainer", "serve", str(untrained_run(task)), "--port", str(port)]
    started_s = time.monotonic()
    server = subprocess.Popen([*command, "--access-log", ""], stdin=subprocess.DEVNULL, cwd=ROOT)
    try:
        users: list[str] = []
        while not users:
            if server.poll() is not None:
                raise RuntimeError(f"gensr serve ended with {server.returncode}")
            try:
                users = load_test.get("127.0.0.1", port, "/users")["users"]
            except (OSError, HTTPException, KeyError, ValueError):
                time.sleep(0.2)
        report.add("ready after", time.monotonic() - started_s, "s")
        for clients in (1,) if task.rehearse else (1, 8, 32):
            seconds = 1.0 if task.rehearse else 4.0
            load_test.load("127.0.0.1", port, users, False, clients, seconds / 4, 100)  # warms up
            row = load_test.load("127.0.0.1", port, users, False, clients, seconds, 100)
            for name in ("requests_per_s", "p50_ms", "p99_ms", "errors"):
                report.add(f"{clients} clients: {name}", row[name])
    finally:
        server.terminate()
        server.wait(20)
