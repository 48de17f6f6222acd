"""`gensr submit`: a job for SLURM that is checked before it waits in a queue.

    preset and settings ─▶ dry run for nodes × GPUs ─▶ RUN/train.sbatch ─▶ sbatch
                                                       (the package's slurm/train.sbatch
                                                       with this run's words in it)

The script in the run folder is complete: `sbatch RUN/train.sbatch` continues the run. A sweep is one array of
such jobs, an array that evaluates each of them when it has ended well, and a job that writes the table when
all have ended.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import slurm
from trainer import __version__
from trainer.config import Config
from trainer.configs import load_config
from trainer.errors import ConfigError, EnvironmentProblem, RunError
from trainer.experiments.sweep import JOB_FILE, Point
from trainer.runs.checkpoint import check_settings
from trainer.runs.claim import holds_run, is_finished
from trainer.runs.launch_config import load_launch_config
from trainer.runs.run_folder import RunFolder
from trainer.runtime.files import SECRET_MODE, write_text
from trainer.runtime.launch import Launch, deepspeed_path
from trainer.training.plan import dry_run

SBATCH_S = 120  # a busy controller lets it wait
SITE_FILE = Path("slurm") / "env.sh"  # as the job scripts look for it
# of a sweep's other jobs, too
SHARED_OPTIONS = ("account", "partition", "qos", "reservation", "constraint", "clusters", "comment")

INVALID_ENDS = "--kill-on-invalid-dep=yes"


@dataclass(frozen=True)
class Machines:
    """What a job asks for. gpus_per_node=0 trains on CPU."""

    nodes: int = 1
    gpus_per_node: int = 1
    processes_per_node: int = 0  # 0 = one a GPU, or one on CPU
    deepspeed: str = "zero2.json"
    gpu_type: str = ""  # as sbatch names it, where a cluster has several

    @property
    def launch(self) -> Launch:
        """What accelerate will make of it. Raises ConfigError for an unknown DeepSpeed file."""
        per_node = self.processes_per_node or max(1, self.gpus_per_node)
        return Launch(
            world_size=self.nodes * per_node,
            local_world_size=per_node,
            launched=True,
            deepspeed_file=str(deepspeed_path(self.deepspeed)),
        )

    @property
    def options(self) -> dict[str, str]:
        return {"nodes": str(self.nodes), **self.gpus(self.gpus_per_node)}

    def gpus(self, number: int) -> dict[str, str]:
        """The option for so many on a node; none for a job on CPU."""
        kind = f"{self.gpu_type}:" if self.gpu_type else ""
        return {"gpus-per-node": f"{kind}{number}"} if self.gpus_per_node else {}

    @property
    def exports(self) -> dict[str, str]:
        values = {"GENSR_DEEPSPEED": self.deepspeed}
        if not self.gpus_per_node:
            values["GENSR_CPU"] = "1"
        if self.processes_per_node:
            values["GENSR_PROCESSES_PER_NODE"] = str(self.processes_per_node)
        return values


@dataclass(frozen=True)
class Job:
    """A script and where it goes. `after` is a dependency with {0}, {1}, … for the ids of the jobs submitted
    before it."""

    path: Path
    text: str
    after: str = ""
    flags: tuple[str, ...] = ()

    def command(self, ids: Sequence[str]) -> list[str]:
        dependency = [f"--dependency={self.after.format(*ids)}"] if self.after else []
        return ["sbatch", "--parsable", *dependency, *self.flags, str(self.path)]


@dataclass(frozen=True)
class Submission:
    """Jobs in the order of their submission, and what the dry run said about the first."""

    jobs: list[Job]
    plan_lines: list[str]
    run_dirs: list[Path] = field(default_factory=list)


# ---- what is submitted -------------------------------------------------------------------------------------


def plan_run(
    preset: str, overrides: Sequence[str], machines: Machines, options: Sequence[str], command: str
) -> Submission:
    """One training run. Raises a GensrError for whatever would end it at its start, or when its folder cannot
    take it."""
    config, lines = checked(preset, overrides, machines)
    folder = Path(config.run.dir)
    # the script looks for run.dir among its arguments; a file may have set it (runs/mine/config.yaml)
    own = [] if any(word.startswith("run.dir=") for word in overrides) else [f"run.dir={folder}"]
    asked = {**machines.options, "output": _output(folder)}
    text = job_script("train", [[preset, *overrides, *own]], asked, machines, command, options)
    return Submission([Job(folder / "train.sbatch", text)], lines, [folder])


def plan_sweep(
    preset: str,
    overrides: Sequence[str],
    points: Sequence[Point],
    machines: Machines,
    options: Sequence[str],
    command: str,
    parallel: int = 0,
) -> Submission:
    """One run for each point, in folders below run.dir, then their evaluation and the table. parallel: runs
    at once, 0 = all."""
    folder = Path(load_config(preset, list(overrides)).run.dir)
    of_all = [word for word in overrides if not word.startswith("run.dir=")]
    run_dirs = [folder / point.name for point in points]
    lines: list[str] = []
    words = []
    for point, run_dir in zip(points, run_dirs, strict=True):
        of_run = [*of_all, *point.overrides, f"run.dir={run_dir}"]
        lines = checked(preset, of_run, machines)[1]
        words.append([preset, *of_run])
    array = {"array": f"0-{len(points) - 1}" + (f"%{parallel}" if parallel else "")}
    shared = [option for option in options if _name(option) in SHARED_OPTIONS]
    train = {**machines.options, **array, "output": _output(folder, "%x-%A_%a")}
    evaluate = {**machines.gpus(1), **array, "output": _output(folder, "%x-%A_%a")}
    runs = [[str(run_dir)] for run_dir in run_dirs]
    summary = {"output": _output(folder)}
    jobs = [
        Job(folder / "train.sbatch", job_script("train", words, train, machines, command, options)),
        # each run is evaluated once it has ended well; where it has not, its evaluation is cancelled instead
        # of waiting for ever
        Job(
            folder / "evaluate.sbatch",
            job_script("evaluate", runs, evaluate, machines, command, shared),
            "aftercorr:{0}",
            (INVALID_ENDS,),
        ),
        Job(
            folder / "sweep.sbatch",
            job_script("sweep", [[str(folder)]], summary, machines, command, shared),
            "afterany:{0}:{1}",
        ),
    ]
    return Submission(jobs, [f"{len(points)} runs; the last of them:", *lines], run_dirs)


def checked(preset: str, overrides: Sequence[str], machines: Machines) -> tuple[Config, list[str]]:
    """The configuration, and the dry run's lines. Raises a GensrError for whatever would end the run at its
    start."""
    config = load_launch_config(preset, list(overrides), machines.launch.world_size, resume=True)
    if not config.data.dir or not config.run.dir:
        raise ConfigError(
            "data.dir=OUT and run.dir=RUN must be given: the prepared folder to learn from and the run "
            "folder to write"
        )
    lines = dry_run(config, launch=machines.launch).lines
    check_folder(config)
    return config, lines


def check_folder(config: Config) -> None:
    """Raises RunError when run.dir holds another run, a finished one, or one whose job is still there."""
    folder = Path(config.run.dir)
    if holds_run(folder):
        check_settings(RunFolder(folder).read_config(), config, RunFolder(folder).config)
        if is_finished(folder, config):
            raise RunError(f"{folder} holds a run that has finished. Choose another run.dir.")
    if state := job_state(folder):
        raise RunError(
            f"{folder} has a job already: {state}. Wait for it, or end it with scancel; then submit again to "
            "continue."
        )


def job_state(folder: Path) -> str:
    """`12 is RUNNING` for the job that was submitted for a run folder; "" when there is none in the queue."""
    try:
        job_id = str(json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))["job_id"])
        done = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job_id}", "--format=%T"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired):
        return ""
    states = sorted(set(done.stdout.split()))
    return f"{job_id} is {', '.join(states)}" if states and done.returncode == 0 else ""


# ---- the script --------------------------------------------------------------------------------------------


def job_script(
    verb: str,
    words_of_tasks: Sequence[Sequence[str]],
    own: dict[str, str],
    machines: Machines,
    command: str,
    options: Sequence[str] = (),
) -> str:
    """The package's script of a verb with its options and arguments filled in; several lists of arguments are
    those of an array's tasks.

    Options: the script's own, `own`, and the user's `--name=value` words on top.
    """
    lines = slurm.script(f"{verb}.sbatch").splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    body = lines[max(number for number, line in enumerate(lines) if line.startswith("#SBATCH ")) + 1 :]
    merged = {_name(option): option for option in directives}
    merged |= {key: f"--{key}={value}" for key, value in {**own, "chdir": os.getcwd()}.items()}
    merged |= {_name(option): option for option in options}
    environment = {**machines.exports, **_site()}
    words = [word for words in words_of_tasks for word in words]
    _refuse_control_characters([command, *merged.values(), *environment.values(), *words])
    head = [
        "#!/usr/bin/env bash",
        f"# Written by gensr {__version__}: {command}",
        "# Complete as it is: sbatch of this file continues what it began.",
        *(f"#SBATCH {shlex.quote(option)}" for option in merged.values()),
        "",
        *(f"export {key}={shlex.quote(value)}" for key, value in environment.items()),
        *_arguments(words_of_tasks),
    ]
    return "\n".join([*head, *body]) + "\n"


def _refuse_control_characters(texts: Sequence[str]) -> None:
    """A line break in a comment or in an #SBATCH line would begin a line of the script → ConfigError."""
    for text in texts:
        if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text):
            raise ConfigError(
                f"{text!r} has a line break or another control character in it, which a job script cannot "
                "take. Remove it"
            )


