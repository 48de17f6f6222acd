"""Run folders → the document that table.json holds.

Every number of a task comes from the ranks of the same events: where two runs ranked different samples, those
that all of them ranked. A system's value is its mean over seeds, with a t interval; a system against the best
other one is a paired bootstrap over users of NDCG@10, averaged over seeds event by event.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

import trainer
from data_shards.schema import TASKS, Manifest
from data_shards.secrets import masked
from data_shards.settings import flatten, parse_yaml, read_yaml
from trainer.analysis.figures import read_records
from trainer.analysis.significance import holm, seed_interval
from trainer.data.folder import PreparedFolder
from trainer.errors import RunError
from trainer.evaluation.bootstrap import NUM_RESAMPLES, UNIT, paired_differences
from trainer.evaluation.metrics import FIGURES, METRICS, metric_values
from trainer.evaluation.optimum import TITLE, read_optimum
from trainer.evaluation.stored import read_ranks_file
from trainer.evaluation.summary import beams_words, evaluation_name, read_evaluation
from trainer.experiments.cells import SPLIT, Cell, is_done, trained_s
from trainer.experiments.table.plan import Plan
from trainer.models.zoo import model_class
from trainer.runs.run_folder import RunFolder, read_json

TESTED = "ndcg@10"  # one hypothesis a system, task and kind of candidates
PUBLISHED_WITHIN = 0.1  # of the paper's numbers of users and items: the same data set, filtered again


@dataclass(frozen=True)
class Values:
    """One run's metrics of one task's n events, sorted by event."""

    events: np.ndarray  # [n]
    users: np.ndarray  # [n]
    metrics: np.ndarray  # [n, len(FIGURES)]

    def of(self, events: np.ndarray) -> "Values":
        """events: sorted, all of them here."""
        rows = np.searchsorted(self.events, events)
        return Values(events, self.users[rows], self.metrics[rows])


def event_values(run_dir: Path, candidates: str) -> dict[str, Values]:
    """From RUN/evaluation-test*.parquet, by task; n = 0 for one that the model does not do. Raises RunError
    for a file that is missing or damaged."""
    table = read_ranks_file(RunFolder(run_dir).ranks(evaluation_name(SPLIT, candidates))).sort_by("event_id")
    return {task: _values(table.filter(pc.equal(table["task"], task))) for task in TASKS}


def _values(table: pa.Table) -> Values:
    ranks, num_tied = (torch.from_numpy(table[name].to_numpy().copy()) for name in ("rank", "num_tied"))
    metrics = metric_values(ranks, num_tied).numpy()
    users = np.asarray(table["user_id"].to_pylist())
    chosen = [METRICS.index(name) for name in FIGURES]
    return Values(table["event_id"].to_numpy(), users, metrics[:, chosen])


# ---- the document ------------------------------------------------------------------------------------------


def read_results(plan: Plan, cells: Sequence[Cell], errors: Mapping[str, str]) -> dict[str, Any]:
    """errors: cell's or model's title → first line of what went wrong. A cell whose files cannot be read is
    one more."""
    kinds, errors = plan.request.candidates, dict(errors)
    done: dict[str, list[tuple[Cell, dict[str, Any]]]] = {name: [] for name in plan.configs}
    values: dict[str, list[dict[str, dict[str, Values]]]] = {name: [] for name in plan.configs}
    for cell in cells:
        if cell.model in done and is_done(cell, kinds):
            try:
                facts = _cell(cell, kinds)
                values[cell.model].append({kind: event_values(cell.run_dir, kind) for kind in kinds})
                done[cell.model].append((cell, facts))
            except RunError as error:
                errors[cell.title] = str(error)
    published = published_numbers(plan.folder.manifest)
    rows = []
    for name, of_model in done.items():
        failed = {title: text for title, text in errors.items() if title.split(" ")[0] == name}
        rows.append(_row(plan, name, of_model, failed) | {"published": published["models"].get(name, {})})
    num_events: dict[str, dict[str, int]] = {}
    for kind in kinds:
        for task in TASKS:
            of_kind = {name: [of_cell[kind] for of_cell in seeds] for name, seeds in values.items()}
            numbers, results = compare_task(of_kind, task)
            num_events.setdefault(kind, {})[task] = numbers
            for row in rows:
                if row["model"] in results:
                    row["results"].setdefault(kind, {})[task] = results[row["model"]]
    if optimum := optimum_results(plan, num_events):
        rows.append(_optimum_row(plan) | {"results": {"sampled": optimum}})
    return {
        "data": _data(plan.folder),
        "published": {key: published[key] for key in ("title", "notes")},
        "seeds": plan.request.seeds,
        "trials": plan.request.trials,
        "budget": plan.times.facts() if plan.times else {},
        "candidates": list(kinds),
        "num_events": num_events,
        "metrics": list(FIGURES),
        "tested": TESTED,
        "gensr_version": trainer.__version__,
        "rows": rows,
    }


def _data(folder: PreparedFolder) -> dict[str, Any]:
    manifest = folder.manifest
    return {
        "folder": folder.name,
        "source": manifest.source,
        "manifest_hash": manifest.hash,
        "split_fingerprint": manifest.fingerprint,
        "users": manifest.num_users,
        "items": manifest.num_items,
        "queries": manifest.num_queries,
        "num_negatives": manifest.num_negatives,
        "num_hard_negatives": manifest.num_hard_negatives,
    }


def _row(
    plan: Plan, name: str, done: Sequence[tuple[Cell, dict[str, Any]]], errors: Mapping[str, str]
) -> dict[str, Any]:
    """What a system is and what it took, apart from its metrics. done: its cells, with their _cell()."""
    kind, facts = model_class(name), [of_cell for _, of_cell in done]
    config = plan.configs[name]
    tuned = read_json(plan.request.tuning_file(name)) if plan.request.trials_of(name) else {}
    runs = [RunFolder(run.run_dir).read_environment() for run in (done[0][0].runs if done else [])]
    return {
        "model": name,
        "title": kind.title,
        "tasks": [TASKS[task] for task in kind.tasks],
        "trained": kind.trained,
        "stages": _stages(name),
        "beams": facts[0]["beams"] if facts else "",  # of the first seed
        "parameters": sum(run.get("parameters", {}).get("trainable", 0) for run in runs) if done else None,
        "train_s": _mean([fact["train_s"] for fact in facts]),
        "score_s": {
            which: _mean([fact["score_s"][which] for fact in facts]) for which in plan.request.candidates
        },
        "select_metric": config.run.select_metric,
        "tuning": tuned,
        "note": _note(plan, name),
        "cells": facts,
        "errors": dict(errors),
        "results": {},
    }


def _stages(model: str) -> str:
    """Of a system that is trained in several; else empty."""
    stages = [" ".join(words) for words in model_class(model).stages()]
    return f"{len(stages)} runs, one after the other: {', '.join(stages)}" if len(stages) > 1 else ""


def _beams(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Of a system that decodes, for each kind of candidates; else empty."""
    words = {kind: beams_words(evaluation) for kind, evaluation in evaluations.items()}
    return "; ".join(f"{kind}: {reached}" for kind, reached in words.items() if reached)


