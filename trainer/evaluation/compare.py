"""`gensr compare`: runs side by side, their differences event by event, and the settings that differ."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.evaluation.evaluated_weights import warnings_of
from trainer.evaluation.paired import comparable, paired, read_stored
from trainer.evaluation.segments import BUCKETS, METRIC
from trainer.evaluation.summary import (
    TASK_TITLES,
    Row,
    cell,
    check_candidates,
    evaluation_name,
    read_evaluation,
    rows_of,
    short,
    table,
)
from trainer.runs.retriever_facts import retriever_of, retriever_words
from trainer.runs.run_folder import RunFolder


def compare(
    run_dirs: Iterable[str | Path], split: str = "test", candidates: str = "sampled"
) -> dict[str, Any]:
    """{"candidates": their kind, "retrievers": {RUN: words} of the runs that were evaluated with one,
    "warnings": lines (evaluated_weights.py), "runs": {RUN: {task: metrics}},
    "paired": {"against": first RUN, "runs": {other RUN: paired()}}, "segments": {RUN: {task: …}}, "settings":
    {key: {RUN: value}} of the keys that differ}.

    Raises ConfigError for an unknown kind of candidates, RunError for a run without such an evaluation, and
    for runs that did not rank the same candidates of the same events. Runs of different tasks have no
    differences.
    """
    check_candidates(candidates)
    folders = [Path(run_dir) for run_dir in run_dirs]
    file = evaluation_name(split, candidates)
    evaluations = {str(folder): read_evaluation(folder, split, candidates) for folder in folders}
    stored = comparable([read_stored(Path(name), file, name) for name in evaluations])
    configs = {str(folder): RunFolder(folder).read_settings() for folder in folders}
    keys = sorted({key for config in configs.values() for key in config})
    settings = {
        key: {name: config.get(key) for name, config in configs.items()} for key in keys if key != "run.dir"
    }
    differing = {
        key: values for key, values in settings.items() if len({str(value) for value in values.values()}) > 1
    }
    return {
        "candidates": candidates,
        "retrievers": {
            name: words
            for name, document in evaluations.items()
            if (words := retriever_words(retriever_of(document["protocol"])))
        },
        "warnings": [
            line
            for name, document in evaluations.items()
            for line in warnings_of(name, file, document["protocol"])
        ],
        "runs": {
            name: {row.task: row.metrics for row in rows_of(document, with_baselines=False)}
            for name, document in evaluations.items()
        },
        "paired": {
            "against": stored[0].where if stored else "",
            "runs": {other.where: paired(stored[0], other) for other in stored[1:]},
        },
        "segments": {name: document.get("segments", {}) for name, document in evaluations.items()},
        "settings": differing,
    }


def compare_lines(comparison: Mapping[str, Any], with_segments: bool = False) -> list[str]:
    rows = [
        Row(name, task, metrics)
        for name, tasks in comparison["runs"].items()
        for task, metrics in tasks.items()
    ]
    lines = [
        *comparison["warnings"],
        f"Candidates: {comparison['candidates']}",
        *(f"  {name}: with the retriever {words}" for name, words in comparison["retrievers"].items()),
        *table(rows),
        *paired_lines(comparison["paired"], with_events=comparison["candidates"] == "full"),
    ]
    if with_segments:
        lines += segment_lines({n: {"segments": of_run} for n, of_run in comparison["segments"].items()})
    return lines + setting_lines(comparison["settings"])


def setting_lines(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings that differ. Of those that one model has and another lacks only the number."""
    shared = {key: values for key, values in settings.items() if None not in values.values()}
    lines = ["Settings that differ"] if settings else []
    for key, values in shared.items():
        names = [Path(name).name for name in values]
        names = names if len(set(names)) == len(names) else list(values)
        shown = (f"{name} {_written(value)}" for name, value in zip(names, values.values(), strict=True))
        lines.append(f"  {key}: {', '.join(shown)}")
    if lacking := len(settings) - len(shared):
        lines.append(f"  and {lacking} that not every one of these models has (--json lists them)")
    return lines


def _written(value: Any) -> str:
    """As in a YAML file: true, '' and so on."""
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


def paired_lines(comparison: Mapping[str, Any], with_events: bool = False) -> list[str]:
    """The differences of compare(), of two metrics; with_events: on how many events, where runs may have
    ranked different samples."""
    if not comparison["runs"]:
        return []
    lines = [f"Difference from {comparison['against']} on the same candidates, 95 % bootstrap over users"]
    for name, tasks in comparison["runs"].items():
        for task, metrics in tasks.items():
            shown = [f"{metric} {difference_cell(metrics[metric])}" for metric in ("recall@10", METRIC)]
            events = f"  ({metrics[METRIC]['num_events']:,} events)" if with_events else ""
            lines.append(f"  {name}  {task}  {'  '.join(shown)}{events}")
    return lines


def difference_cell(figures: Mapping[str, Any]) -> str:
    """`+.0120 [+.0010, +.0230] p .034`."""
    low, high = figures["ci95"]
    value, low, high = (
        f"{number:+.4f}".replace("0.", ".", 1) for number in (figures["difference"], low, high)
    )
    return f"{value} [{low}, {high}] p {short(figures['p_value'])}"


def segment_lines(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """NDCG@10 of parts of the events. evaluations: title → document."""
    width = max(24, *(len(title) for title in evaluations))
    lines: list[str] = []
    for task, title in TASK_TITLES.items():
        found = {name: document.get("segments", {}).get(task, {}) for name, document in evaluations.items()}
        for segment, buckets in BUCKETS.items():
            cells = {name: of_task.get(segment, {}) for name, of_task in found.items()}
            shown = [bucket for bucket in buckets if any(bucket in of for of in cells.values())]
            if not shown:
                continue
            head = "".join(f"  {name:<{width}}" for name in cells)
            lines += [f"{title}: {METRIC} by {segment.replace('_', ' ')}", f"  {'':<6}  {'events':>7}{head}"]
            for bucket in shown:
                num_events = max(of[bucket]["num_events"] for of in cells.values() if bucket in of)
                texts = [cell(of[bucket], METRIC) if bucket in of else "–" for of in cells.values()]
                row = "".join(f"  {text:<{width}}" for text in texts)
                lines.append(f"  {bucket:<6}  {num_events:>7,}{row}".rstrip())
    return lines or ["No segments are stored. Evaluate the runs again with: gensr evaluate RUN"]
