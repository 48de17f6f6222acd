"""Figure 4: is each part needed? Bars of groups of runs, the first RUN's group first, with a paired test."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.analysis.drawing import Bar, bars_with_intervals, write_figure
from trainer.analysis.pages import Picture, Section, Table, Text
from trainer.evaluation.summary import metric_title, short
from trainer.experiments.analyses.groups import evaluations_of, grouped, results, seeds_note, settings_label
from trainer.experiments.analyses.options import TASK_TITLES, Options, need_runs
from trainer.runtime.progress import Notify

WHAT, MODEL = "ablations", "model.name"
# setting → value → what a picture calls it; the first four are the paper's
KNOWN: dict[str, dict[str, str]] = {
    "model.views": {"semantic": "without CF view", "cf": "without semantic view"},
    "model.soft_filter": {"False": "without soft filter"},
    "model.contrastive_weight": {"0.0": "without contrastive term"},
    "model.variant": {"paper": "the paper's equations"},
    "model.cf_holdout": {"none": "without hold-out of the CF table"},
    "model.evidence": {"False": "without evidence"},
    "model.mined_negatives": {"0": "without mined negatives"},
    "model.prompt": {"paper": "the paper's wording", "compact": "compact wording"},
    "data.weight_rec": {"0.0": "search only"},
    "data.weight_src": {"0.0": "recommendation only"},
}


def measure(runs: Sequence[Path], options: Options, notify: Notify) -> dict[str, Any]:
    need_runs(runs, WHAT, 2)
    groups = grouped(runs, options.candidates)
    rows = results(groups, options.candidates)
    for row, name in zip(rows, labels([row["settings"] for row in rows]), strict=True):
        row["label"] = name
    return {**evaluations_of(options), "rows": rows}


def labels(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """How each group differs from the first; one of another model by its name, and by how it differs from the
    first of that model, because two models have few settings in common."""
    found: list[str] = []
    first_of: dict[str, Mapping[str, Any]] = {}
    for settings in groups:
        model = str(settings.get(MODEL))
        reference = first_of.setdefault(model, settings)
        changes = label(settings, reference)
        if reference is groups[0]:
            found.append(changes)
        else:
            found.append(model if settings is reference else f"{model}, {changes}")
    return found


def label(settings: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    changed = {key: value for key, value in settings.items() if value != reference.get(key)}
    names = [KNOWN.get(key, {}).get(str(value), "") for key, value in changed.items()]
    return ", ".join(names) if names and all(names) else settings_label(settings, reference)


def section(document: dict[str, Any], folder: Path) -> Section:
    rows, metric = document["rows"], document["metric"]
    metrics: dict[str, list[Bar]] = {}
    table = []
    for task, title in TASK_TITLES.items():
        for row in rows:
            if task not in row["tasks"]:
                continue
            found = row["tasks"][task]
            value = found[metric]
            bar = Bar(row["label"], value["value"], value["low"], value["high"], task)
            metrics.setdefault(f"{title}: {metric_title(metric)}", []).append(bar)
            table.append([title, row["label"], str(len(row["runs"])), *difference_cells(found, metric)])
    path = write_figure(bars_with_intervals(metrics), folder / WHAT)[1]
    head = [
        "task",
        "system",
        "seeds",
        metric_title(metric),
        "95 % interval",
        "difference in NDCG@10",
        "p (Holm)",
    ]
    return Section(
        "Ablations (Figure 4)",
        [
            Text(
                f"Candidates: {document['candidates']}. {seeds_note(rows)} Differences are from the first "
                "system, event by event, with a bootstrap over users; p-values carry Holm's correction. "
                "Marked: a difference whose p-value is below .05."
            ),
            Picture(path, "Bars of the metric for each ablated system, a panel a task, with intervals."),
            Table(head, table),
        ],
    )


def difference_cells(found: Mapping[str, Any], metric: str) -> list[str]:
    value, against = found[metric], found["against"]
    cells = [short(value["value"]), f"{short(value['low'])} to {short(value['high'])}"]
    if not against:
        return [*cells, "", ""]
    mark = "!" if against["p_holm"] < 0.05 else ""
    numbers = (f"{against[key]:+.4f}" for key in ("difference", "low", "high"))
    return [*cells, mark + "{} [{}, {}]".format(*numbers), short(against["p_holm"])]
