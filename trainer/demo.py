"""`gensr demo`: the main job from end to end, offline, as one resumable sequence of the ordinary verbs.
Finished steps are skipped."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from trainer.errors import RunError
from trainer.evaluation.summary import (
    SHOWN_METRICS,
    TASK_TITLES,
    cell,
    protocol_line,
    read_evaluation,
    rows_of,
    title_of,
)
from trainer.runs.run_folder import RunFolder
from trainer.runtime.progress import clear_bar, show_stages

# of the planted world: small enough for ten minutes on two cores
USERS, ITEMS, DAYS, SEED = 1000, 4000, 14, 1
# as for KuaiSAR: its filter, and days of Beijing
PREPARE: tuple[str, ...] = ("min_interactions=5", "both_behaviours=true", "utc_offset_hours=8")
# fewer folds and less patience than the defaults: a minute less
CF: tuple[str, ...] = ("cf.num_folds=2", "cf.patience=2")
PRESET = "demo"
MODEL_NAME = "gensr-demo"
TABLE_WIDTH = 120  # columns; a narrower terminal is shown the metrics at 10 only
STOP_S = 120.0  # a stopped training run saves a checkpoint first


@dataclass(frozen=True)
class Step:
    name: str
    is_done: Callable[[], bool]
    run: Callable[[], None]


@dataclass(frozen=True)
class Demo:
    """Where the demo's files are, and its steps."""

    data_dir: Path
    run_dir: Path
    train_overrides: tuple[str, ...] = ()

    @property
    def raw_dir(self) -> Path:
        return self.data_dir.with_name(f"{self.data_dir.name}-raw")

    def steps(self) -> list[Step]:
        run_dir, data_dir = self.run_dir, self.data_dir
        evaluation, registered = RunFolder(run_dir).evaluation("test"), RunFolder(run_dir).registry
        return [
            Step("simulate", (self.raw_dir / "simulated.json").is_file, self.simulate),
            Step("prepare", (data_dir / "manifest.json").is_file, self.prepare),
            Step("optimum", self.has_optimum, self.optimum),
            Step("cf", (data_dir / "cf" / "lightgcn.safetensors").is_file, self.cf),
            Step("train", self.is_trained, self.train),
            Step(
                "evaluate",
                lambda: is_newer(evaluation, RunFolder(run_dir).model / "model.json"),
                self.evaluate,
            ),
            Step("register", lambda: is_newer(registered, evaluation), self.register),
        ]

    def simulate(self) -> None:
        from data_shards.simulate import simulate

        sizes = {"users": USERS, "items": ITEMS, "days": DAYS, "seed": SEED}
        simulate(self.raw_dir, **sizes, text="natural", progress=show_stages())

    def prepare(self) -> None:
        from data_shards.prepare import prepare

        prepare("tables", self.raw_dir, self.data_dir, PREPARE, progress=show_stages())

    def has_optimum(self) -> bool:
        from data_shards.simulate.oracle import OPTIMUM_FILE

        return is_newer(self.data_dir / OPTIMUM_FILE, self.data_dir / "manifest.json")

    def optimum(self) -> None:
        from trainer.data.folder import PreparedFolder
        from trainer.evaluation.optimum import write_optimum

        write_optimum(PreparedFolder.at(self.data_dir), self.raw_dir)

    def cf(self) -> None:
        from trainer.cf.build import train_cf

        train_cf(self.data_dir, CF, progress=lambda line: say(f"  {line}"))

    def is_trained(self) -> bool:
        return RunFolder(self.run_dir).has_ended_well

    def train(self) -> None:
        overrides = [f"data.dir={self.data_dir}", f"run.dir={self.run_dir}", *self.train_overrides]
        processes, device_overrides = devices(PRESET, overrides)
        launch(processes, ["train", PRESET, *overrides, *device_overrides, "--resume", "auto"])

    def evaluate(self) -> None:
        processes, _ = devices(PRESET, self.train_overrides)
        launch(processes, ["evaluate", str(self.run_dir)], quiet=True)

    def register(self) -> None:
        from trainer.data.folder import PreparedFolder
        from trainer.registry.signature import example_requests
        from trainer.registry.versions import register
        from trainer.runtime.files import write_text

        register(self.run_dir, MODEL_NAME)
        lines = [json.dumps(request) for request in example_requests(PreparedFolder.at(self.data_dir))]
        write_text(self.run_dir / "requests.jsonl", "\n".join(lines) + "\n")


