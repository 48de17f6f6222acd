"""DeepSpeed ZeRO-2 in one process, from the real command: killed after a checkpoint, resumed to the end."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import ds_configs
from benchmarks.gpu.report import Report
from benchmarks.gpu.task import ROOT, Task
from trainer.runtime.device import has_gpu
from trainer.runtime.stopping import end_with_children


def run(task: Task, report: Report) -> None:
    # small: no speed is measured here, and three checkpoints of flan-t5-base's shape would take half a minute
    num_steps = 12 if task.rehearse else 60
    run_dir = task.work / "zero2"
    shutil.rmtree(run_dir, ignore_errors=True)  # of an earlier session
    settings = [
        f"data.dir={task.text_folder()}",
        f"run.dir={run_dir}",
        f"model.backbone={'scratch:nano' if task.rehearse else 'scratch:small'}",
        "run.precision=bf16",
        f"run.max_steps={num_steps}",
        "run.log_every_steps=1",
        f"run.checkpoint_every_steps={4 if task.rehearse else 20}",
        f"run.validate_every_steps={num_steps}",
        "run.valid_events=16",
        "optim.warmup_steps=4",
        "tracking.enabled=false",
    ]
    launcher = ["--config_file", str(ds_configs.path("accelerate_gpu_1_zero2.yaml"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not has_gpu():
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "trainer"]
    command += ["train", "demo", *settings, "--resume", "auto"]
    started_s = time.monotonic()
    first = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment)
    latest = run_dir / "checkpoints" / "latest"
    while not latest.exists():
        if first.poll() is not None:
            raise RuntimeError(f"the first training ended with {first.returncode} before a checkpoint")
        time.sleep(0.05)
    end_with_children(first.pid)
    report.add("first checkpoint, from the start of the process", time.monotonic() - started_s, "s")
    report.add("killed by force", float(first.wait(60) == -signal.SIGKILL))
    started_s = time.monotonic()
    subprocess.run(command, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment, check=True)
    report.add("resumed to the end", time.monotonic() - started_s, "s")
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = {
        record["step"]: record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"
    }
    missing = [step for step in range(1, num_steps + 1) if step not in losses]
    report.add("steps that are missing", len(missing))
    report.add("losses that are not finite", sum(not math.isfinite(loss) for loss in losses.values()))
    part = max(1, num_steps // 10)
    values = [losses[step] for step in sorted(losses)]
    report.add("mean loss of the first tenth", sum(values[:part]) / part)
    report.add("mean loss of the last tenth", sum(values[-part:]) / part)
    report.keep("losses", values)
