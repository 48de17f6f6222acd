"""Does one task help the other? Search only, recommendation only, and both, at equal steps and equal data.

A run with data.weight_rec=0 reads the same batches as a joint run, and learns from their searches alone; one
with data.weight_src=0 from their recommendations. So all three make the same steps and see the same events.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.analysis.drawing import Bar, bars_with_intervals, write_figure
from trainer.analysis.pages import Picture, Section, Table, Text
from trainer.errors import RunError
from trainer.evaluation.summary import metric_title
from trainer.experiments.analyses.ablations import difference_cells
from trainer.experiments.analyses.groups import evaluations_of, grouped, results, seeds_note
from trainer.experiments.analyses.options import TASK_TITLES, Options, need_runs
from trainer.runtime.progress import Notify

WHAT = "transfer"
JOINT, ONLY = "both tasks", {"src": "search only", "rec": "recommendation only"}
OTHER = {"src": "rec", "rec": "src"}
# a run of one task picks its best step by that task
OWN = ("data.weight_rec", "data.weight_src", "run.select_metric")


def measure(runs: Sequence[Path], options: Options, notify: Notify) -> dict[str, Any]:
    """{"rows": one for each of both tasks, search only, recommendation only, "gains": {task: both − single}}.

    Raises RunError unless the runs are a joint group and one or two of a single task, alike otherwise.
    """
    need_runs(runs, WHAT, 2)
    groups = grouped(runs, options.candidates)
    kinds = [_kind(group.settings) for group in groups]
    others = [key for key in groups[0].settings if key not in OWN]
    if others or sorted(kinds) != sorted(set(kinds)) or JOINT not in kinds or len(kinds) < 2:
        raise RunError(
            "transfer compares runs that differ in data.weight_rec and data.weight_src alone: both tasks, "
            "data.weight_rec=0 and data.weight_src=0"
            + (f"; these differ in {', '.join(others)}" * bool(others))
        )
    rows = []
    gains = {}
    for kind, row in zip(kinds, results(groups, options.candidates), strict=True):
        rows.append({"label": kind, **row})
    for task, kind in ONLY.items():
        if kind in kinds:  # joint − single: the single run is the reference
            pair = [groups[kinds.index(kind)], groups[kinds.index(JOINT)]]
            gains[task] = results(pair, options.candidates)[1]["tasks"].get(task, {})
    return {**evaluations_of(options), "rows": rows, "gains": gains}


def _kind(settings: Mapping[str, Any]) -> str:
    rec, src = (settings.get(f"data.weight_{task}", 1.0) for task in ("rec", "src"))
    return ONLY["src"] if not rec else ONLY["rec"] if not src else JOINT


def section(document: dict[str, Any], folder: Path) -> Section:
    metric, rows = document["metric"], document["rows"]
    metrics: dict[str, list[Bar]] = {}
    for task, title in TASK_TITLES.items():
        for row in rows:
            if task in row["tasks"] and row["label"] != ONLY[OTHER[task]]:
                found = row["tasks"][task][metric]
                bar = Bar(row["label"], found["value"], found["low"], found["high"], task)
                metrics.setdefault(f"{title}: {metric_title(metric)}", []).append(bar)
    path = write_figure(bars_with_intervals(metrics), folder / WHAT)[1]
    table = [
        [TASK_TITLES[task], *difference_cells(found, metric)]
        for task, found in document["gains"].items()
        if found
    ]
    head = ["task", f"{metric_title(metric)} of both", "95 % interval", "both − single, NDCG@10", "p"]
    return Section(
        "Does one task help the other?",
        [
            Text(
                "Runs of one task read the same batches as the joint run, in the same steps; events of the "
                f"other task have weight 0. Candidates: {document['candidates']}. {seeds_note(rows)}"
            ),
            Picture(path, "Bars of the joint and the single-task runs, a panel a task, with intervals."),
            Table(head, table),
        ],
    )
