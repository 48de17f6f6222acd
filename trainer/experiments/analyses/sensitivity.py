"""Figure 5: how do settings such as τ and λ act? Curves of each setting that runs vary, and a map of two."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.analysis.drawing import Curve, curves_with_intervals, heat_map, write_figure
from trainer.analysis.pages import Part, Picture, Section, Table, Text
from trainer.errors import RunError
from trainer.evaluation.summary import metric_title
from trainer.experiments.analyses.ablations import difference_cells
from trainer.experiments.analyses.groups import evaluations_of, grouped, results, seeds_note
from trainer.experiments.analyses.options import TASK_TITLES, Options, need_runs
from trainer.runs.run_folder import is_number
from trainer.runtime.progress import Notify

WHAT = "sensitivity"
SYMBOLS = {"model.temperature": "τ", "model.contrastive_weight": "λ"}


def measure(runs: Sequence[Path], options: Options, notify: Notify) -> dict[str, Any]:
    need_runs(runs, WHAT, 2)
    groups = grouped(runs, options.candidates)
    keys = [key for key in groups[0].settings if all(is_number(group.settings[key]) for group in groups)]
    if not keys:
        raise RunError("these runs differ in no setting that is a number: there is no curve to draw")
    rows = results(groups, options.candidates)
    return {**evaluations_of(options), "keys": keys, "rows": rows}


def section(document: dict[str, Any], folder: Path) -> Section:
    rows, keys, metric = document["rows"], document["keys"], document["metric"]
    base = rows[0]["settings"]
    parts: list[Part] = [
        Text(
            f"Candidates: {document['candidates']}. {seeds_note(rows)} A curve varies one setting "
            "and keeps the others of the first RUN."
        )
    ]
    for key in keys:
        metrics = {}
        for task, title in TASK_TITLES.items():
            line = _line(rows, key, base, task, metric)
            if line is not None:
                metrics[f"{title}: {metric_title(metric)}"] = [line]
        if metrics:
            name = key.rpartition(".")[2]
            figure = curves_with_intervals(metrics, _label(key))
            path = write_figure(figure, folder / f"{WHAT}-{name}")[1]
            parts.append(Picture(path, f"{metric} against {key}, a panel a task, with intervals."))
    if len(keys) == 2:
        for task, title in TASK_TITLES.items():
            grid = _grid(_apart_in(rows, keys, base), keys, task, metric)
            if grid is not None:
                values, ys, xs = grid
                rows_are, columns_are = map(_label, keys)
                caption = f"{title}: {metric_title(metric)}; rows {rows_are}, columns {columns_are}"
                # without this the last digit of one run would span all colours
                span = _interval_width(rows, task, metric)
                figure = heat_map(values, ys, xs, caption, decimals=3, least_span=span)
                path = write_figure(figure, folder / f"{WHAT}-map-{task}")[1]
                parts.append(Picture(path, f"{title}: {metric} for each pair of {keys[0]} and {keys[1]}."))
    others = [key for key in base if key not in keys]
    table = [
        [
            title,
            *(f"{row['settings'][key]:g}" for key in keys),
            *(str(row["settings"][key]) for key in others),
            *difference_cells(row["tasks"][task], metric),
        ]
        for task, title in TASK_TITLES.items()
        for row in rows
        if task in row["tasks"]
    ]
    names = [*(SYMBOLS.get(key, key) for key in keys), *others]
    head = ["task", *names, metric_title(metric), "95 % interval", "difference from the first", "p (Holm)"]
    return Section("Sensitivity (Figure 5)", [*parts, Table(head, table)])


def _interval_width(rows: Sequence[Mapping[str, Any]], task: str, metric: str) -> float:
    """The mean over runs of the task."""
    found = [row["tasks"][task][metric] for row in rows if task in row["tasks"]]
    return float(np.mean([value["high"] - value["low"] for value in found]))


def _label(key: str) -> str:
    return f"{SYMBOLS[key]} ({key.rpartition('.')[2]})" if key in SYMBOLS else key


def _apart_in(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], base: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """The groups that differ from the first in these settings alone."""
    others = [key for key in base if key not in keys]
    return [row for row in rows if all(row["settings"][key] == base[key] for key in others)]


def _line(
    rows: Sequence[Mapping[str, Any]], key: str, base: Mapping[str, Any], task: str, metric: str
) -> Curve | None:
    """Of one setting; None where there is one value."""
    chosen = [row for row in _apart_in(rows, [key], base) if task in row["tasks"]]
    chosen.sort(key=lambda row: row["settings"][key])
    if len(chosen) < 2:
        return None
    found = [row["tasks"][task][metric] for row in chosen]
    y, low, high = ([value[end] for value in found] for end in ("value", "low", "high"))
    return Curve("", [row["settings"][key] for row in chosen], y, low, high, task)


def _grid(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], task: str, metric: str
) -> tuple[np.ndarray, list[str], list[str]] | None:
    having = [row for row in rows if task in row["tasks"]]
    ys, xs = (sorted({row["settings"][key] for row in having}) for key in keys)
    if len(ys) < 2 or len(xs) < 2:
        return None
    values = np.full((len(ys), len(xs)), np.nan)
    for row in having:
        place = ys.index(row["settings"][keys[0]]), xs.index(row["settings"][keys[1]])
        values[place] = row["tasks"][task][metric]["value"]
    return values, [f"{y:g}" for y in ys], [f"{x:g}" for x in xs]