def _note(plan: Plan, model: str) -> str:
    """What the budget has cut."""
    note = plan.times.of(model).note if plan.times else ""
    return f"{note}, each run" if note and _stages(model) else note


def _cell(cell: Cell, candidates: Sequence[str]) -> dict[str, Any]:
    run = RunFolder(cell.run_dir)
    progress = run.read_progress()
    evaluations = {kind: read_evaluation(cell.run_dir, SPLIT, kind) for kind in candidates}
    settings = flatten(masked(read_yaml(run.config)))
    metric = str(settings["run.select_metric"])
    return {
        "name": cell.name,
        "run_dir": str(cell.run_dir),
        "step": progress.get("step", 0),
        "best_step": progress.get("best_step", 0),
        "best_value": progress.get("best_value", 0.0),
        "train_s": sum(trained_s(one.run_dir) for one in cell.runs),
        "score_s": {kind: _score_s(evaluation) for kind, evaluation in evaluations.items()},
        "beams": _beams(evaluations),
        "settings": settings,
        "curve": [
            [record["step"], record[metric]]
            for record in read_records(cell.run_dir)
            if record.get("kind") == "valid" and metric in record
        ],
    }


def _score_s(evaluation: Mapping[str, Any]) -> float:
    """From the speed that the evaluation wrote down: events a second, or (event, candidate) pairs."""
    protocol = evaluation["protocol"]
    events = sum(evaluation[task]["num_events"] for task in TASKS if task in evaluation)
    if protocol["candidates"] == "full":
        return events / max(float(protocol["events_per_s"]), 1e-9)
    return events * (1 + int(protocol["num_negatives"])) / max(float(protocol["candidates_per_s"]), 1e-9)


