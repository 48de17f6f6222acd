"""`gensr bench train|evaluate`: training steps and scoring against a reference written straight from the
paper (benchmarks/reference.py).

Each measurement is a process of its own; ours and the reference's alternate. Ratios of CPU time stand beside
those of the clock: they hold on a busy machine, too.
"""

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from data_shards.progress import StageProgress, silent_stage
from trainer.bench.data import BENCHMARKS, Measured, hardware, machine_line, measure
from trainer.config import Config
from trainer.configs import load_config
from trainer.errors import ConfigError
from trainer.runs.provenance import git_commit
from trainer.training.costs import measured_flops

# flan-t5-base's shape with random weights; run.precision is what this device multiplies faster in
DEFAULTS = ("model.backbone=scratch:flan_t5_base", "model.variant=paper", "model.prompt=paper")
# the reference is the paper's own: its variant, its wording, float32
REFERENCE = (
    "model.variant=paper",
    "model.prompt=paper",
    "run.precision=fp32",
    "model.lora.rank=0",
    "model.compile=false",
)
WARMUP_STEPS = 3  # until the process has got all the memory that a step takes: on a CPU every new page costs
BACKBONES = ("scratch:flan_t5_base", "scratch:small", "scratch:mini", "scratch:nano")
PARTS = ("data", "forward", "backward", "optimiser", "communication")
Mode = Literal["train", "evaluate"]


def bench_model(
    mode: Mode,
    overrides: Sequence[str] = (),
    pairs: int | None = None,
    steps: int = 2,
    turns: int = 2,
    threads: int = 2,
    trace: Path | None = None,
    progress: StageProgress = silent_stage,
) -> dict[str, Any]:
    """→ the object that `gensr bench train --json` (evaluate) prints.

    overrides: settings as of `gensr train`; data.dir names a prepared folder with natural text and a CF table
    (default: a small synthetic one). pairs: (history, candidate) pairs of a step, on either side (None: see
    default_pairs). trace: file for a torch profiler trace of one more turn of ours. Raises ConfigError
    without benchmarks/ (it is part of the repository, not of the package), BenchError when a measured program
    fails.
    """
    if not BENCHMARKS.is_dir():
        raise ConfigError(f"{BENCHMARKS} is missing: gensr bench needs a checkout of the repository.")
    given = any(setting.startswith("run.precision=") for setting in overrides)
    defaults = DEFAULTS if given else (*DEFAULTS, f"run.precision={faster_precision()}")
    config = load_config(None, [*defaults, *overrides])
    ours, references = (pairs, pairs) if pairs is not None else default_pairs(mode)
    _check(config, mode, ours)
    work = Path(tempfile.mkdtemp(prefix="gensr-bench-"))
    try:
        given_folder = Path(config.data.dir).resolve() if config.data.dir else None
        folder = given_folder or synthetic_folder(work, threads, progress)
        settings = [word for word in (*defaults, *overrides) if not word.startswith("data.dir=")]
        request = {
            "folder": str(folder),
            "mode": mode,
            "pairs": ours,
            "steps": steps,
            "warmup": WARMUP_STEPS,
            "preset": None,
            "overrides": settings,
        }
        measured: list[tuple[Measured, Measured]] = []
        for turn in range(turns):
            progress("reference", 2 * turn, 2 * turns)
            theirs = {**request, "overrides": [*settings, *REFERENCE], "pairs": references}
            reference = _run("reference", theirs, threads)
            progress("gensr", 2 * turn + 1, 2 * turns)
            measured.append((_run("gensr_steps", request, threads), reference))
        if trace is not None:
            _run("gensr_steps", {**request, "trace": str(trace.resolve())}, threads)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    asked = {
        "overrides": list(overrides),
        "defaults": list(defaults),
        "pairs": ours,
        "reference_pairs": references,
        "steps": steps,
        "turns": turns,
        "threads": threads,
    }
    return _document(mode, measured, asked)


def _check(config: Config, mode: Mode, pairs: int) -> None:
    """Raises ConfigError for what the reference cannot be measured with."""
    per_event = 1 + config.data.num_negatives
    if mode == "train" and pairs % per_event:
        raise ConfigError(f"--pairs must be a multiple of 1 + data.num_negatives = {per_event}, got {pairs}")
    backbone = getattr(config.model, "backbone", config.model.name)
    if backbone not in BACKBONES:
        raise ConfigError(
            f"model.backbone={backbone}: the reference is a T5 with random weights. Choose "
            f"among {', '.join(BACKBONES)}"
        )


