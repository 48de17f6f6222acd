"""The story of a table: plan, tune, train and evaluate cell by cell, read, write."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data_shards.settings import overrides_of
from trainer.errors import GensrError
from trainer.experiments.cells import Cell, first_line, is_done, submit_cells, train_cell
from trainer.experiments.pool import Pool, Steps, interruptible
from trainer.experiments.sweep import adopt_runs
from trainer.experiments.table.plan import Plan, Request, make_plan
from trainer.experiments.table.render import write_table
from trainer.experiments.table.results import read_results
from trainer.experiments.table.tuning import tune
from trainer.models.zoo import model_class
from trainer.runs.run_folder import RunFolder
from trainer.runtime.progress import Notify, silent

TRIAL_SEED = 0


def make_table(request: Request, notify: Notify = silent) -> dict[str, Any]:
    """TABLE/table.{json,md,csv,html} → the document. Can be repeated: what is done is not done again.

    A cell that fails stands in the document's `errors`; the others go on. Raises ConfigError for arguments
    that cannot be, KeyboardInterrupt when it is stopped: the same command goes on.
    """
    with interruptible():
        plan = make_plan(request)
        for line in plan.times.lines() if plan.times else ():
            notify(line)
        total = sum(request.trials_of(m) + len(request.seeds_of(m)) for m in plan.configs)
        steps = Steps(total, notify, request.jobs)
        with Pool(request.jobs) as pool:
            making = Making(plan, steps, pool)
            for place, model in enumerate(plan.configs):
                making.begin(model, place)
            pool.wait()
        notify("reading the runs")
        cells, errors = making.cells, making.errors
        document = read_results(plan, cells, errors)
        written = write_table(document, request.out)
        failed = any(row["errors"] for row in document["rows"])
        document["mlflow_run_id"] = _parent_run(plan, cells, written, failed)
    return document


class Making:
    """The table's tasks: a system is tuned, then its cells are made; systems do not wait for one another."""

    def __init__(self, plan: Plan, steps: Steps, pool: Pool) -> None:
        self.plan, self.steps, self.pool = plan, steps, pool
        self._cells: dict[str, list[Cell]] = {}
        self._failed: dict[str, str] = {}

    @property
    def cells(self) -> list[Cell]:
        """In the order of the plan, whatever ended first; so are errors."""
        return [cell for model in self.plan.configs for cell in self._cells.get(model, [])]

    @property
    def errors(self) -> dict[str, str]:
        titles = [*self.plan.configs, *(cell.title for cell in self.cells)]
        return {title: self._failed[title] for title in titles if title in self._failed}

    def begin(self, model: str, place: int) -> None:
        """place: of its tasks in the pool."""
        if self.plan.request.trials_of(model):
            self.pool.submit(partial(self._tune, model, place), place)
        else:
            self._make(model, place, {})

    def _tune(self, model: str, place: int) -> None:
        """Trial after trial, so that each knows what those before have shown, however many jobs there are."""
        try:
            tuned = _tuned(self.plan, model, self.steps)
        except GensrError as error:
            self._failed[model] = first_line(error)
            self.steps.skip(len(self.plan.request.seeds_of(model)))
            self.steps.notify(f"  {model} failed: {self._failed[model]}")
        else:
            self._make(model, place, tuned)

    def _make(self, model: str, place: int, tuned: Mapping[str, Any]) -> None:
        request = self.plan.request
        self._cells[model] = cells_of(request, model, tuned)
        named = {cell.title: cell for cell in self._cells[model]}
        submit_cells(named, request.candidates, request.events, self.steps, self._failed, self.pool, place)


def cells_of(request: Request, model: str, tuned: Mapping[str, Any]) -> list[Cell]:
    """One cell a seed. tuned: settings on top of the file's."""
    cells = []
    for seed in request.seeds_of(model):
        name = f"seed-{seed}"
        own = (f"tracking.run_name={model}-{name}", f"run.seed={seed}")  # a folder's name alone says no model
        cells.append(_cell(request, model, name, (*own, *overrides_of(tuned))))
    return cells


def _tuned(plan: Plan, model: str, steps: Steps) -> dict[str, Any]:
    request = plan.request
    num_run = 0

    def run_trial(number: int, overrides: tuple[str, ...]) -> float:
        nonlocal num_run
        num_run += 1
        # what a trial writes to MLflow would bury the cells
        own = (f"run.seed={TRIAL_SEED}", "tracking.enabled=false")
        cell = _cell(request, model, f"trial-{number}", (*own, *overrides))
        with steps.step(f"{cell.title}  {' '.join(overrides)}"):
            train_cell(cell)
        return float(RunFolder(cell.run_dir).read_progress()["best_value"])

    try:
        return tune(request.tuning_file(model), plan.configs[model], request.trials, run_trial)
    finally:
        steps.skip(max(0, request.trials - num_run))


def _cell(request: Request, model: str, name: str, overrides: tuple[str, ...]) -> Cell:
    """The run of the model's last stage, with those that it begins with."""
    *earlier, last = model_class(model).stages()
    before: Cell | None = None
    for number, of_stage in enumerate(earlier, start=1):
        # no cell of the table: MLflow has the last one
        own = (*overrides, *of_stage, "tracking.enabled=false")
        before = _run_of(request, model, f"{name}-stage-{number}", own, before)
    return _run_of(request, model, name, (*overrides, *last), before)


def _run_of(request: Request, model: str, name: str, overrides: tuple[str, ...], before: Cell | None) -> Cell:
    return Cell(
        model=model,
        name=name,
        run_dir=request.runs_of(model) / name,
        settings_file=request.settings_file(model),
        overrides=overrides,
        log=request.out / "logs" / f"{model}-{name}.log",
        before=before,
    )


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
