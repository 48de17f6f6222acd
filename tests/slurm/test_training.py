"""slurm/ on a real cluster of two nodes (cluster.py): a two-node run trains like one process, and after each
fault it comes back and ends on that curve."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import cluster
from tests.slurm.jobs import ROOT, losses, output, records, submit, wait, wait_until
from trainer.configs import load_config
from trainer.training.loop import train

SETTINGS = [
    "model.backbone=scratch:nano",
    "model.dropout=0",
    "model.gather_negatives=true",
    # AdamW makes steps of ±lr of gradients that are rounding noise: a larger one tells the sums of two ranks
    # from those of one
    "optim.lr=1e-5",
    "data.item_tokens=8",
    "data.history_tokens=4",
    "data.history_max=8",
    "optim.global_batch_size=16",
    "optim.warmup_steps=2",
    "run.max_steps=40",
    "run.log_every_steps=1",
    "run.validate_every_steps=20",
    "run.checkpoint_every_steps=5",
    "run.valid_events=8",
    "run.eval_batch_size=4",
    "run.threads=1",
    "run.timeout_s=400",
]
UNTRACKED = "tracking.enabled=false"
HALF = "optim.micro_batch_size=8"  # of a step's 16 events, on each of two nodes

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]
Fault = Callable[[cluster.Slurm, Path, str], None]


@pytest.fixture(scope="module")
def single(work: Path) -> list[float]:
    return undisturbed(work, work / "single")


def undisturbed(work: Path, run_dir: Path, *more: str) -> list[float]:
    """The loss curve of one process."""
    train(
        load_config(
            "demo",
            [
                f"data.dir={work / 'data'}",
                f"run.dir={run_dir}",
                *SETTINGS,
                "optim.micro_batch_size=16",
                UNTRACKED,
                *more,
            ],
        )
    )
    return losses(run_dir)


def gensr(slurm: cluster.Slurm, work: Path, *arguments: str) -> dict[str, Any]:
    """What a verb answers to --json on the cluster's controller."""
    answer = slurm.run(
        [sys.executable, "-m", "trainer", *arguments, "--json"],
        cwd=work,
        env={"PYTHONPATH": str(ROOT)},
        timeout_s=400,
    )
    document: dict[str, Any] = json.loads(answer)
    return document


def test_two_nodes_train_like_one_process(slurm: cluster.Slurm, work: Path, single: list[float]) -> None:
    """Submitted as a user does."""
    run_dir = work / "runs/plain"
    words = [
        "submit",
        "demo",
        "--nodes",
        "2",
        "--gpus-per-node",
        "0",
        "--cpus-per-task=1",
        "data.dir=data",
        "run.dir=runs/plain",
    ]
    answer = gensr(slurm, work, *words, *SETTINGS, HALF, UNTRACKED)
    (job_id,) = answer["job_ids"]
    job = wait(slurm, run_dir, job_id)
    written = (run_dir / f"gensr-train-{job_id}.out").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), written
    facts: dict[str, Any] = json.loads((run_dir / "environment.json").read_text())
    assert (facts["devices"], facts["zero_stage"]) == ("2 × CPU", 2)
    assert losses(run_dir) == pytest.approx(single, abs=1e-4)
    for number in (1, 2):  # each read its shards from its own disk
        assert list((slurm.folder / f"disk-{number}" / "data" / "blobs").iterdir())


# ---- faults ------------------------------------------------------------------------------------------------


def time_limit(slurm: cluster.Slurm, run_dir: Path, job_id: str) -> None:
    slurm.run(["scancel", "--batch", "--signal=USR1", job_id])  # what SLURM does ahead of the limit


def preemption(slurm: cluster.Slurm, run_dir: Path, job_id: str) -> None:
    """Another job takes both nodes, for a second."""
    slurm.run(
        ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    )


def killed_rank(slurm: cluster.Slurm, run_dir: Path, job_id: str) -> None:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"run.dir={run_dir}".encode() in command and b"RANK=1" in environment:
                os.kill(int(folder.name), signal.SIGKILL)
                return
    pytest.fail("rank 1 is not there")


