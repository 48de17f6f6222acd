"""`gensr sweep FILE`: a sweep on this machine, one run after the other, or --jobs at once. FILE:

    preset: demo                                   # or a YAML file
    settings: {data.dir: data/mine, run.dir: runs/sweep, run.max_steps: 200}     # of every run
    search: tpe                                    # grid, random or tpe (Bergstra et al. 2011)
    trials: 12                                     # of random and tpe
    space:
      optim.lr: {low: 1.0e-4, high: 3.0e-3, log: true}
      model.dropout: [0.0, 0.1, 0.2]

or a list of settings, the file of `gensr submit --sweep` (experiments/sweep.py), with PRESET and the settings
of every run on the command line. The objective is the best value of run.select_metric on validation. Each run
has a folder below run.dir; the same command again runs what is missing, and what has failed.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from annotated_types import Ge, Gt
from pydantic import Field

from data_shards import settings as s
from data_shards.errors import DataError
from data_shards.schema import read_manifest
from data_shards.settings import changes, flatten, overrides_of, parse_yaml, to_dict
from trainer.config import Config
from trainer.configs import MICRO_BATCH, load_config
from trainer.errors import ConfigError, GensrError, RunError
from trainer.experiments.cells import Cell, evaluate_cell, train_cell
from trainer.experiments.pool import Pool, Steps, interruptible
from trainer.experiments.search import Sampler, begun, search
from trainer.experiments.sweep import Point, point_of, read_document, read_sweep, summarize
from trainer.runs.checkpoint import fixed_settings
from trainer.runs.run_folder import RunFolder, read_json
from trainer.runtime.progress import Notify, silent

JOURNAL = "sweep.journal"
MAX_GRID = 10_000


@s.settings
class SweepSettings:
    preset: str
    """a preset's name, or a YAML file"""
    space: dict[str, Any]
    """key → list of choices, or {low, high, log}"""
    settings: dict[str, Any] = Field(default_factory=dict)
    """of every run"""
    search: Literal["grid", "random", "tpe"] = "grid"
    """every combination of the choices; settings drawn at random; or by what the runs before have shown"""
    trials: Annotated[int, Gt(0)] = 12
    """runs of search=random and tpe"""
    seed: Annotated[int, Ge(0)] = 0
    """of the search"""


@dataclass(frozen=True)
class Sweep:
    """What FILE and the command line say, checked."""

    folder: Path
    preset: str
    model: str
    overrides: tuple[str, ...]  # of every run
    points: tuple[Point, ...]  # of a list or a grid
    drawn: SweepSettings | None  # random, tpe

    @property
    def num_runs(self) -> int:
        return self.drawn.trials if self.drawn is not None else len(self.points)

    @property
    def journal(self) -> Path:
        return self.folder / JOURNAL


def read(file: str | Path, preset: str | None = None, overrides: Sequence[str] = ()) -> Sweep:
    """Raises ConfigError for whatever would stop a run at its start."""
    drawn: SweepSettings | None = None
    points: tuple[Point, ...] = ()
    if isinstance(read_document(file), list):
        if preset is None:
            raise ConfigError(f"{file} is a list of runs and needs a preset: gensr sweep {file} PRESET")
        points = tuple(read_sweep(file))
    else:
        given = s.load(SweepSettings, file, keys_command="gensr sweep --help")
        preset = preset or given.preset
        overrides = [*overrides_of(given.settings), *overrides]
        values = flatten(to_dict(load_config(preset, overrides)))
        space = {key: _as_numbers(domain, values.get(key)) for key, domain in given.space.items()}
        given = replace(given, space=space)
        _check_space(file, given, values)
        if given.search == "grid":
            points = _grid(file, given.space)
        else:
            drawn = given
    probe = points[0].overrides if points else tuple(overrides_of(_some(drawn.space))) if drawn else ()
    config = load_config(preset, [*overrides, *probe])
    needed = {"data.dir": config.data.dir, "run.dir": config.run.dir}
    if missing := " and ".join(f"{key}=…" for key, value in needed.items() if not value):
        raise ConfigError(f"{file}: {missing} must be given, under settings or on the command line")
    for point in points:
        load_config(preset, [*overrides, *point.overrides])
    every = tuple(word for word in overrides if not word.startswith("run.dir="))
    return Sweep(Path(config.run.dir), preset, config.model.name, every, points, drawn)