def run_demo(
    data_dir: str | Path = "data/demo", run_dir: str | Path = "runs/demo", train_overrides: Sequence[str] = ()
) -> None:
    """simulate → prepare → optimum → cf → train → evaluate → register, then one screen of results. Call it
    again after an interruption.

    Raises the GensrError of the step that fails; what the steps before it made stays.
    """
    demo = Demo(Path(data_dir), Path(run_dir), tuple(train_overrides))
    started = time.monotonic()
    steps = demo.steps()
    for number, step in enumerate(steps, start=1):
        head = f"[{number}/{len(steps)}] {step.name}"
        if step.is_done():
            say(f"{head}: done before")
            continue
        say(head)
        step_started = time.monotonic()
        step.run()
        say(f"{head}: {time.monotonic() - step_started:.0f} s")
    show_summary(demo, time.monotonic() - started)


def say(line: str) -> None:
    clear_bar()
    console().print(line, markup=False, highlight=False)


def console() -> Console:
    return Console(soft_wrap=True)


def is_newer(path: Path, than: Path) -> bool:
    """`path` exists and was written after `than`."""
    return path.is_file() and than.is_file() and path.stat().st_mtime >= than.stat().st_mtime


# ---- processes ---------------------------------------------------------------------------------------------


def devices(preset: str, overrides: Sequence[str]) -> tuple[int, list[str]]:
    """→ (processes, settings that follow from them). Two processes on CPU; on GPUs one each, in bf16, as many
    as divide the global batch."""
    import torch

    from trainer.configs import load_config
    from trainer.runtime.device import forced_cpu

    optim = load_config(preset, list(overrides)).optim
    gpus = 0 if forced_cpu() else torch.cuda.device_count()
    processes = max((n for n in range(1, gpus + 1) if optim.global_batch_size % n == 0), default=2)
    micro_batch = min(optim.micro_batch_size, optim.global_batch_size // processes)
    return processes, [f"optim.micro_batch_size={micro_batch}", *(["run.precision=bf16"] if gpus else [])]


def launch(processes: int, arguments: Sequence[str], quiet: bool = False) -> None:
    """`accelerate launch … -m gensr ARGUMENTS`, with DeepSpeed ZeRO-2. Ctrl-C reaches the processes, which
    save and end by themselves.

    `quiet` leaves out the answer on stdout, not the progress on stderr. Raises RunError when they fail; their
    messages are on the terminal by then.
    """
    import ds_configs
    from trainer.runtime.device import has_gpu
    from trainer.runtime.launch import num_cores

    on_cpu = not has_gpu()
    config_file = ds_configs.path("accelerate_cpu_2.yaml" if on_cpu else "accelerate_gpu_8.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file)]
    command += [
        "--num_processes",
        str(processes),
        "--main_process_port",
        str(free_port()),
        "-m",
        "gensr",
        *arguments,
    ]
    environment = dict(os.environ)
    # else the launcher warns and takes 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // processes)))
    # torch's and DeepSpeed's, about each other
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    if on_cpu:
        environment["DS_ACCELERATOR"] = "cpu"
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL if quiet else None, env=environment
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait(timeout=STOP_S)
        raise
    if code:
        raise RunError(
            f"`gensr {' '.join(arguments)}` on {processes} processes ended with exit code {code}; see above. "
            "gensr demo resumes from there."
        )


def free_port() -> int:
    """One of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- the last screen ---------------------------------------------------------------------------------------


def show_summary(demo: Demo, seconds: float) -> None:
    from trainer.data.folder import PreparedFolder
    from trainer.evaluation.optimum import TITLE as OPTIMUM
    from trainer.evaluation.optimum import read_optimum

    evaluation = read_evaluation(demo.run_dir)
    registered = json.loads(RunFolder(demo.run_dir).registry.read_text(encoding="utf-8"))
    grid = Table(title=protocol_line(evaluation), title_justify="left", title_style="dim", box=box.SIMPLE)
    grid.add_column("", no_wrap=True)
    terminal = Console()
    narrow = terminal.is_terminal and terminal.width < TABLE_WIDTH
    metrics = [metric for metric in SHOWN_METRICS if not narrow or metric.endswith("@10")]
    for metric in metrics:
        grid.add_column(metric, no_wrap=True)
    optimum = read_optimum(PreparedFolder.at(demo.data_dir))
    rows = [*rows_of(evaluation), *rows_of(optimum, OPTIMUM)]
    for task, title in TASK_TITLES.items():
        of_task = [row for row in rows if row.task == task]
        if of_task:
            grid.add_section()
            grid.add_row(f"{title}, {of_task[0].metrics['num_events']:,} events", style="bold")
            for row in of_task:
                grid.add_row(
                    f"  {row.model}",
                    *(cell(row.metrics, metric) for metric in metrics),
                    style="green" if row.model == title_of(evaluation) else "",
                )
    (terminal if narrow else Console(width=TABLE_WIDTH)).print(grid)
    for line in where_and_next(demo, registered):
        say(line)
    say(f"\ngensr demo: {seconds / 60:.1f} minutes")


def where_and_next(demo: Demo, registered: dict[str, object]) -> list[str]:
    from trainer.registry.store import uri_option
    from trainer.tracking.store import read_experiment_id, training_page

    run_dir, data_dir = demo.run_dir, demo.data_dir
    mlflow, gensr = program("mlflow"), program("gensr")
    model = f"models:/{registered['name']}@{registered['alias']}"
    of_registry = uri_option(str(registered["uri"]))
    user, query = a_search(data_dir)
    return [
        f"run folder   {run_dir}",
        f"plots        {run_dir / 'report'}",
        f"registered   models:/{registered['name']}/{registered['version']}, also {model}",
        f"MLflow page  {mlflow} ui --backend-store-uri {registered['uri']} --port 5000, then",
        f"             {training_page(str(registered['uri']), read_experiment_id(run_dir))}",
        "",
        "Next",
        f"  {gensr} search {model} --query {shlex.quote(query)} --user {user}{of_registry}",
        f"  {gensr} recommend {model} --user {user} -k 10{of_registry}",
        f"  {gensr} score {model} {run_dir / 'requests.jsonl'}{of_registry}",
        f"  {gensr} ui {run_dir}",
        f"  {gensr} inspect {data_dir}",
        f"  {gensr} train {PRESET} data.dir={data_dir} run.dir={run_dir.with_name('paper')} "
        "model.variant=paper",
        f"  {gensr} config keys train",
    ]


def a_search(data_dir: Path) -> tuple[object, str]:
    """→ (original id of a user, text of a query): of the test split's first search."""
    from data_shards.schema import SRC
    from trainer.data.folder import PreparedFolder

    folder = PreparedFolder.at(data_dir)
    events = folder.columns("test", ["event_id", "task", "user", "query"])
    searches = np.flatnonzero(events["task"] == SRC)
    first = searches[events["event_id"][searches].argmin()]
    return folder.user_ids()[events["user"][first]], folder.query_texts()[events["query"][first]]


def program(name: str) -> str:
    """How to call a program of this environment: its bare name where PATH finds it, else its path."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not beside.is_file() or (found and Path(found).samefile(beside)):
        return name
    try:
        return str(beside.relative_to(Path.cwd()))
    except ValueError:
        return str(beside)
