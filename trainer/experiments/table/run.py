"""The story of a table: plan, tune, train and evaluate cell by cell, read, write."""

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from trainer.errors import GensrError
from trainer.experiments.sweep import adopt_runs
from trainer.experiments.table.cells import Cell, evaluate_cell, is_done, train_cell
from trainer.experiments.table.plan import Plan, Request, make_plan
from trainer.experiments.table.render import write_table
from trainer.experiments.table.results import read_results
from trainer.experiments.table.tuning import tune, words_of
from trainer.runs.run_folder import RunFolder
from trainer.runtime.progress import Notify, clock

TRIAL_SEED = 0


class Steps:
    """Counts trials and cells and tells how long the rest will take: as long as those of this call did."""

    def __init__(self, total: int, notify: Notify) -> None:
        self.total, self.notify = total, notify
        self.number = self.num_run = 0
        self.seconds = 0.0

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        left = self.total - self.number
        eta = f"   {clock(self.seconds / self.num_run * left)} left" if self.num_run else ""
        self.number += 1
        self.notify(f"[{self.number}/{self.total}] {title}{eta}")
        started = time.monotonic()
        try:
            yield
        finally:
            self.num_run += 1
            self.seconds += time.monotonic() - started

    def skip(self, number: int = 1) -> None:
        self.number += number


def make_table(request: Request, notify: Notify = lambda line: None) -> dict[str, Any]:
    """OUT/table.{json,md,csv,html} → the document. Can be repeated: what is done is not done again.

    A cell that fails stands in the document's `errors`; the others go on. Raises ConfigError for arguments
    that cannot be, KeyboardInterrupt when it is stopped: the same command goes on.
    """
    with sigterm_as_interrupt():
        plan = make_plan(request)
        for line in plan.times.lines() if plan.times else ():
            notify(line)
        total = sum(request.trials_of(m) + len(request.seeds_of(m)) for m in plan.configs)
        steps = Steps(total, notify)
        errors: dict[str, str] = {}
        cells: list[Cell] = []
        for model in plan.configs:
            cells += _model(plan, model, steps, errors)
        notify("reading the runs")
        document = read_results(plan, cells, errors)
        written = write_table(document, request.out)
        document["mlflow_run_id"] = _parent_run(plan, cells, written, bool(errors))
    return document


def _model(plan: Plan, model: str, steps: Steps, errors: dict[str, str]) -> list[Cell]:
    """Tunes one system and makes its cells → those; what failed goes into `errors`."""
    request = plan.request
    tuned: dict[str, Any] = {}
    if request.trials_of(model):
        try:
            tuned = _tuned(plan, model, steps)
        except GensrError as error:
            errors[model] = first_line(error)
            steps.skip(len(request.seeds_of(model)))
            steps.notify(f"  {model} failed: {errors[model]}")
            return []
    cells = cells_of(request, model, tuned)
    run_cells({cell.title: cell for cell in cells}, request.candidates, request.events, steps, errors)
    return cells


def run_cells(
    cells: Mapping[str, Cell], candidates: Sequence[str], events: int, steps: Steps, errors: dict[str, str]
) -> None:
    """Trains and evaluates the cells that are not done. cells: by the name that is shown, under which a
    failure goes into `errors`; the others go on."""
    for name, cell in cells.items():
        if is_done(cell, candidates):
            steps.skip()
            continue
        try:
            with steps.step(name):
                train_cell(cell)
                evaluate_cell(cell, candidates, events)
        except GensrError as error:
            errors[name] = f"{first_line(error)} ({cell.log})"
            steps.notify(f"  {name} failed: {errors[name]}")


def cells_of(request: Request, model: str, tuned: Mapping[str, Any]) -> list[Cell]:
    """One cell a seed. tuned: settings on top of the file's."""
    cells = []
    for seed in request.seeds_of(model):
        name = f"seed-{seed}"
        own = (f"tracking.run_name={model}-{name}", f"run.seed={seed}")  # a folder's name alone says no model
        cells.append(_cell(request, model, name, (*own, *words_of(tuned))))
    return cells


def _tuned(plan: Plan, model: str, steps: Steps) -> dict[str, Any]:
    request = plan.request
    before = steps.number

    def run_trial(number: int, words: tuple[str, ...]) -> float:
        # what a trial writes to MLflow would bury the cells
        own = (f"run.seed={TRIAL_SEED}", "tracking.enabled=false")
        cell = _cell(request, model, f"trial-{number}", (*own, *words))
        with steps.step(f"{cell.title}  {' '.join(words)}"):
            train_cell(cell)
        return float(RunFolder(cell.run_dir).read_status()["progress"]["best_value"])

    try:
        return tune(request.tuning_file(model), plan.configs[model], request.trials, run_trial)
    finally:
        steps.number = before + request.trials


def _cell(request: Request, model: str, name: str, words: tuple[str, ...]) -> Cell:
    return Cell(
        model=model,
        name=name,
        run_dir=request.runs_of(model) / name,
        settings_file=request.settings_file(model),
        words=words,
        log=request.out / "logs" / f"{model}-{name}.log",
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _parent_run(plan: Plan, cells: list[Cell], files: list[Path], failed: bool) -> str:
    configs = {
        cell.run_dir: plan.configs[cell.model] for cell in cells if is_done(cell, plan.request.candidates)
    }
    return adopt_runs(
        plan.request.out,
        configs,
        files,
        tags={"table": str(plan.request.out)},
        finished=not failed,
        again="the same command",
    )


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """A scheduler's SIGTERM ends the table as Ctrl-C does: the cell in progress saves first."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
