"""One real training to quality with `extended` and a larger backbone, then its metrics: Scientific where its
prepared folder is given (--data), else the demo's world. As many steps as the time allows."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Report
from benchmarks.gpu.task import ROOT, Task, gensr
from data_shards.schema import Manifest, read_manifest
from trainer.configs import load_config
from trainer.runs.run_folder import RunFolder

START_S = 15.0  # of a verb: imports, the model, its tables
TRAINING_SHARE = 0.6  # of a training's time, steps; the rest: validations, the model's files
MAX_EPOCHS = 6
BATCH = 128


def demo_world(task: Task) -> Path:
    raw, data = task.work / "demo-raw", task.work / "demo"
    for folder in (raw, data):  # of an earlier session
        shutil.rmtree(folder, ignore_errors=True)
    users, items, days = ("60", "300", "6") if task.rehearse else ("1000", "4000", "14")
    gensr("simulate", str(raw), "--users", users, "--items", items, "--days", days, "--text", "natural")
    gensr("prepare", "tables", str(raw), str(data), "utc_offset_hours=8")
    gensr("cf", str(data), "cf.num_folds=2", f"cf.max_epochs={1 if task.rehearse else 40}", "cf.patience=2")
    return data


def rate(task: Task, what: str, default: float) -> float:
    """A second, as part speed found it for flan-t5-base's shape."""
    speed = task.out / "speed.json"
    values = json.loads(speed.read_text(encoding="utf-8"))["values"] if speed.is_file() else {}
    return float(values.get(what, {}).get("value", default))


def affordable_steps(task: Task, manifest: Manifest, candidates: int, left_s: float) -> int:
    """What is left when all test events are evaluated; `extended` and validation take a share of it. At most
    MAX_EPOCHS; 0 when nothing is left."""
    to_score = manifest.num_events("test") * (1 + manifest.num_negatives)
    evaluating_s = to_score / rate(task, "scoring, compact prompt", 14_000.0)
    training_s = left_s - 2 * START_S - 1.3 * evaluating_s
    if training_s <= 0:
        return 0
    examples = TRAINING_SHARE * training_s * rate(task, "training, compact prompt", 4000.0)
    an_epoch = max(1, manifest.num_events("train") // BATCH)
    return max(10, min(int(examples / (BATCH * candidates)), MAX_EPOCHS * an_epoch))


def run(task: Task, report: Report) -> None:
    started_s = time.monotonic()
    data = task.data or demo_world(task)
    report.note("data", data.name)
    run_dir = task.work / "quality"
    shutil.rmtree(run_dir, ignore_errors=True)
    preset = "demo" if task.data is None else "scientific_small"
    manifest = read_manifest(data)
    settings: Any = load_config(preset, [])
    candidates = 1 + settings.data.num_negatives + settings.model.mined_negatives
    left_s = task.seconds - (time.monotonic() - started_s)
    steps = 4 if task.rehearse else affordable_steps(task, manifest, candidates, left_s)
    if not steps:
        report.note("training", f"skipped: {left_s:.0f} s are left")
        return
    gensr(
        "train",
        preset,
        f"data.dir={data}",
        f"run.dir={run_dir}",
        f"model.backbone={'scratch:nano' if task.rehearse else 'scratch:flan_t5_base'}",
        "model.variant=extended",
        "run.precision=bf16",
        f"run.max_steps={steps}",
        f"run.validate_every_steps={max(1, steps // 3)}",
        f"run.checkpoint_every_steps={steps}",  # one at the end: its 3.5 GB take seconds
        # rehearsed: a CPU without bf16 of its own scores a hundred candidates in a fifth of a second
        f"run.valid_events={16 if task.rehearse else 500}",
        f"optim.global_batch_size={16 if task.rehearse else BATCH}",
        f"optim.micro_batch_size={16 if task.rehearse else BATCH}",
        f"optim.warmup_steps={steps // 10}",
        f"optim.lr={'2.0e-3' if task.rehearse else '3.0e-4'}",  # a wider model wants a smaller one
        "run.early_stop_patience=0",
        "tracking.enabled=false",
    )
    report.add("training", time.monotonic() - started_s, "s")
    report.add("steps", steps)
    command = [sys.executable, "-m", "trainer", "evaluate", str(run_dir), "--no-baselines"]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True, cwd=ROOT)
    found = json.loads(RunFolder(run_dir).evaluation("test").read_text(encoding="utf-8"))
    for name in ("rec", "src"):
        if found[name]["num_events"]:
            for metric in ("ndcg@10", "recall@10"):
                report.add(
                    f"{name}/{metric}, sampled, {found[name]['num_events']} events", found[name][metric]
                )
    report.keep("evaluation", {name: found[name] for name in ("protocol", "rec", "src")})