def lost_node(slurm: cluster.Slurm, run_dir: Path, job_id: str) -> None:
    """Node 2 goes dark, and comes back once SLURM has seen that."""
    slurm.configure("SlurmdTimeout", 15)
    slurm.power(2, on=False)
    wait_until(
        lambda: "down" in slurm.run(["sinfo", "--noheader", "--nodes=node2", "--format=%T"]),
        lambda: slurm.run(["sinfo", "--long"]),
    )
    slurm.configure("SlurmdTimeout", 300)
    slurm.power(2, on=True)


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault", [time_limit, preemption, killed_rank, lost_node], ids=lambda fault: fault.__name__
)
def test_an_interrupted_job_comes_back_and_ends_on_the_same_curve(
    slurm: cluster.Slurm, work: Path, single: list[float], fault: Fault
) -> None:
    run_dir = work / "runs" / fault.__name__
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{work}/{fault.__name__}.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
    job_id = submit(slurm, work, "demo", "data.dir=data", f"run.dir={run_dir}", *SETTINGS, HALF, env=env)
    wait_until(lambda: (run_dir / "checkpoints" / "latest").exists(), lambda: output(work, job_id))
    before = len(records(run_dir))
    assert before < len(single), "the run was faster than the fault"
    struck_s = time.monotonic()
    fault(slurm, run_dir, job_id)
    wait_until(lambda: "attempt 2" in output(work, job_id), lambda: output(work, job_id))
    queued_s = time.monotonic() - struck_s
    said = re.compile(r"continuing step-0*(\d+)")
    wait_until(lambda: bool(said.search(output(work, job_id))), lambda: output(work, job_id))
    kept = int(said.findall(output(work, job_id))[0])
    wait_until(lambda: len(records(run_dir)) > kept, lambda: output(work, job_id))
    back_s = time.monotonic() - struck_s
    print(
        f"{fault.__name__} after step {before}: the next attempt began after {queued_s:.0f} s, its first "
        f"step from {kept} on was done after {back_s:.0f} s"
    )
    job = wait(slurm, work, job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(work, job_id)
    assert losses(run_dir) == pytest.approx(single, abs=1e-4)
    assert not list((run_dir / "checkpoints").glob(".partial-*"))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(env["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"], "one MLflow run for both attempts"
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(1, len(single) + 1)), (
        "no step twice, none missing"
    )


@pytest.mark.faults
def test_a_job_that_began_on_two_nodes_goes_on_on_one(slurm: cluster.Slurm, work: Path) -> None:
    """Half as many processes, twice as many passes a step. Without the contrastive term, whose negatives are
    those of one pass."""
    run_dir, no_contrast = work / "runs/one_node", "model.contrastive_weight=0"
    words = ["demo", "data.dir=data", f"run.dir={run_dir}", *SETTINGS, HALF, UNTRACKED, no_contrast]
    job_id = submit(slurm, work, *words, env={"GENSR_MAX_RESTARTS": "0"})
    wait_until(lambda: (run_dir / "checkpoints" / "latest").exists(), lambda: output(work, job_id))
    time_limit(slurm, run_dir, job_id)
    assert wait(slurm, work, job_id)["ExitCode"] == "75:0", output(work, job_id)
    job_id = submit(slurm, work, *words, options=("--nodes=1",))
    assert wait(slurm, work, job_id)["JobState"] == "COMPLETED", output(work, job_id)
    assert json.loads((run_dir / "environment.json").read_text())["devices"] == "1 × CPU"
    assert losses(run_dir) == pytest.approx(
        undisturbed(work, work / "single_without_contrast", no_contrast), abs=1e-4
    )


# ---- sweep -------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_a_sweep_trains_evaluates_and_ends_in_one_table(slurm: cluster.Slurm, work: Path) -> None:
    """Two runs on one node each; the first is stopped on its way, which must not touch the second."""
    (work / "sweep.yaml").write_text("- {optim.lr: 1e-5}\n- {optim.lr: 1e-3}\n")
    words = [
        "submit",
        "demo",
        "--gpus-per-node",
        "0",
        "--sweep",
        "sweep.yaml",
        "--cpus-per-task=1",
        "data.dir=data",
        "run.dir=runs/sweep",
    ]
    answer = gensr(slurm, work, *words, *SETTINGS, "optim.micro_batch_size=16")
    first, second = (Path(work, folder) for folder in answer["runs"])
    train_id, _, summary_id = answer["job_ids"]
    log = work / "runs/sweep"
    wait_until(lambda: len(records(first)) > 2, lambda: output(log, f"gensr-train-{train_id}_0"))
    slurm.run(["scancel", "--batch", "--signal=USR1", f"{train_id}_0"])
    job = wait(slurm, log, summary_id)
    assert job["JobState"] == "COMPLETED", output(log, f"gensr-sweep-{summary_id}")
    assert "attempt 2" in output(log, f"gensr-train-{train_id}_0")
    assert "attempt 2" not in output(log, f"gensr-train-{train_id}_1")
    document = json.loads((log / "sweep.json").read_text())
    assert {row["run"]: row["status"] for row in document["runs"]} == {
        first.name: "finished",
        second.name: "finished",
    }
    assert set(document["comparison"]["runs"]) == {f"runs/sweep/{run.name}" for run in (first, second)}
    assert "optim.lr" in document["comparison"]["settings"]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{log}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (parent,) = (run for run in runs if run.info.run_name == "sweep")
    assert parent.info.status == "FINISHED"
    assert sorted(
        run.info.run_name for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ) == [first.name, second.name]