def optimum_results(plan: Plan, num_events: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """{task: {metric: …}} of a simulated world's own preferences, sampled candidates; {} where none were
    measured, or on other events."""
    found = read_optimum(plan.folder)
    return {
        task: {
            metric: {"value": found[task][metric], "low": None, "high": None, "seeds": [found[task][metric]]}
            for metric in FIGURES
        }
        for task, number in num_events.get("sampled", {}).items()
        if number and found.get(task, {}).get("num_events") == number
    }


def _optimum_row(plan: Plan) -> dict[str, Any]:
    """No system: what every system is measured against."""
    return {
        "about": "The simulated preferences rank the candidates themselves: no system should pass them.",
        "model": "planted_optimum",
        "title": TITLE,
        "tasks": list(TASKS),
        "trained": False,
        "parameters": 0,
        "train_s": 0.0,
        "score_s": dict.fromkeys(plan.request.candidates, 0.0),
        "select_metric": "",
        "tuning": {},
        "note": "",
        "cells": [],
        "errors": {},
        "published": {},
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


# ---- one task ----------------------------------------------------------------------------------------------


def compare_task(
    values: Mapping[str, Sequence[Mapping[str, Values]]], task: str
) -> tuple[int, dict[str, dict[str, Any]]]:
    """values: model → event_values() of its seeds. Returns (events that every run ranked, model →
    {metric: {value, low, high, seeds}, "against": {…}})."""
    runs = {
        name: [of_run[task] for of_run in seeds]
        for name, seeds in values.items()
        if seeds and TASKS.index(task) in model_class(name).tasks
    }
    runs = {name: seeds for name, seeds in runs.items() if all(len(of_run.events) for of_run in seeds)}
    if not runs:
        return 0, {}
    common = reduce(np.intersect1d, [of_run.events for seeds in runs.values() for of_run in seeds])
    if not len(common):
        return 0, {}
    runs = {name: [of_run.of(common) for of_run in seeds] for name, seeds in runs.items()}
    results: dict[str, dict[str, Any]] = {name: _over_seeds(seeds) for name, seeds in runs.items()}
    tested = FIGURES.index(TESTED)
    gains = {name: np.mean([v.metrics[:, tested] for v in seeds], axis=0) for name, seeds in runs.items()}
    users = next(iter(runs.values()))[0].users
    for name, difference in against_best(gains, users).items():
        results[name]["against"] = difference
    return len(common), results


def _over_seeds(seeds: Sequence[Values]) -> dict[str, Any]:
    means = np.stack([values.metrics.mean(axis=0) for values in seeds])
    summary: dict[str, Any] = {}
    for column, metric in enumerate(FIGURES):
        values = [float(value) for value in means[:, column]]
        summary[metric] = {"value": float(np.mean(values)), "low": None, "high": None, "seeds": values}
        if len(values) > 1:
            interval = seed_interval(values, UNIT)
            summary[metric] |= {"low": interval.low, "high": interval.high}
    return summary


def against_best(values: Mapping[str, np.ndarray], users: np.ndarray) -> dict[str, dict[str, Any]]:
    """Each system − the best other one, by the mean of values [n]: {"model", "difference", "low", "high",
    "p", "p_holm"}. {} for fewer than two systems.

    The best is compared with the second, which is the second's own comparison turned round, so m systems make
    m − 1 hypotheses for Holm's correction.
    """
    order = sorted(values, key=lambda name: -float(values[name].mean()))
    if len(order) < 2:
        return {}
    best, second = order[0], order[1]
    found = differences_from(values[best], {name: values[name] for name in order[1:]}, users)
    report = {name: {"model": best, **difference} for name, difference in found.items()}
    of_second = found[second]
    ends = {"low": -of_second["high"], "high": -of_second["low"]}
    turned = {"model": second, **of_second, **ends, "difference": -of_second["difference"]}
    return {**report, best: turned}


def differences_from(
    reference: np.ndarray, others: Mapping[str, np.ndarray], users: np.ndarray
) -> dict[str, dict[str, float]]:
    """Each of the others [n] − the reference [n], on the same resamples of users: {"difference", "low",
    "high", "p", "p_holm"}. More resamples for more comparisons: Holm's correction multiplies the smallest
    p-value that they can give. With 1,000 for all, 26 comparisons could show nothing below .05."""
    columns = np.stack(list(others.values()), axis=1)
    resamples = NUM_RESAMPLES * len(others)
    found = dict(zip(others, paired_differences(reference[:, None], columns, users, resamples), strict=True))
    adjusted = holm({name: difference.p_value for name, difference in found.items()})
    return {
        name: {
            "difference": difference.value,
            "low": difference.low,
            "high": difference.high,
            "p": difference.p_value,
            "p_holm": adjusted[name],
        }
        for name, difference in found.items()
    }


# ---- published numbers -------------------------------------------------------------------------------------


def published_numbers(manifest: Manifest) -> dict[str, Any]:
    """{"title", "notes", "models": {model: {task: {metric: number}}}}; empty where the folder is no data set
    of the paper."""
    document = parse_yaml(resources.files(__package__).joinpath("published.yaml").read_text(encoding="utf-8"))
    for data_set in document["data_sets"]:
        if any(_is_same(manifest, one) for one in (data_set, *data_set.get("also", []))):
            return _numbers(data_set, document["metrics"])
    return {"title": "", "notes": [], "models": {}}


def _is_same(manifest: Manifest, data_set: Mapping[str, Any]) -> bool:
    ours = {"users": manifest.num_users, "items": manifest.num_items}
    near = all(abs(ours[key] / data_set[key] - 1) <= PUBLISHED_WITHIN for key in ours)
    return near and manifest.source == data_set["source"]


def _numbers(data_set: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    models: dict[str, dict[str, dict[str, float]]] = {}
    for task in TASKS:
        for name, numbers in data_set[task].items():
            models.setdefault(name, {})[task] = dict(zip(metrics, numbers, strict=True))
    notes = []
    for swap in data_set.get("swapped", []):
        numbers, (a, b) = models[swap["model"]][swap["task"]], swap["metrics"]
        numbers[a], numbers[b] = numbers[b], numbers[a]
        notes.append(
            f"{swap['model']}, {swap['task']}: {a} and {b} are swapped in the paper (it prints "
            f"{numbers[b]} and {numbers[a]}); here they are read the other way round"
        )
    return {"title": data_set["title"], "notes": notes, "models": models}
