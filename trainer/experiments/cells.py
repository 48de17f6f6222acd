"""A cell: one run of a table, a sweep or the paper, made by `gensr train` and `gensr evaluate`, each in a
process of its own, so that a crash of one leaves the others alone. What they print goes to the cell's log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.errors import GensrError
from trainer.evaluation.summary import evaluation_name
from trainer.experiments.pool import Pool, Steps
from trainer.experiments.verbs import run_gensr
from trainer.runs.run_folder import RunFolder
from trainer.runtime.progress import Notify

SPLIT = "test"


@dataclass(frozen=True)
class Cell:
    """One run: a model's seed, trial, variant or point."""

    model: str
    name: str  # seed-0, trial-3, 03-lr-3e-4
    run_dir: Path
    settings_file: Path  # or a preset's name
    overrides: tuple[str, ...]  # KEY=VALUE on top of the file
    log: Path
    before: "Cell | None" = None  # the run that this one begins with (Ranker.stages)

    @property
    def title(self) -> str:
        return f"{self.model} {self.name}"

    @property
    def training_overrides(self) -> list[str]:
        """What `gensr train` is given behind the file."""
        begun = [f"run.init_from={self.before.run_dir}"] if self.before else []
        return [f"run.dir={self.run_dir}", *self.overrides, *begun]

    @property
    def runs(self) -> "list[Cell]":
        """The runs that make its model, in their order; the last one is its own."""
        return [*(self.before.runs if self.before else ()), self]


def trained_s(run_dir: Path) -> float:
    """Seconds; 0 for a run that has not begun."""
    return float(RunFolder(run_dir).read_progress().get("train_s", 0.0))


def is_evaluated(cell: Cell, candidates: str) -> bool:
    return RunFolder(cell.run_dir).is_evaluated(evaluation_name(SPLIT, candidates))


def is_done(cell: Cell, candidates: Sequence[str]) -> bool:
    """candidates: what it must be evaluated on; nothing for a trial."""
    return RunFolder(cell.run_dir).has_ended_well and all(is_evaluated(cell, kind) for kind in candidates)


def train_cell(cell: Cell) -> None:
    """Train, or go on where it was interrupted. Raises VerbFailed, and KeyboardInterrupt when stopped."""
    for run in cell.runs:
        if not RunFolder(run.run_dir).has_ended_well:
            command = ["train", str(run.settings_file), *run.training_overrides, "--resume", "auto"]
            run_gensr(command, run.log)


def evaluate_cell(cell: Cell, candidates: Sequence[str], events: int) -> None:
    for kind in candidates:
        if not is_evaluated(cell, kind):
            sample = ["--events", str(events)] if kind == "full" else []
            command = ["evaluate", str(cell.run_dir), "--split", SPLIT, "--candidates", kind, *sample]
            run_gensr([*command, "--no-baselines"], cell.log, mode="a")


# ---- many of them ------------------------------------------------------------------------------------------


def submit_cells(
    cells: Mapping[str, Cell],
    candidates: Sequence[str],
    events: int,
    steps: Steps,
    errors: dict[str, str],
    pool: Pool,
    place: int = 0,
) -> None:
    """Trains and evaluates the cells that are not done, as tasks of the pool. cells: by the name that is
    shown, under which a failure goes into `errors`; the others go on."""

    def make(name: str, cell: Cell) -> None:
        try:
            with steps.step(name):
                train_cell(cell)
                evaluate_cell(cell, candidates, events)
        except GensrError as error:
            errors[name] = f"{first_line(error)} ({cell.log})"
            steps.notify(f"  {name} failed: {errors[name]}")

    for name, cell in cells.items():
        if is_done(cell, candidates):
            steps.skip()
        else:
            pool.submit(partial(make, name, cell), place)


def run_cells(
    cells: Mapping[str, Cell], candidates: Sequence[str], events: int, jobs: int, notify: Notify
) -> dict[str, str]:
    """submit_cells() to a pool of their own → the failures, in the order of the cells."""
    failed: dict[str, str] = {}
    with Pool(jobs) as pool:
        submit_cells(cells, candidates, events, Steps(len(cells), notify, jobs), failed, pool)
        pool.wait()
    return {name: failed[name] for name in cells if name in failed}


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
