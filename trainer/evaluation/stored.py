"""RUN/evaluation-NAME.json and .parquet as files that may be damaged."""

import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.schema import TASKS
from trainer.errors import RunError
from trainer.evaluation.metrics import fewest_tied
from trainer.evaluation.segments import METRIC
from trainer.runs.run_folder import RunFolder, is_number, read_json


def evaluate_command(run_dir: str | Path, name: str) -> str:
    """What makes RUN/evaluation-NAME.*; name: test, valid-hard, …"""
    split, _, candidates = name.partition("-")
    option = f" --candidates {candidates}" if candidates else ""
    return f"gensr evaluate {shlex.quote(str(run_dir))} --split {split}{option}"


def _again(path: Path) -> str:
    """A registered version holds an evaluation, too, and is no run that could make it."""
    run_dir = path.parent if RunFolder(path.parent).config.is_file() else "RUN"
    return f"Make it again with: {evaluate_command(run_dir, path.stem.removeprefix('evaluation-'))}"


def read_evaluation_file(path: Path) -> dict[str, Any]:
    """The document, with what tables and pictures read of it: a protocol, and numbers for each task, baseline
    and segment. Raises RunError for anything else."""
    document = read_json(path)
    baselines, segments = (document.get(name, {}) for name in ("baselines", "segments"))
    mine = [document[task] for task in TASKS if task in document]
    reports = [*mine, *(report for entry in _values(baselines) for report in _values(entry))]
    parts = [part for of_task in _values(segments) for name in _values(of_task) for part in _values(name)]
    whole = all(isinstance(tree, dict) for tree in (document.get("protocol"), baselines, segments))
    whole = whole and all(map(_is_report, [*reports, *parts])) and all(map(_is_part, parts))
    decodes = whole and document["protocol"].get("num_beams")
    if not whole or (decodes and not all("share_reached" in report for report in mine)):
        raise RunError(f"{path} is damaged. {_again(path)}")
    return document


def _values(tree: Any) -> list[Any]:
    return list(tree.values()) if isinstance(tree, dict) else [tree]


def _is_report(report: Any) -> bool:
    """{"num_events": n, metric: number, "ci95": {metric: [low, high]}}; of the whole catalogue also
    "retrieval": {recall: number}."""
    if not isinstance(report, dict) or not is_number(report.get("num_events")):
        return False
    rest = {key: value for key, value in report.items() if key not in ("ci95", "retrieval")}
    intervals, retrieval = report.get("ci95", {}), report.get("retrieval", {})
    return (
        all(map(is_number, rest.values()))
        and isinstance(retrieval, dict)
        and all(map(is_number, retrieval.values()))
        and isinstance(intervals, dict)
        and all(
            isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends)) and ends[0] <= ends[1]
            for ends in intervals.values()
        )
    )


def _is_part(report: dict[str, Any]) -> bool:
    """Of a segment: the one metric that segments have, with its interval."""
    return METRIC in report and METRIC in report.get("ci95", {})


def read_ranks_file(path: Path) -> pa.Table:
    """The rows of evaluation-NAME.parquet; num_tied is worked out where an older one does not have it. Raises
    RunError for a file that is none."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{path}: cannot be read: {error}. {_again(path)}") from error
    if lacking := {"event_id", "task", "user_id", "rank"} - set(table.column_names):
        raise RunError(f"{path} has no column {', '.join(sorted(lacking))}. {_again(path)}")
    if "num_tied" not in table.column_names:
        table = table.append_column("num_tied", pa.array(fewest_tied(table["rank"].to_numpy())))
    return table
