"""slurm/ on a real cluster of two nodes (cluster.py): a two-node run trains like one process, and comes back when it was interrupted.

What the job script decides is tested with a stand-in for `accelerate`, which behaves as told and costs nothing.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import cluster
from tests.tiny_folder import make_tiny_folder
from trainer.config import load_config
from trainer.train import train

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
TRAIN = str(ROOT / "slurm" / "train.sbatch")
SETTINGS = [
    "model.backbone=scratch:nano",
    "model.dropout=0",
    "model.gather_negatives=true",
    "optim.lr=1e-5",  # AdamW makes steps of ±lr of gradients that are rounding noise: a larger one tells the sums of two ranks from those of one
    "data.item_tokens=8",
    "data.history_tokens=4",
    "data.history_max=8",
    "optim.global_batch_size=16",
    "optim.warmup_steps=2",
    "run.max_steps=40",
    "run.log_every_steps=1",
    "run.validate_every_steps=20",
    "run.valid_events=8",
    "run.eval_batch_size=4",
    "run.threads=1",
    "run.timeout_s=200",
]
WAIT_S = 240  # for one job; about 25 s on two free cores, or a minute more where DeepSpeed's CPU library has to be compiled
LINES_BEFORE_THE_SIGNAL = 4

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Slurm]:
    reason = cluster.missing()
    if reason:
        pytest.skip(f"no SLURM cluster can be started: {reason}")
    with cluster.cluster(tmp_path_factory.mktemp("slurm") / "c") as running:
        yield running


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: site settings, as the README has them written, and data."""
    from torch.utils.cpp_extension import get_default_build_root

    folder = tmp_path_factory.mktemp("work")
    make_tiny_folder(folder / "data", num_train=640)
    compiled = os.environ.get("TORCH_EXTENSIONS_DIR") or f"{get_default_build_root()}/py{sys.version_info[0]}{sys.version_info[1]}_cpu"
    lines = [
        f'PATH="{Path(sys.executable).parent}:$PATH"',
        f"export PYTHONPATH={ROOT} TORCH_EXTENSIONS_DIR={compiled}",  # what other tests have compiled
        "export GENSR_CPU=1 GENSR_SIGNAL_EVERY_S=0.2 OMP_NUM_THREADS=1",
        "unset PYTEST_CURRENT_TEST",
    ]
    (folder / "slurm").mkdir()
    (folder / "slurm" / "env.sh").write_text("\n".join(lines) + "\n")
    return folder


def submit(slurm: cluster.Slurm, work: Path, *arguments: str, options: tuple[str, ...] = (), env: dict[str, str] | None = None) -> str:
    """The id of the new job of two nodes; its output goes to work/JOB.out."""
    command = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", f"--output={work}/%j.out", *options, TRAIN, *arguments]
    return slurm.run(command, cwd=work, env=env)


def wait(slurm: cluster.Slurm, work: Path, job_id: str) -> dict[str, str]:
    """The job when it has ended. Fails with its output when it does not."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        job = slurm.job(job_id)
        if job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"):
            return job
        time.sleep(0.1)
    slurm.run(["scancel", job_id])
    pytest.fail(f"job {job_id} has not ended: {slurm.job(job_id)}\n{output(work, job_id)}")


def output(work: Path, job_id: str) -> str:
    path = work / f"{job_id}.out"
    return path.read_text(errors="replace")[-6000:] if path.exists() else "(no output yet)"


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


# ---- scripts ---------------------------------------------------------------------------------------------------


def test_shellcheck_has_nothing_to_say() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    files = [*SCRIPTS, ROOT / "slurm" / "env.example.sh"]
    check = subprocess.run(["shellcheck", "--severity=warning", *map(str, files)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert check.returncode == 0, check.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_controller_accepts_every_script(slurm: cluster.Slurm, script: Path) -> None:
    slurm.run(["sbatch", "--test-only", str(script), "x", "y", "z"])  # raises when it is refused


# ---- what train.sbatch decides ---------------------------------------------------------------------------------

STAND_IN = """\
# accelerate launch ...: node 0 does what the word of $PLAN for this attempt says; the other node waits to be ended
import os, signal, sys, time
from pathlib import Path

run, node = Path(os.environ["RUN"]), os.environ["SLURM_NODEID"]
with (run / f"launched-{node}").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
signal.signal(signal.SIGTERM, signal.SIG_DFL)
if node != "0":
    time.sleep(200)
