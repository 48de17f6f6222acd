"""What tests do with jobs: submit, wait, look."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm import cluster

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
TRAIN = str(ROOT / "slurm" / "train.sbatch")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
WAIT_S = 500  # for one job; about 30 s on two free cores, ten times as long on busy ones


def submit(
    slurm: cluster.Slurm,
    work: Path,
    *arguments: str,
    options: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
) -> str:
    """The id of the new job of two nodes; its output goes to work/JOB.out."""
    command = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--cpus-per-task=1",
        f"--output={work}/%j.out",
        *options,
        TRAIN,
        *arguments,
    ]
    return slurm.run(command, cwd=work, env=env)


def wait(slurm: cluster.Slurm, work: Path, job_id: str) -> dict[str, str]:
    """The job when it has ended. Fails with its output when it does not."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        job = slurm.job(job_id)
        if job["JobState"] in ENDED:
            return job
        time.sleep(0.1)
    slurm.run(["scancel", job_id])
    pytest.fail(f"job {job_id} has not ended: {slurm.job(job_id)}\n{output(work, job_id)}")


def wait_until(condition: Callable[[], bool], message: Callable[[], str]) -> float:
    """Seconds until `condition` held. Fails with `message` when it does not."""
    started_s = time.monotonic()
    while not condition():
        if time.monotonic() > started_s + WAIT_S:
            pytest.fail(message())
        time.sleep(0.05)
    return time.monotonic() - started_s


def output(work: Path, job_id: str) -> str:
    path = work / f"{job_id}.out"
    return path.read_text(errors="replace")[-6000:] if path.exists() else "(no output yet)"


def records(run_dir: Path, kind: str = "train") -> list[dict[str, float]]:
    """Of metrics.jsonl; also while a run writes it."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [
        record
        for record in (json.loads(line) for line in lines if line.endswith("\n"))
        if record["kind"] == kind
    ]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir)]
