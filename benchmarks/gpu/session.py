"""python -m benchmarks.gpu.session OUT [--minutes 9] [--rehearse] [--data FOLDER] [--keep FOLDER]
[--only PART …]

Runs the parts in the order of docs/gpu.md, each in a process of its own under its own limit. Started by
benchmarks/gpu_session.sh, which installs what is missing. Every part writes OUT/PART.json, OUT/PART.log and
lines of OUT/table.md as soon as a number is there. A part that fails or does not end is named, and the next
one begins.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu.report import Report, add_line, card_name, failure, table_line
from benchmarks.gpu.task import ROOT, Task
from trainer.bench.data import hardware
from trainer.errors import EnvironmentProblem
from trainer.runtime.files import atomic
from trainer.runtime.stopping import end_with_children

WHOLE_S = 540.0  # what the limits below are made for; other --minutes scale them
END_S = 5.0  # kept for the last lines
REHEARSED = 3.0  # times a part's share in a rehearsal: on a CPU C++ is compiled, for a minute or two
LEAST_S = 8.0  # less is not tried: a process takes some seconds to start
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "pyarrow",
    "deepspeed",
    "duckdb",
    "numpy",
    "mlflow",
)


@dataclass(frozen=True)
class Part:
    """One file of benchmarks/gpu; seconds: its limit in a session of nine minutes."""

    name: str
    module: str
    seconds: float


PARTS = (
    Part("parity", "parity", 60),
    Part("speed", "speed", 75),
    Part("trace", "trace", 30),
    Part("graph", "graph", 20),
    Part("lightgcn", "lightgcn_epoch", 35),
    Part("zero2", "zero2", 55),
    Part("lora", "adapters", 40),
    Part("service", "service", 50),
    Part("compiled", "compiled", 120),  # behind others of less value: it takes the time of three
    Part("quality", "quality", 40),  # and what the others have left
)


def limit_of(part: Part, minutes: float, left_s: float, is_last: bool, rehearse: bool = False) -> float:
    """Seconds that the part may take: its share of the session, and the last part all that is left; 0 when
    too few are left."""
    if left_s - END_S < LEAST_S:
        return 0.0
    share_s = part.seconds * minutes * 60 / WHOLE_S * (REHEARSED if rehearse else 1.0)
    return left_s - END_S if is_last else min(share_s, left_s - END_S)


def check(report: Report) -> None:
    """What the machine is, in a few seconds: without the packages no part could run."""
    import torch

    from trainer.runs.provenance import git_commit
    from trainer.runtime.device import default_device, has_gpu
    from trainer.training.costs import measured_flops

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    source = os.environ.get("GENSR_COMMIT") or git_commit()  # a copied tree may have no .git
    machine = {**hardware(), "python": platform.python_version(), "commit": source, "versions": versions}
    machine["float32_products"] = torch.get_float32_matmul_precision()  # "highest": without TF32
    report.keep("machine", machine)
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    python = platform.python_version()
    report.note("machine", f"{report.card}, Python {python}, {found}, commit {machine['commit']}")
    rate = measured_flops(device=default_device(), dtype=torch.bfloat16 if has_gpu() else torch.float32)
    report.add("matrix products", rate / 1e12, "TFLOP/s")
    if has_gpu():
        free, total = torch.cuda.mem_get_info()
        report.add("memory", total / 1e9, "GB")
        report.add("free memory", free / 1e9, "GB")


def run_part(task_json: str, begun_s: float) -> int:
    """In its own process, which began at begun_s of the machine's monotonic clock."""
    task = Task.from_json(task_json)
    task = replace(task, seconds=task.seconds - (time.monotonic() - begun_s))  # imports count, too
    report = Report(task.part, task.out, card_name())
    try:
        if task.part == "check":
            check(report)
        else:
            module = next(part.module for part in PARTS if part.name == task.part)
            importlib.import_module(f"benchmarks.gpu.{module}").run(task, report)
    except Exception as error:
        traceback.print_exc()
        report.note("the part", f"{failure(error)} (see {task.part}.log)")
        return 1
    return 0