attempt = len((run / "launched-0").read_text().splitlines())


def leave(status, code=1):
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step-{attempt}")
    (run / "status.json").write_text('{\\n  "status": "%s"\\n}' % status)
    os._exit(code)


word = os.environ["PLAN"].split()[attempt - 1]
if word == "killed":
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    os._exit = lambda code: time.sleep(200)
    leave("running")
elif word == "until_told":
    signal.signal(signal.SIGUSR1, lambda *_: leave("stopped", 75))
    time.sleep(200)
elif word == "wait":
    (run / "ready").touch()
    time.sleep(200)
elif word != "stuck":
    leave(word)
sys.exit(1)
"""


CASES: dict[str, dict[str, Any]] = {
    # name → what each attempt does, and how sbatch is called
    "whatever the launcher's exit code": {"plan": "finished"},
    "a rank was killed": {"plan": "killed finished"},
    "an error that the user must mend": {"plan": "failed finished"},
    "no step forward": {"plan": "stuck finished"},
    "a step forward, then none": {"plan": "crashed stuck finished"},
    "cap": {"plan": "crashed crashed finished", "env": {"GENSR_MAX_RESTARTS": "1"}},
    # SLURM signals a job some time between 50 and 110 s before its end: at once
    "time limit": {"plan": "until_told finished", "options": ("--time=1", "--signal=B:USR1@50")},
    "scancel": {"plan": "wait finished"},
    "no GPU": {"plan": "finished", "site": "GENSR_CPU=0\nnvidia-smi() { return 1; }\n"},
    "launch": {
        "plan": "finished",
        "env": {"GENSR_PROCESSES_PER_NODE": "4", "MLFLOW_TRACKING_URI": "http://store", "GENSR_DEEPSPEED": "zero3.json"},
    },
}


@dataclass(frozen=True)
class Ended:
    state: str
    restarts: int
    exit_code: str
    run_dir: Path
    output: str


@pytest.fixture(scope="module")
def ended(slurm: cluster.Slurm, work: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All CASES, run side by side with STAND_IN for accelerate."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "accelerate").write_text(f"#!{sys.executable}\n{STAND_IN}")
    (folder / "accelerate").chmod(0o755)
    jobs: dict[str, str] = {}
    run_dirs = {name: folder / name.replace(" ", "_").replace("'", "").replace(",", "") for name in CASES}
    for name, case in CASES.items():
        site = folder / f"{run_dirs[name].name}.sh"
        site.write_text((work / "slurm" / "env.sh").read_text() + f'PATH="{folder}:$PATH"\n' + case.get("site", ""))
        run_dirs[name].mkdir()
        env = {"GENSR_ENV": str(site), "RUN": str(run_dirs[name]), "PLAN": case["plan"], **case.get("env", {})}
        jobs[name] = submit(slurm, work, "demo", "data.dir=OUT", f"run.dir={run_dirs[name]}", options=case.get("options", ()), env=env)
    deadline_s = time.monotonic() + WAIT_S
    while not (run_dirs["scancel"] / "ready").exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    slurm.run(["scancel", jobs["scancel"]])
    results = {}
    for name, job_id in jobs.items():
        job = wait(slurm, work, job_id)
        results[name] = Ended(job["JobState"], int(job["Restarts"]), job["ExitCode"], run_dirs[name], output(work, job_id))
    return results


@pytest.mark.parametrize(
    ("name", "state", "restarts"),
    [
        ("whatever the launcher's exit code", "COMPLETED", 0),
        ("a rank was killed", "COMPLETED", 1),
        ("an error that the user must mend", "FAILED", 0),
        ("no step forward", "FAILED", 0),
        ("a step forward, then none", "FAILED", 1),
        ("cap", "FAILED", 1),
        ("time limit", "COMPLETED", 1),
        ("scancel", "CANCELLED", 0),
        ("no GPU", "FAILED", 0),
    ],
)
def test_a_job_is_requeued_only_where_it_helps(ended: dict[str, Ended], name: str, state: str, restarts: int) -> None:
    assert (ended[name].state, ended[name].restarts) == (state, restarts), ended[name].output


def test_messages(ended: dict[str, Ended]) -> None:
    assert ended["cap"].exit_code == "75:0" and "GENSR_MAX_RESTARTS" in ended["cap"].output
    assert "--gpus-per-node" in ended["no GPU"].output  # days on CPU by accident
    assert "no checkpoint was saved" in ended["no step forward"].output


def test_every_node_launches_its_own_ranks(ended: dict[str, Ended]) -> None:
    run_dir = ended["launch"].run_dir
    line = (run_dir / "launched-0").read_text()
    for words in (
        "--num_machines 2 --num_processes 8 --machine_rank 0 --main_process_ip 10.83.0.1 ",
        "--deepspeed_config_file zero3.json",
        f"-m trainer train demo tracking.uri=http://store data.dir=OUT run.dir={run_dir} --resume auto",
    ):
        assert words in line
    other = run_dir / "launched-1"  # may have been ended before it wrote
    assert not other.exists() or other.read_text() == line.replace("--machine_rank 0", "--machine_rank 1")


@pytest.mark.parametrize(
    ("script", "arguments", "calls"),
    [
        ("prepare", ["tables", "my raw", "OUT", "vocab_size=3", "cf.dim=4"], ["prepare tables my raw OUT vocab_size=3", "cf OUT cf.dim=4"]),
        ("evaluate", ["my run", "--split", "valid"], ["evaluate my run --split valid", "register my run its-name"]),
    ],
)
def test_prepare_and_evaluate_call_their_verbs(
    slurm: cluster.Slurm, work: Path, tmp_path: Path, script: str, arguments: list[str], calls: list[str]
) -> None:
    (tmp_path / "python").write_text('#!/usr/bin/env bash\necho "$*"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "env.sh").write_text(f'PATH="{tmp_path}:$PATH"\nexport GENSR_CPU=1\n')
    command = ["sbatch", "--parsable", f"--output={work}/%j.out", str(ROOT / "slurm" / f"{script}.sbatch"), *arguments]
    job_id = slurm.run(command, cwd=work, env={"GENSR_ENV": str(tmp_path / "env.sh"), "GENSR_REGISTER": "its-name"})
    assert wait(slurm, work, job_id)["JobState"] == "COMPLETED", output(work, job_id)
    assert output(work, job_id).splitlines() == [f"-m trainer {call}" for call in calls]


# ---- training --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(work: Path) -> list[float]:
    """The loss curve of one process."""
    settings = [f"data.dir={work / 'data'}", f"run.dir={work / 'single'}", *SETTINGS, "optim.micro_batch_size=16", "tracking.enabled=false"]
    train(load_config(None, settings))
    return losses(work / "single")


@pytest.mark.slow
def test_two_nodes_train_like_one_process(slurm: cluster.Slurm, work: Path, single: list[float]) -> None:
    preset = ["demo", "data.dir=data", "run.dir=runs/plain"]
    job_id = submit(slurm, work, *preset, *SETTINGS, "optim.micro_batch_size=8", "tracking.enabled=false")
    job = wait(slurm, work, job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), output(work, job_id)
    facts: dict[str, Any] = json.loads((work / "runs/plain/environment.json").read_text())
    assert (facts["devices"], facts["zero_stage"]) == ("2 × CPU", 2)
    assert losses(work / "runs/plain") == pytest.approx(single, abs=1e-4)


@pytest.mark.slow
def test_an_interrupted_job_requeues_itself_and_ends_on_the_same_curve(slurm: cluster.Slurm, work: Path, single: list[float]) -> None:
    run_dir = work / "runs/interrupted"
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{work}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
    job_id = submit(slurm, work, "demo", "data.dir=data", "run.dir=runs/interrupted", *SETTINGS, "optim.micro_batch_size=8", env=env)
    metrics = run_dir / "metrics.jsonl"
    deadline_s = time.monotonic() + WAIT_S
    while not metrics.exists() or metrics.read_text().count("\n") < LINES_BEFORE_THE_SIGNAL:
        assert slurm.job(job_id)["JobState"] in ("PENDING", "RUNNING") and time.monotonic() < deadline_s, output(work, job_id)
        time.sleep(0.05)
    slurm.run(["scancel", "--batch", "--signal=USR1", job_id])  # what SLURM does ahead of the time limit
    job = wait(slurm, work, job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(work, job_id)
    assert losses(run_dir) == pytest.approx(single, abs=1e-4)
    assert not list((run_dir / "checkpoints").glob(".partial-*"))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(env["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"], "one MLflow run for both attempts"