def _run(script: str, request: dict[str, Any], threads: int) -> Measured:
    """A program of benchmarks/, measured as a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{script}", json.dumps(request)]
    return measure(command, threads, cwd=BENCHMARKS.parent)


def default_pairs(mode: Mode) -> tuple[int, int]:
    """Pairs of a step, (gensr's, the reference's). A GPU needs many to be busy: 256 events with 5 candidates,
    or 25 with 100; the paper's batch has 200."""
    from trainer.runtime.device import has_gpu

    if not has_gpu():
        return 20, 20
    return 1280 if mode == "train" else 2500, 200


def faster_precision() -> str:
    """bf16 on a GPU; on a CPU what its matrix products are faster in: without AMX, bf16 can take twice the
    time of float32."""
    import torch

    from trainer.runtime.device import has_gpu

    if has_gpu():
        return "bf16"
    return "bf16" if measured_flops(dtype=torch.bfloat16) > measured_flops(dtype=torch.float32) else "fp32"


def synthetic_folder(work: Path, threads: int, progress: StageProgress) -> Path:
    """A prepared folder of random texts with a CF table, made in some seconds by the verbs themselves."""
    raw, out = work / "raw", work / "prepared"
    gensr = [sys.executable, "-m", "trainer"]
    progress("data", 0, 0)
    root = BENCHMARKS.parent
    measure([sys.executable, "-m", "benchmarks.text_world", str(raw)], threads, cwd=root)
    measure([*gensr, "prepare", "tables", str(raw), str(out), "vocab_size=1500", "--json"], threads, cwd=root)
    measure([*gensr, "cf", str(out), "cf.holdout=none", "cf.max_epochs=1", "--json"], threads, cwd=root)
    return out


def _document(
    mode: Mode, measured: list[tuple[Measured, Measured]], configuration: dict[str, Any]
) -> dict[str, Any]:
    def rate(side: Measured, clock: str) -> float:
        return float(side.answer["examples"] / side.answer[clock])

    ours, reference = measured[-1][0].answer, measured[-1][1].answer
    unit = "examples" if mode == "train" else "candidates"
    document: dict[str, Any] = {
        f"{unit}_per_s": round(statistics.median(rate(a, "wall_s") for a, _ in measured), 2),
        "ratio_to_reference": round(
            statistics.median(rate(a, "wall_s") / rate(b, "wall_s") for a, b in measured), 2
        ),
        "cpu_ratio_to_reference": round(
            statistics.median(rate(a, "cpu_s") / rate(b, "cpu_s") for a, b in measured), 2
        ),
        "mfu": ours["mfu"],
        "peak_memory_bytes": max(a.answer["peak_memory_bytes"] for a, _ in measured),
        f"reference_{unit}_per_s": round(statistics.median(rate(b, "wall_s") for _, b in measured), 2),
        "reference_peak_memory_bytes": max(b.answer["peak_memory_bytes"] for _, b in measured),
        "prompt_tokens": ours["prompt_tokens"],
        "reference_prompt_tokens": reference["prompt_tokens"],
        "configuration": configuration,
        "hardware": {**hardware(), "device": ours["device"]},
        "commit": git_commit(),
    }
    if mode == "train":
        # one process has nobody to talk to
        document["step_s"] = {
            part: round(ours["parts_s"].get(part, 0.0) / configuration["steps"], 4) for part in PARTS
        }
    else:
        del document["mfu"]
    return document


def bench_model_lines(document: dict[str, Any]) -> list[str]:
    """The object as lines for people."""
    unit = "examples" if "examples_per_s" in document else "candidates"
    ours, reference = document[f"{unit}_per_s"], document[f"reference_{unit}_per_s"]
    lines = [
        f"  gensr      {ours:>10,.1f} {unit}/s, {document['prompt_tokens']:.0f} tokens a prompt, "
        f"{document['peak_memory_bytes'] / 1e9:.2f} GB",
        f"  reference  {reference:>10,.1f} {unit}/s, {document['reference_prompt_tokens']:.0f} tokens, "
        f"{document['reference_peak_memory_bytes'] / 1e9:.2f} GB",
        f"  ratio      {document['ratio_to_reference']:>10.2f} by the clock, "
        f"{document['cpu_ratio_to_reference']:.2f} by CPU time",
    ]
    if "step_s" in document:
        whole = sum(document["step_s"].values())
        lines.append(
            "  step       "
            + ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in document["step_s"].items())
            + f" of {whole:.2f} s"
        )
    if document.get("mfu") is not None:
        lines.append(f"  MFU        {document['mfu']:.1%} of the device's measured matrix products")
    return [*lines, machine_line(document)]