def supervise(task: Task, limit_s: float) -> str:
    """Runs a part → "", or what went wrong."""
    command = [sys.executable, "-m", "benchmarks.gpu.session", "--part", task.to_json()]
    command += ["--begun", str(time.monotonic())]
    with (task.out / f"{task.part}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"did not end in {limit_s:.0f} s"
        finally:
            end_with_children(process.pid)
            process.wait()
            with contextlib.suppress(ProcessLookupError):  # children of a part that has ended hold the GPU
                os.killpg(process.pid, signal.SIGKILL)
    return f"failed with exit code {code}" if code else ""


def keep_results(out: Path, keep: Path) -> None:
    """OUT without OUT/work as one file, and the table beside it."""
    try:
        with atomic(keep / "results.tar.gz") as path, tarfile.open(path, "w:gz", compresslevel=1) as archive:
            archive.add(out, ".", filter=lambda entry: None if entry.name == "./work" else entry)
        with atomic(keep / "table.md") as path:
            shutil.copyfile(out / "table.md", path)
    except (OSError, EnvironmentProblem) as error:  # what is measured matters more: the session goes on
        sys.stderr.write(f"--keep {keep}: {error}\n")


def session(
    out: Path,
    minutes: float,
    rehearse: bool,
    data: Path | None,
    only: list[str],
    spent_s: float = 0.0,
    keep: Path | None = None,
) -> int:
    """→ the number of parts that did not end well. spent_s: of the minutes, before this was called. keep: a
    folder that gets the results so far after each part."""
    started_s = time.monotonic() - spent_s
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").unlink(missing_ok=True)
    parts = [Part("check", "", 30), *(part for part in PARTS if not only or part.name in only)]
    bad, taken_s = 0, {}
    for part in parts:
        left_s = minutes * 60 - (time.monotonic() - started_s)
        limit_s = limit_of(part, minutes, left_s, part is parts[-1], rehearse)
        if not limit_s:
            add_line(out, table_line(part.name, "the part", f"skipped: {left_s:.0f} s are left"))
            bad += 1
            continue
        part_started_s = time.monotonic()
        problem = supervise(Task(part.name, out.resolve(), limit_s, rehearse, data), limit_s)
        taken_s[part.name] = round(time.monotonic() - part_started_s, 1)
        sys.stdout.write(f"{part.name:10} {taken_s[part.name]:6.1f} s  {problem or 'done'}\n")
        sys.stdout.flush()
        if problem:
            add_line(out, table_line(part.name, "the part", f"{problem}: see {part.name}.log"))
            bad += 1
        if keep:
            keep_results(out, keep)
    total_s = round(time.monotonic() - started_s, 1)
    add_line(out, table_line("session", "all parts", f"{total_s} s: {json.dumps(taken_s)}"))
    if keep:
        keep_results(out, keep)
    sys.stdout.write(f"{total_s} s of {minutes * 60:.0f} s; {out / 'table.md'}\n")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", help="folder for results")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole session")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--data", type=Path, help="prepared folder for the training to quality")
    parser.add_argument("--keep", type=Path, help="folder for results.tar.gz and table.md, after each part")
    parser.add_argument("--only", nargs="+", default=[], choices=[part.name for part in PARTS])
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)  # when the part did, monotonic clock
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)  # when the script began, Unix time
    options = parser.parse_args()
    if options.part:
        return run_part(options.part, options.begun)
    if options.out is None:
        parser.error("OUT is missing: a folder for the results")
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    if options.keep and options.keep.resolve().is_relative_to(options.out.resolve()):
        parser.error(f"--keep {options.keep} lies in OUT, which is packed into it: name another folder")
    if options.data and not (options.data / "manifest.json").is_file():
        parser.error(f"--data {options.data} is no prepared folder: it has no manifest.json")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    data = options.data.resolve() if options.data else None
    spent_s = time.time() - options.started if options.started else 0.0
    bad = session(options.out, options.minutes, options.rehearse, data, options.only, spent_s, options.keep)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