def run(sweep: Sweep, evaluate: str = "best", notify: Notify = silent, jobs: int = 1) -> dict[str, Any]:
    """Train every run, `jobs` at once, evaluate (none, best or all of them) and summarize → as
    experiments/sweep.py's summarize. A run that fails is named; the others continue. Raises ConfigError for
    too many jobs and for a folder that was begun with other settings, RunError when all failed,
    KeyboardInterrupt when it is stopped: what is done stays."""
    with interruptible(), Pool(jobs) as pool:
        _check_begun(sweep)
        failed = _train(sweep, Steps(sweep.num_runs, notify, jobs), pool)
        if len(failed) >= sweep.num_runs:
            if sweep.drawn is not None:  # a sampler has learned nothing from them
                sweep.journal.unlink()
            raise RunError(f"all {sweep.num_runs} runs failed; the last: {failed[-1]}")
        names = [point.name for point in _points(sweep)]
        ranking = [row for row in summarize(sweep.folder, names)["runs"] if row["status"] == "finished"]
        evaluations = []
        for row in ranking if evaluate == "all" else ranking[:1] if evaluate == "best" else []:
            notify(f"evaluating {row['run']}")
            cell = _cell(sweep, Point(row["run"], ()))
            evaluations.append(pool.submit(partial(evaluate_cell, cell, ["sampled"], 0)))
        for evaluation in evaluations:
            evaluation.result()
    return summarize(sweep.folder, names)


def _points(sweep: Sweep, failed: bool = False) -> list[Point]:
    """Its runs, as far as they are drawn; failed: only those that have failed."""
    if (drawn := sweep.drawn) is None:
        return list(sweep.points)
    trials = begun(sweep.journal, drawn.space, cast(Sampler, drawn.search), drawn.seed)
    return [
        _point(trial.number, trial.overrides)
        for trial in trials
        if trial.number < drawn.trials and (trial.failed or not failed)
    ]


def _point(number: int, overrides: Sequence[str]) -> Point:
    pairs = (override.partition("=")[::2] for override in overrides)
    return point_of(number, {key: parse_yaml(text) if text else "" for key, text in pairs})


def _check_begun(sweep: Sweep) -> None:
    """A finished run of other settings or data would stand in the ranking as one of these."""
    for point in _points(sweep):
        run = RunFolder(sweep.folder / point.name)
        if not run.has_ended_well:
            continue
        now = load_config(sweep.preset, [*sweep.overrides, *point.overrides])
        before = run.read_config()
        old, new = fixed_settings(before), fixed_settings(now)
        old["data"], new["data"] = _data_of(run, before, now)
        # the micro-batch follows the number of processes
        if found := changes(old, new, ignore={MICRO_BATCH}):
            raise ConfigError(
                f"{run.path} was trained with other settings: {'; '.join(map(str, found))}. "
                "Give the same ones, or choose another run.dir"
            )


def _data_of(run: RunFolder, before: Config, now: Config) -> tuple[str, str]:
    """The hash of the prepared folder that a run was trained on, and of the one that is asked for: a folder
    may move. Their places where one of them is not known."""
    then = read_json(run.model / "model.json").get("manifest_hash")
    with contextlib.suppress(DataError):
        if then:
            return str(then), read_manifest(now.data.dir).hash
    return os.path.abspath(before.data.dir), os.path.abspath(now.data.dir)