def _name(option: str) -> str:
    return option.removeprefix("--").partition("=")[0]


def _output(folder: Path, name: str = "%x-%j") -> str:
    return f"{str(folder.resolve()).replace('%', '%%')}/{name}.out"


def _site() -> dict[str, str]:
    """Where the job finds Python: the site's settings, else the environment of this program."""
    if named := os.environ.get("GENSR_ENV"):
        return {"GENSR_ENV": str(Path(named).resolve())}
    return (
        {} if SITE_FILE.is_file() else {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    )


def _arguments(words_of_tasks: Sequence[Sequence[str]]) -> list[str]:
    if len(words_of_tasks) == 1:
        return [f"set -- {shlex.join(words_of_tasks[0])}"]
    cases = [f"  {number}) set -- {shlex.join(words)} ;;" for number, words in enumerate(words_of_tasks)]
    return ["case ${SLURM_ARRAY_TASK_ID:-} in", *cases, "esac"]


def read_gpus(text: str) -> tuple[str, int]:
    """`8` or `a100:8` → (type or "", number a node). Raises ConfigError for anything else."""
    found = re.fullmatch(r"(?:([A-Za-z0-9_.-]+):)?([0-9]{1,4})", text)
    if not found:
        raise ConfigError(f"--gpus-per-node {text}: give a number, or TYPE:NUMBER, such as 8 or a100:8")
    return found[1] or "", int(found[2])


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--name=value` words are sbatch's, `key=value` words are settings. Raises ConfigError for anything
    else."""
    options = [word for word in words if word.startswith("-")]
    settings = [word for word in words if not word.startswith("-")]
    wrong = [word for word in options if not re.fullmatch(r"--[a-z][a-z0-9-]*(=.+)?", word, flags=re.DOTALL)]
    wrong += [word for word in settings if "=" not in word]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: options of sbatch are written --name=value (for example --account=MINE), "
            "settings key=value"
        )
    if gpus := [word for word in options if re.match(r"--(gpus|gres=gpu)", word)]:
        raise ConfigError(
            f"{gpus[0]}: GPUs are given by --gpus-per-node NUMBER, or TYPE:NUMBER, such as a100:8"
        )
    return options, settings


# ---- submitting --------------------------------------------------------------------------------------------


def submit(submission: Submission) -> list[str]:
    """Write the scripts and submit them; returns the jobs' ids. Raises EnvironmentProblem without sbatch, or
    when it refuses."""
    if shutil.which("sbatch") is None:
        raise EnvironmentProblem(
            "sbatch is not on the PATH: submit from a login node of the cluster (module load slurm?). "
            "--print shows the script."
        )
    ids: list[str] = []
    for job in submission.jobs:
        write_text(job.path, job.text, SECRET_MODE)  # the settings of a run: URLs may hold passwords
        waiting = f" Jobs {', '.join(ids)} were submitted before it." if ids else ""
        try:
            done = subprocess.run(
                job.command(ids), capture_output=True, text=True, timeout=SBATCH_S, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired as error:
            raise EnvironmentProblem(
                f"sbatch {job.path}: no answer within {SBATCH_S} s. Look with squeue --me whether the job is "
                f"there before you submit again.{waiting}"
            ) from error
        if done.returncode:
            raise EnvironmentProblem(f"sbatch refuses {job.path}: {done.stderr.strip()}{waiting}")
        ids.append(done.stdout.strip().split(";")[0])
    for number, folder in enumerate(submission.run_dirs):
        job_id = ids[0] if len(submission.jobs) == 1 else f"{ids[0]}_{number}"
        write_text(folder / JOB_FILE, json.dumps({"job_id": job_id}) + "\n")
    return ids
