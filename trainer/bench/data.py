"""`gensr bench`: speed and memory as ratios to fair baselines (benchmarks/), alternated in one run (A B A B),
so that they hold on any machine.

Every measurement is a process of its own: its CPU time and peak memory, children included, come from the
kernel. Nothing heavy is imported here.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from data_shards.progress import StageProgress, silent_stage
from data_shards.schema import SPLITS, read_manifest
from trainer.errors import BenchError, ConfigError
from trainer.runtime.files import writing

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# KuaiSAR; other sizes are in proportion to it
ROWS, USERS, ITEMS, DAYS, ROWS_PER_DAY = 19_664_885, 25_877, 6_890_707, 19, 40
BATCH_SIZE = 256  # events, of the loader


@dataclass(frozen=True)
class Measured:
    """One finished process. peak_rss_bytes: the largest of it and its children."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    answer: dict[str, Any]  # the JSON object on the last line of its stdout; {} where there is none


def measure(command: Sequence[str], threads: int, cwd: Path | None = None) -> Measured:
    """Run a command to its end, in folder `cwd` if given. Raises BenchError with its last line on stderr when
    it fails."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true",
        "RAYON_NUM_THREADS": str(threads),
    }
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, cwd=cwd
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # interrupted: leave nothing behind
            process.kill()
            raise
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if process.returncode:
            last = err.read().decode(errors="replace").strip().splitlines()[-1:]
            raise BenchError(
                f"{' '.join(command[:4])} … ended with exit code {process.returncode}: {' '.join(last)}"
            )
        lines = out.read().splitlines()
        answer = json.loads(lines[-1]) if lines and lines[-1].startswith(b"{") else {}
    return Measured(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, answer)


def bench_data(
    rows: Sequence[int],
    turns: int = 2,
    seconds: float = 5.0,
    threads: int = 2,
    memory_limit: str = "1000MB",
    folder: Path | None = None,
    progress: StageProgress = silent_stage,
) -> dict[str, Any]:
    """Preparation and loader on simulated logs of about rows[…] rows → the object that `gensr bench data
    --json` prints.

    Its `scaling` is a table with a row for each size; figures outside it are those of the last size. seconds:
    CPU time of each loader measurement. folder: where logs and prepared folders lie (kept there; default: a
    temporary folder). Raises ConfigError without benchmarks/ (it is part of the repository, not of the
    package), BenchError when a measured program fails.
    """
    from trainer.runs.provenance import git_commit

    if not BENCHMARKS.is_dir():
        raise ConfigError(f"{BENCHMARKS} is missing: gensr bench needs a checkout of the repository.")
    if not rows or min(rows) < 20_000:
        raise ConfigError(
            f"--rows must be 20000 or more each, got {', '.join(map(str, rows))}: smaller logs do not "
            "survive the filter"
        )
    work = Path(tempfile.mkdtemp(prefix="gensr-bench-")) if folder is None else folder
    try:
        with writing(work):
            work.mkdir(parents=True, exist_ok=True)
        scaling = []
        for wanted in rows:
            prepared = _prepare(work, wanted, turns, threads, memory_limit, progress)
            stream = _program("stream_loader.py", work / "prepared", seconds)
            scaling.append(
                prepared | {"loader_examples_per_s_per_core": round(stream["examples"] / stream["cpu_s"])}
            )
            scaling[-1]["loader_rss_bytes"] = stream["rss_bytes"]
        loader = _loader(work / "prepared", turns, seconds, progress)
    finally:
        if folder is None:
            shutil.rmtree(work, ignore_errors=True)
    largest = scaling[-1]
    return {
        "prepare_ratio_to_duckdb": largest["ratio_to_duckdb"],
        "prepare_cpu_ratio_to_duckdb": largest["cpu_ratio_to_duckdb"],
        "prepare_peak_rss_bytes": largest["peak_rss_bytes"],
        **loader,
        "scaling": scaling,
        "configuration": {
            "rows": [entry["rows"] for entry in scaling],
            "turns": turns,
            "loader_cpu_s": seconds,
            "threads": threads,
            "memory_limit": memory_limit,
            "batch_size": BATCH_SIZE,
        },
        "hardware": hardware(),
        "commit": git_commit(),
    }


def raw_logs(work: Path, rows: int, progress: StageProgress) -> tuple[Path, int]:
    """A folder of about `rows` log rows in KuaiSAR's schema, simulated unless it is there, and how many there
    are."""
    raw, part = work / f"raw-{rows}", rows / ROWS
    if not raw.exists():
        sizes = {
            "--users": max(round(USERS * part), 20),
            "--items": max(round(ITEMS * part), 200),
            "--days": DAYS,
            "--rows-per-day": ROWS_PER_DAY,
        }
        progress("simulate", 0, rows)
        measure(
            [
                sys.executable,
                "-m",
                "trainer",
                "simulate",
                str(raw),
                *(str(part) for pair in sizes.items() for part in pair),
            ],
            threads=1,
        )
    return raw, sum(_count_lines(raw / name) - 1 for name in ("rec_inter.csv", "src_inter.csv"))


def _prepare(
    work: Path, rows: int, turns: int, threads: int, memory_limit: str, progress: StageProgress
) -> dict[str, Any]:
    """Preparation and the duckdb script, alternately → one row of the scaling table."""
    raw, num_rows = raw_logs(work, rows, progress)
    out, bare = work / "prepared", work / "duckdb"
    limits = [f"memory_limit={memory_limit}", f"threads={threads}", "overwrite=true"]
    ours = [sys.executable, "-m", "trainer", "prepare", "kuaisar", str(raw), str(out), *limits, "--json"]
    theirs = [
        sys.executable,
        str(BENCHMARKS / "duckdb_prepare.py"),
        str(raw),
        str(bare),
        memory_limit,
        str(threads),
    ]
    measured: list[tuple[Measured, Measured]] = []
    for turn in range(turns):
        progress("prepare", 2 * turn, 2 * turns)
        prepared = measure(ours, threads)
        progress("duckdb", 2 * turn + 1, 2 * turns)
        measured.append((prepared, measure(theirs, threads)))
    counts = {split: sum(read_manifest(out).raw["counts"][split].values()) for split in SPLITS}
    if counts != measured[-1][1].answer:
        raise BenchError(
            f"the two preparations disagree about the events: {counts} and {measured[-1][1].answer}"
        )
    return {
        "rows": num_rows,
        "items": _count_lines(raw / "item_features.csv") - 1,
        "events": sum(counts.values()),
        "wall_s": round(statistics.median(a.wall_s for a, _ in measured), 2),
        "cpu_s": round(statistics.median(a.cpu_s for a, _ in measured), 2),
        "peak_rss_bytes": max(a.peak_rss_bytes for a, _ in measured),
        "duckdb_wall_s": round(statistics.median(b.wall_s for _, b in measured), 2),
        "duckdb_cpu_s": round(statistics.median(b.cpu_s for _, b in measured), 2),
        "duckdb_peak_rss_bytes": max(b.peak_rss_bytes for _, b in measured),
        "ratio_to_duckdb": round(statistics.median(a.wall_s / b.wall_s for a, b in measured), 3),
        "cpu_ratio_to_duckdb": round(statistics.median(a.cpu_s / b.cpu_s for a, b in measured), 3),
    }


def _loader(prepared: Path, turns: int, seconds: float, progress: StageProgress) -> dict[str, Any]:
    """The training stream and the per-example collator, alternately. Rates are examples per second of CPU
    time: per core, whatever else runs."""
    rates: list[tuple[float, float]] = []
    answers = []
    for turn in range(turns):
        progress("loader", 2 * turn, 2 * turns)
        ours, theirs = (
            _program(name, prepared, seconds) for name in ("stream_loader.py", "per_example_collator.py")
        )
        answers.append(ours)
        rates.append((ours["examples"] / ours["cpu_s"], theirs["examples"] / theirs["cpu_s"]))
    return {
        "loader_examples_per_s_per_core": round(statistics.median(ours for ours, _ in rates)),
        "loader_ratio_to_per_example": round(statistics.median(ours / theirs for ours, theirs in rates), 1),
        "loader_rss_bytes": max(answer["rss_bytes"] for answer in answers),
        "loader_process_rss_bytes": max(answer["process_rss_bytes"] for answer in answers),
        "distinct_users_mean": round(statistics.mean(answer["distinct_users_mean"] for answer in answers), 2),
        "distinct_users_min": min(answer["distinct_users_min"] for answer in answers),
    }


def _program(name: str, prepared: Path, seconds: float) -> dict[str, Any]:
    """What a program of benchmarks/ that makes batches of `prepared` for some CPU seconds says."""
    return measure(
        [sys.executable, str(BENCHMARKS / name), str(prepared), str(seconds), str(BATCH_SIZE)], threads=1
    ).answer


def bench_lines(document: dict[str, Any]) -> list[str]:
    """The object as lines for people."""
    lines = [
        f"  {'rows':>12} {'events':>11} {'prepare':>9} {'CPU':>9} {'peak':>9} {'duckdb':>9} {'CPU':>9} "
        f"{'peak':>9} {'ratio':>6} {'loader':>9}"
    ]
    for row in document["scaling"]:
        ours = f"{row['wall_s']:>8.1f}s {row['cpu_s']:>8.1f}s {row['peak_rss_bytes'] / 1e6:>6,.0f} MB"
        bare = (
            f"{row['duckdb_wall_s']:>8.1f}s {row['duckdb_cpu_s']:>8.1f}s "
            f"{row['duckdb_peak_rss_bytes'] / 1e6:>6,.0f} MB"
        )
        lines.append(
            f"  {row['rows']:>12,} {row['events']:>11,} {ours} {bare} {row['ratio_to_duckdb']:>6.2f} "
            f"{row['loader_rss_bytes'] / 1e6:>6,.0f} MB"
        )
    return [
        *lines,
        f"  loader       {document['loader_examples_per_s_per_core']:,} examples/s per core, "
        f"{document['loader_ratio_to_per_example']:,.0f} × the per-example collator, "
        f"{document['loader_rss_bytes'] / 1e6:,.0f} MB",
        f"  batches      {document['distinct_users_mean']:.1f} distinct users of "
        f"{document['configuration']['batch_size']}, "
        f"at least {document['distinct_users_min']}",
        machine_line(document),
    ]


def hardware() -> dict[str, Any]:
    from trainer.runtime.launch import num_cores

    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": num_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
    }


def machine_line(document: dict[str, Any], remark: str = "") -> str:
    """The last line that a benchmark prints for people: where and at which commit it ran."""
    machine = document["hardware"]
    device = [machine["device"]] if "device" in machine else []
    parts = [*device, f"{machine['cores']} cores", f"{machine['memory_gb']} GB", machine["cpu"]]
    return f"  {', '.join(parts)};{remark} commit {document['commit']}"


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 22), b""))
