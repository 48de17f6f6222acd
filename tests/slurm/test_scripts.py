"""slurm/ on a real cluster of two nodes (cluster.py): what the scripts decide, with a stand-in for the
training that behaves as told and costs nothing."""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import cluster
from tests.slurm.jobs import ROOT, SCRIPTS, WAIT_S, output, submit, wait

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


# ---- scripts -----------------------------------------------------------------------------------------------


def test_shellcheck_has_nothing_to_say() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    files = [*SCRIPTS, ROOT / "slurm" / "env.example.sh"]
    check = subprocess.run(
        ["shellcheck", "--severity=warning", *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert check.returncode == 0, check.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_is_requeued_keeps_the_log_of_the_attempt_before(script: Path) -> None:
    text = script.read_text()
    assert "#SBATCH --requeue\n" not in text or "#SBATCH --open-mode=append\n" in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_controller_accepts_every_script(slurm: cluster.Slurm, script: Path) -> None:
    slurm.run(["sbatch", "--test-only", str(script), "x", "y", "z"])  # raises when it is refused


# ---- what train.sbatch decides -----------------------------------------------------------------------------

STAND_IN = """\
# accelerate launch ...: node 0 does what the word of $PLAN for this attempt says;
# the other node waits to be ended
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
    "refused after it had finished": {"plan": "stuck", "status": "finished"},
    "no step forward": {"plan": "stuck finished"},
    "a step forward, then none once": {"plan": "crashed stuck finished"},
    "a step forward, then none": {"plan": "crashed stuck stuck finished"},
    "cap": {"plan": "crashed crashed finished", "env": {"GENSR_MAX_RESTARTS": "1"}},
    # SLURM signals a job some time between 50 and 110 s before its end: at once
    "time limit": {"plan": "until_told finished", "options": ("--time=1", "--signal=B:USR1@50")},
    "scancel": {"plan": "wait finished"},
    "a site that exports nothing": {"plan": "finished", "options": ("--export=GENSR_ENV,RUN,PLAN",)},
    "submitted by an array's task": {
        "plan": "crashed finished",
        "env": {"SLURM_ARRAY_JOB_ID": "999", "SLURM_ARRAY_TASK_ID": "7"},
    },
    "no GPU": {"plan": "finished", "site": "GENSR_CPU=0\nnvidia-smi() { return 1; }\n"},
    "launch": {
        "plan": "finished",
        "env": {
            "GENSR_PROCESSES_PER_NODE": "4",
            "MLFLOW_TRACKING_URI": "http://store",
            "GENSR_DEEPSPEED": "zero3.json",
        },
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
        site.write_text(
            (work / "slurm" / "env.sh").read_text() + f'PATH="{folder}:$PATH"\n' + case.get("site", "")
        )
        run_dirs[name].mkdir()
        if "status" in case:  # of an attempt before
            (run_dirs[name] / "status.json").write_text(f'{{\n  "status": "{case["status"]}"\n}}')
        env = {
            "GENSR_ENV": str(site),
            "RUN": str(run_dirs[name]),
            "PLAN": case["plan"],
            **case.get("env", {}),
        }
        jobs[name] = submit(
            slurm,
            work,
            "demo",
            "data.dir=OUT",
            f"run.dir={run_dirs[name]}",
            options=case.get("options", ()),
            env=env,
        )
    deadline_s = time.monotonic() + WAIT_S
    while not (run_dirs["scancel"] / "ready").exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    slurm.run(["scancel", jobs["scancel"]])
    results = {}
    for name, job_id in jobs.items():
        job = wait(slurm, work, job_id)
        results[name] = Ended(
            job["JobState"], int(job["Restarts"]), job["ExitCode"], run_dirs[name], output(work, job_id)
        )
    return results


@pytest.mark.parametrize(
    ("name", "state", "restarts"),
    [
        ("whatever the launcher's exit code", "COMPLETED", 0),
        ("a rank was killed", "COMPLETED", 1),
        ("an error that the user must mend", "FAILED", 0),
        ("refused after it had finished", "FAILED", 0),
        ("no step forward", "FAILED", 0),
        ("a step forward, then none once", "COMPLETED", 2),
        ("a step forward, then none", "FAILED", 2),
        ("cap", "FAILED", 1),
        ("time limit", "COMPLETED", 1),
        ("scancel", "CANCELLED", 0),
        ("a site that exports nothing", "COMPLETED", 0),
        ("submitted by an array's task", "COMPLETED", 1),
        ("no GPU", "FAILED", 0),
    ],
)
def test_a_job_is_requeued_only_where_it_helps(
    ended: dict[str, Ended], name: str, state: str, restarts: int
) -> None:
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
        "-m gensr train demo data.cache_dir=/mnt/data tracking.uri=http://store data.dir=OUT "
        f"run.dir={run_dir} --resume auto",
    ):
        assert words in line
    other = run_dir / "launched-1"  # may have been ended before it wrote
    assert not other.exists() or other.read_text() == line.replace("--machine_rank 0", "--machine_rank 1")


@pytest.mark.parametrize(
    ("script", "arguments", "calls"),
    [
        (
            "prepare",
            ["tables", "my raw", "OUT", "vocab_size=3", "cf.dim=4"],
            ["prepare tables my raw OUT vocab_size=3", "cf OUT cf.dim=4"],
        ),
        (
            "evaluate",
            ["my run", "--split", "valid"],
            ["evaluate my run --split valid", "register my run its-name"],
        ),
        (
            "score",
            ["models:/m@c", "my requests.parquet", "OUT"],
            ["score models:/m@c my requests.parquet --out OUT/part-00001-of-00001.parquet --part 1/1"],
        ),
    ],
)
def test_the_other_scripts_call_their_verbs(
    slurm: cluster.Slurm, work: Path, tmp_path: Path, script: str, arguments: list[str], calls: list[str]
) -> None:
    (tmp_path / "python").write_text('#!/usr/bin/env bash\necho "$*"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "env.sh").write_text(f'PATH="{tmp_path}:$PATH"\nexport GENSR_CPU=1\n')
    command = [
        "sbatch",
        "--parsable",
        f"--output={work}/%j.out",
        str(ROOT / "slurm" / f"{script}.sbatch"),
        *arguments,
    ]
    job_id = slurm.run(
        command, cwd=work, env={"GENSR_ENV": str(tmp_path / "env.sh"), "GENSR_REGISTER": "its-name"}
    )
    assert wait(slurm, work, job_id)["JobState"] == "COMPLETED", output(work, job_id)
    assert output(work, job_id).splitlines() == [f"-m gensr {call}" for call in calls]
