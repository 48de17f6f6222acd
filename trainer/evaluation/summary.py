"""Evaluation documents → tables: the demo's last screen, `gensr report`, `gensr compare`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.secrets import masked
from data_shards.settings import flatten, read_yaml
from trainer.errors import RunError

METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
OURS = "GenSR"  # the title of a model that was evaluated before there were others
TASK_TITLES = {"rec": "Recommendation", "src": "Search"}
BASELINE_TITLES = {
    "popularity": "popularity",
    "lightgcn": "LightGCN",
    "lightgcn_history": "LightGCN, history",
    "bm25": "BM25",
}


@dataclass(frozen=True)
class Row:
    """One model on one task."""

    model: str
    task: str
    metrics: Mapping[str, Any]  # as in evaluation-SPLIT.json: {"ndcg@10": …, "ci95": {…}, "num_events": …}


def read_evaluation(run_dir: str | Path, split: str = "test") -> dict[str, Any]:
    """RUN/evaluation-SPLIT.json. Raises RunError when the run has not been evaluated."""
    path = Path(run_dir) / f"evaluation-{split}.json"
    if not path.is_file():
        raise RunError(f"{path} is missing. Make it with: gensr evaluate {run_dir} --split {split}")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def title_of(evaluation: Mapping[str, Any]) -> str:
    """How tables name the run's own model."""
    return evaluation["protocol"].get("model_title") or OURS


def rows_of(evaluation: Mapping[str, Any], name: str = "", with_baselines: bool = True) -> list[Row]:
    """The model first, by its title or under another name, then the baselines, for each task that has
    events."""
    rows = [
        Row(name or title_of(evaluation), task, evaluation[task])
        for task in TASK_TITLES
        if evaluation.get(task, {}).get("num_events")
    ]
    if with_baselines:
        for key, reports in evaluation.get("baselines", {}).items():
            rows += [
                Row(BASELINE_TITLES.get(key, key), task, metrics)
                for task, metrics in reports.items()
                if metrics.get("num_events")
            ]
    return sorted(rows, key=lambda row: list(TASK_TITLES).index(row.task))


def protocol_line(evaluation: Mapping[str, Any]) -> str:
    protocol = evaluation["protocol"]
    if protocol["candidates"] == "full":
        return (
            f"full: the clicked item among all {protocol['num_items']:,} items but those clicked before; "
            f"{title_of(evaluation)} ranks the {protocol['ranked_by_model']} that "
            f"retrieval finds; {protocol['num_events']:,} of {protocol['num_events_of_split']:,} events; 95 "
            "% bootstrap intervals"
        )
    return (
        f"{protocol['candidates']}: the clicked item among {protocol['num_negatives']} stored negatives; "
        "95 % bootstrap intervals"
    )


def full_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """What a ranking of the whole catalogue adds to the table: recall of retrieval, coverage, popularity of
    what is shown."""
    lines = ["Retrieval, coverage, popularity"]
    for row in rows_of(evaluation):
        shown = (
            f"shows {_short(row.metrics['coverage@10'])} of the catalogue, "
            f"items of {row.metrics['mean_clicks@10']:.1f} clicks"
        )
        found = row.metrics.get("retrieval")
        recall = (
            f"; retrieval finds {_short(found['recall@100'])} among 100, {_short(found['recall@500'])} among "
            "500"
            if found
            else ""
        )
        lines.append(
            f"  {row.model:<10} {row.task}  {shown} (clicked ones: "
            f"{row.metrics['mean_clicks_of_clicked']:.1f}){recall}"
        )
    return lines


def cell(metrics: Mapping[str, Any], metric: str) -> str:
    """`.512 [.498, .526]`."""
    text = _short(metrics[metric])
    interval = metrics.get("ci95", {}).get(metric)
    return f"{text} [{_short(interval[0])}, {_short(interval[1])}]" if interval else text


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if value < 1 else f"{value:.2f}"


def table(rows: Sequence[Row], metrics: Sequence[str] = METRICS) -> list[str]:
    """Plain lines, one block a task."""
    width = max((len(row.model) for row in rows), default=0)
    lines: list[str] = []
    for task, title in TASK_TITLES.items():
        of_task = [row for row in rows if row.task == task]
        if not of_task:
            continue
        lines += [
            f"{title} ({of_task[0].metrics['num_events']:,} events)",
            f"  {'':<{width}}" + "".join(f"  {name:<17}" for name in metrics),
        ]
        lines += [
            f"  {row.model:<{width}}" + "".join(f"  {cell(row.metrics, name):<17}" for name in metrics)
            for row in of_task
        ]
    return lines


def compare(run_dirs: Iterable[str | Path], split: str = "test") -> dict[str, Any]:
    """{"runs": {RUN: {task: metrics}}, "settings": {key: {RUN: value}} of the keys that differ}.

    Raises RunError for a run without an evaluation, and for runs evaluated on different splits.
    """
    folders = [Path(run_dir) for run_dir in run_dirs]
    evaluations = {str(folder): read_evaluation(folder, split) for folder in folders}
    fingerprints = {
        name: document["protocol"].get("split_fingerprint") for name, document in evaluations.items()
    }
    if len(set(fingerprints.values())) > 1:
        named = ", ".join(f"{name}: {str(fingerprint)[:12]}" for name, fingerprint in fingerprints.items())
        raise RunError(f"these runs were evaluated on different splits and cannot be compared ({named})")
    configs = {str(folder): flatten(masked(read_yaml(folder / "config.yaml"))) for folder in folders}
    keys = sorted({key for config in configs.values() for key in config})
    settings = {
        key: {name: config.get(key) for name, config in configs.items()} for key in keys if key != "run.dir"
    }
    differing = {
        key: values for key, values in settings.items() if len({str(value) for value in values.values()}) > 1
    }
    runs = {
        name: {row.task: row.metrics for row in rows_of(document, with_baselines=False)}
        for name, document in evaluations.items()
    }
    return {"runs": runs, "settings": differing}


def compare_lines(comparison: Mapping[str, Any]) -> list[str]:
    rows = [
        Row(name, task, metrics)
        for name, tasks in comparison["runs"].items()
        for task, metrics in tasks.items()
    ]
    lines = table(rows)
    if comparison["settings"]:
        lines.append("Settings that differ")
        for key, values in comparison["settings"].items():
            lines.append(
                f"  {key}: " + ", ".join(f"{Path(name).name} {value}" for name, value in values.items())
            )
    return lines
