"""An epoch of LightGCN on a random graph of KuaiSAR's size: 14.6 million clicks, 6.9 million items."""

import time

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.task import Task
from benchmarks.lightgcn import random_clicks
from trainer.cf.training import TableTrainer, unique_clicks
from trainer.config import CfConfig
from trainer.runtime.device import wait_for
from trainer.runtime.memory import keep_freed_memory, peak_memory_bytes

KUAISAR = (14_600_000, 25_877, 6_890_707)  # clicks, users, items
TINY = (4_000, 200, 2_000)


def run(task: Task, report: Report) -> None:
    started_s = time.monotonic()
    keep_freed_memory()
    num_edges, num_users, num_items = TINY if task.rehearse else KUAISAR
    users, items = random_clicks(num_edges, num_users, num_items)
    clicks = unique_clicks(users, items, num_users, num_items)
    report.add("clicks", len(clicks.users))
    report.add("drawing the clicks", time.monotonic() - started_s, "s")
    trainer = TableTrainer(clicks, CfConfig(), report_nothing)
    report.add("making the graph", time.monotonic() - started_s, "s")
    step_s = trainer.step_seconds()
    report.add(f"a step of {trainer.batch_size:,} clicks", step_s, "s")
    left_s = task.seconds - (time.monotonic() - started_s)
    if step_s * trainer.steps_per_epoch > left_s - 3:
        report.note("epoch", f"skipped: {trainer.steps_per_epoch} steps do not fit into {left_s:.0f} s")
        return
    epoch_started_s = time.monotonic()
    trainer.epoch()
    wait_for(torch.device(trainer.device))
    report.add("epoch", time.monotonic() - epoch_started_s, "s", "LightGCN epoch")
    report.add("memory", peak_memory_bytes() / 1e9, "GB")


def report_nothing(line: str) -> None:
    """The trainer's messages are not wanted here."""
