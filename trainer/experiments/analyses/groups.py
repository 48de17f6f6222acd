"""Finished runs by their settings: runs that differ in their seed alone are one group. Values of a group are
means over its seeds; groups are compared event by event on the same test events."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.schema import TASKS
from trainer.analysis.significance import seed_interval
from trainer.errors import RunError
from trainer.evaluation.bootstrap import UNIT, mean_intervals
from trainer.evaluation.metrics import FIGURES
from trainer.evaluation.paired import comparable, read_stored
from trainer.evaluation.summary import evaluation_name
from trainer.experiments.analyses.options import Options
from trainer.experiments.cells import SPLIT
from trainer.experiments.table.results import TESTED, Values, differences_from, event_values
from trainer.runs.run_folder import RunFolder

# where a run lies, what it is called, what it may take; none of it changes what is learned
APART = ("run.seed", "run.dir", "data.cache_dir", "run.timeout_s", "run.threads", "run.log_every_steps")


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    runs: tuple[Path, ...]
    settings: Mapping[str, Any]  # key → value, where groups differ


def evaluations_of(options: Options) -> dict[str, Any]:
    """What a document says of the evaluations that are compared."""
    return {"split": SPLIT, "metric": options.metric, "candidates": options.candidates}


def grouped(runs: Sequence[Path], candidates: str = "sampled") -> list[Group]:
    """In the order in which the first run of each is given. Raises RunError when a seed occurs twice in one
    group, or runs did not rank the same candidates of the same events."""
    name = evaluation_name(SPLIT, candidates)
    comparable([read_stored(run, name, str(run)) for run in runs])
    settings = [RunFolder(run).read_settings() for run in runs]
    seeds_of = [(of_run["run.seed"], of_run["run.init_from"]) for of_run in settings]
    begun: dict[Hashable, str] = {}  # the first run of each kind that others began with stands for its seeds
    for of_run in settings:
        of_run["run.init_from"] = begun.setdefault(_learned(of_run["run.init_from"]), of_run["run.init_from"])
    keys = sorted({key for of_run in settings for key in of_run if not _is_apart(key)})
    differing = [key for key in keys if len({str(of_run.get(key)) for of_run in settings}) > 1]
    found: dict[str, list[int]] = {}
    for number, of_run in enumerate(settings):
        found.setdefault(str([of_run.get(key) for key in differing]), []).append(number)
    groups = []
    for numbers in found.values():
        seeds = [seeds_of[number] for number in numbers]
        if len(set(seeds)) < len(seeds):
            names = ", ".join(str(runs[number]) for number in numbers)
            raise RunError(f"{names}: the same settings and the same seed twice. Leave one out")
        chosen = {key: settings[numbers[0]].get(key) for key in differing}
        groups.append(Group(tuple(runs[number] for number in numbers), chosen))
    return groups


def _learned(run: str) -> Hashable:
    """What a run learned from, but for its seed: its settings and those of the run that it began with. Its
    name where it is not here."""
    if not run or not RunFolder(run).config.is_file():
        return run
    return tuple(
        (key, _learned(value) if key == "run.init_from" else str(value))
        for key, value in RunFolder(run).read_settings().items()
        if not _is_apart(key)
    )


def _is_apart(key: str) -> bool:
    return key in APART or key.startswith("tracking.")


def results(groups: Sequence[Group], candidates: str) -> list[dict[str, Any]]:
    """For each group {"settings", "runs", "tasks": {task: {metric: {value, low, high, seeds, interval},
    "against": {difference, low, high, p, p_holm} of NDCG@10 from the first group, {} of that itself}}}.

    interval: "seeds" where a group has several, else "users" (a bootstrap), which leaves out what another
    seed would change.
    """
    rows: list[dict[str, Any]] = [
        {"settings": dict(group.settings), "runs": [str(run) for run in group.runs], "tasks": {}}
        for group in groups
    ]
    of_runs = [[event_values(run, candidates) for run in group.runs] for group in groups]
    for task in TASKS:
        values = [[of_run[task] for of_run in seeds] for seeds in of_runs]
        having = [number for number, seeds in enumerate(values) if all(len(v.events) for v in seeds)]
        if not having:
            continue
        events = reduce(np.intersect1d, [v.events for number in having for v in values[number]])
        chosen = {number: [v.of(events) for v in values[number]] for number in having}
        against = _against(chosen)
        for number, seeds in chosen.items():
            rows[number]["tasks"][task] = {
                **_summary(seeds),
                "num_events": len(events),
                "against": against.get(number, {}),
            }
    return rows


def _summary(seeds: Sequence[Values]) -> dict[str, dict[str, Any]]:
    """By metric."""
    means = [[float(values.metrics[:, column].mean()) for values in seeds] for column in range(len(FIGURES))]
    if len(seeds) > 1:
        intervals, kind = [seed_interval(of_metric, UNIT) for of_metric in means], "seeds"
    else:
        intervals, kind = mean_intervals(seeds[0].metrics, seeds[0].users, UNIT), "users"
    return {
        metric: {"value": i.value, "low": i.low, "high": i.high, "seeds": of_metric, "interval": kind}
        for metric, i, of_metric in zip(FIGURES, intervals, means, strict=True)
    }


def _against(chosen: Mapping[int, Sequence[Values]]) -> dict[int, dict[str, Any]]:
    """Each group − group 0, on the seeds' mean of NDCG@10 of each event."""
    if 0 not in chosen or len(chosen) < 2:
        return {}
    column = FIGURES.index(TESTED)
    gains = {
        number: np.mean([v.metrics[:, column] for v in seeds], axis=0) for number, seeds in chosen.items()
    }
    first = gains.pop(0)
    others = {str(number): gain for number, gain in gains.items()}
    found = differences_from(first, others, chosen[0][0].users)
    return {int(name): difference for name, difference in found.items()}


def settings_label(settings: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """`temperature 0.2, variant paper`: where a group differs from the reference, or "as it is"."""
    words = [
        f"{key.rpartition('.')[2].replace('_', ' ')} {value}"
        for key, value in settings.items()
        if value != reference.get(key)
    ]
    return ", ".join(words) or "as it is"


def seeds_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the intervals of a page are."""
    fewest = min(len(row["runs"]) for row in rows)
    if fewest > 1:
        return f"Values are means over seeds ({fewest} or more), with the 95 % t interval of the mean."
    return (
        "A group with one seed has a bootstrap interval over users: what another seed would change is not in "
        "it. Train at least three seeds before you trust a small difference."
    )
