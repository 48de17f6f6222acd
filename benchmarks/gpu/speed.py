"""Training and scoring of flan-t5-base's shape: the trainer's own steps beside benchmarks/reference.py, with
the paper's prompt and the compact one; then other micro-batches."""

import gc
import time
from typing import Any

import torch

from benchmarks import gensr_steps, reference
from benchmarks.gpu.report import Report, failure
from benchmarks.gpu.task import Task
from trainer.bench.model import REFERENCE, WARMUP_STEPS, default_pairs
from trainer.runtime.device import has_gpu

UNIT = {"train": "examples/s", "evaluate": "candidates/s"}
NAME = {"train": "training", "evaluate": "scoring"}
SWEEP = {"train": (320, 640, 2560), "evaluate": (1000, 5000)}  # pairs of a micro-batch


def request_of(task: Task, mode: str, pairs: int, steps: int, *overrides: str) -> dict[str, Any]:
    """For benchmarks/gensr_steps.py and benchmarks/reference.py."""
    return {
        "folder": str(task.text_folder()),
        "mode": mode,
        "pairs": pairs,
        "steps": steps,
        "warmup": 1 if task.rehearse else WARMUP_STEPS,
        "preset": None,
        "mfu": False,  # of the few that show it: see run()
        "weights_on_device": True,
        "overrides": [f"model.backbone={task.backbone}", "model.variant=paper", *overrides],
    }


def measure(request: dict[str, Any], program: Any = gensr_steps) -> dict[str, Any]:
    """What the program's steps took, in this process: it starts from freed memory."""
    gc.collect()
    if has_gpu():
        torch.cuda.empty_cache()
    answer: dict[str, Any] = program.measured(request)
    return answer | {"per_s": answer["examples"] / answer["wall_s"]}


def sizes(task: Task, mode: str) -> tuple[int, int, int]:
    """Pairs of a step, ours and the reference's, and steps."""
    if task.rehearse:
        return 20, 20, 1
    ours, theirs = default_pairs("train" if mode == "train" else "evaluate")
    return ours, theirs, 10


def run(task: Task, report: Report) -> None:
    started_s = time.monotonic()
    rates: dict[tuple[str, str], float] = {}
    details: dict[str, Any] = {}
    for prompt in ("paper", "compact"):
        for mode in ("train", "evaluate"):
            pairs, reference_pairs, steps = sizes(task, mode)
            what = f"{NAME[mode]}, {prompt} prompt"
            settings = (f"model.prompt={prompt}", "run.precision=bf16")
            try:
                ours = measure(request_of(task, mode, pairs, steps, *settings) | {"mfu": True})
                rates[mode, prompt] = ours["per_s"]
                details[what] = ours
                report.add(what, ours["per_s"], UNIT[mode], NAME[mode] if prompt == "paper" else "")
                report.add(f"{what}: memory", ours["peak_memory_bytes"] / 1e9, "GB")
                if ours["mfu"] is not None:
                    report.add(f"{what}: share of the measured matrix rate", 100 * ours["mfu"], "%")
                if prompt == "paper":
                    theirs = measure(
                        request_of(task, mode, reference_pairs, min(steps, 4), *REFERENCE), reference
                    )
                    details[f"{what}, reference"] = theirs
                    report.add(f"{what}: reference", theirs["per_s"], UNIT[mode])
                    report.add(
                        f"{what}: gensr / reference",
                        ours["per_s"] / theirs["per_s"],
                        "×",
                        f"{NAME[mode]} / reference",
                    )
                elif (mode, "paper") in rates:
                    report.add(
                        f"{NAME[mode]}: compact / paper",
                        ours["per_s"] / rates[mode, "paper"],
                        "×",
                        f"{NAME[mode]}, compact / paper",
                    )
            except Exception as error:  # out of memory, or a library that refuses: the others go on
                report.note(what, failure(error))
            report.keep("details", details)
    needed_s = 8.0  # of one more measurement: at least that, and as long as the last one took
    for mode, prompt in (("train", "paper"), ("train", "compact"), ("evaluate", "paper")):
        for pairs in (40,) if task.rehearse else SWEEP[mode]:
            what = f"{NAME[mode]}, {prompt} prompt, {pairs} pairs at once"
            now_s = time.monotonic()
            if task.seconds - (now_s - started_s) < needed_s and not task.rehearse:
                report.note(what, "skipped: the part's time is spent")
                continue
            try:
                settings = (f"model.prompt={prompt}", "run.precision=bf16")
                found = measure(request_of(task, mode, pairs, 1 if task.rehearse else 5, *settings))
                report.add(what, found["per_s"], UNIT[mode])
                report.add(f"{what}: memory", found["peak_memory_bytes"] / 1e9, "GB")
            except Exception as error:
                report.note(what, failure(error))
            needed_s = max(8.0, time.monotonic() - now_s)