def _train(sweep: Sweep, steps: Steps, pool: Pool) -> list[str]:
    """Every run → errors of those that failed, in their order."""

    def train(point: Point) -> float:
        cell = _cell(sweep, point)
        if RunFolder(cell.run_dir).has_ended_well:
            steps.skip()
            steps.notify(f"[{steps.number}/{steps.total}] {point.name}: done before")
        else:
            try:
                with steps.step(point.name):
                    train_cell(cell)
            except GensrError as error:
                steps.notify(f"  {point.name} failed: {error}")
                raise
        value = float(RunFolder(cell.run_dir).read_progress()["best_value"])
        steps.notify(f"  {point.name}: {value:.4f}")
        return value

    def start(task: Callable[[], float]) -> Callable[[], float]:
        return pool.submit(task).result

    drawn, failed = sweep.drawn, []
    # the sampler remembers a drawn run as failed, so that what it draws next is what it would have drawn
    for waiting in [start(partial(train, point)) for point in _points(sweep, failed=True)]:
        try:
            waiting()
        except GensrError as error:
            failed.append(str(error))
    if drawn is not None:
        failed += search(
            sweep.journal,
            drawn.space,
            drawn.trials,
            lambda number, overrides: train(_point(number, overrides)),
            sampler=cast(Sampler, drawn.search),
            seed=drawn.seed,
            jobs=pool.jobs,
            start=start,
        )
    return failed


def _cell(sweep: Sweep, point: Point) -> Cell:
    return Cell(
        model=sweep.model,
        name=point.name,
        run_dir=sweep.folder / point.name,
        settings_file=Path(sweep.preset),
        overrides=(*sweep.overrides, *point.overrides),
        log=sweep.folder / f"{point.name}.out",
    )


# ---- the file ----------------------------------------------------------------------------------------------


def _as_numbers(domain: Any, value: Any) -> Any:
    """YAML reads 1e-4 as text. value: of the preset; between two integers only integers are drawn."""
    if not isinstance(domain, Mapping):
        return domain
    numbers = dict(domain)
    for end in ("low", "high"):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            number = float(numbers[end])
            numbers[end] = int(number) if _is_whole(value) and number.is_integer() else number
    return numbers


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_space(file: str | Path, given: SweepSettings, values: Mapping[str, Any]) -> None:
    problems = []
    for key, domain in given.space.items():
        if isinstance(domain, list) and domain:
            continue
        if not isinstance(domain, Mapping) or not {"low", "high"} <= set(domain) <= {"low", "high", "log"}:
            problems.append((key, "must be a list of choices, or {low: …, high: …, log: true}"))
        elif given.search == "grid":
            problems.append((key, "a range has no grid: list the choices, or set search: random or tpe"))
        elif not all(_is_number(domain[end]) for end in ("low", "high")):
            problems.append((key, f"low and high must be numbers, got {domain}"))
        elif not domain["low"] < domain["high"] or (domain.get("log") and domain["low"] <= 0):
            problems.append((key, f"low must be below high, and above 0 with log, got {domain}"))
        elif _is_whole(values.get(key)) and not (_is_whole(domain["low"]) and _is_whole(domain["high"])):
            problems.append((key, f"low and high must be integers, as {key} is, got {domain}"))
    if not given.space:
        problems.append(("space", "is empty: name at least one key"))
    if problems:
        raise ConfigError(s.format_problems(problems, str(file), "gensr config keys"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _grid(file: str | Path, space: Mapping[str, Any]) -> tuple[Point, ...]:
    size = math.prod(len(choices) for choices in space.values())
    if size > MAX_GRID:
        raise ConfigError(f"{file}: the grid has {size:,} runs, more than {MAX_GRID:,}. Take search: random")
    combinations = itertools.product(*space.values())
    return tuple(
        point_of(number, dict(zip(space, values, strict=True))) for number, values in enumerate(combinations)
    )


def _some(space: Mapping[str, Any]) -> dict[str, Any]:
    """Some settings of the space, to check its keys with."""
    return {key: domain[0] if isinstance(domain, list) else domain["low"] for key, domain in space.items()}
