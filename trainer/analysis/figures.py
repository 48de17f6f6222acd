"""RUN/metrics.jsonl → pictures and a summary."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import RunError
from trainer.runs.checkpoint import Progress
from trainer.runs.run_folder import RunFolder, is_number
from trainer.runtime.progress import clock

if TYPE_CHECKING:
    from trainer.analysis.drawing import Curve


def read_records(run_dir: str | Path) -> list[dict[str, Any]]:
    """All records of RUN/metrics.jsonl, oldest first. Raises RunError when there are none."""
    path = RunFolder(run_dir).metrics
    if not path.is_file():
        raise RunError(
            f"{run_dir} is not a run folder: metrics.jsonl is missing. Train one with: gensr train"
        )
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a killed process's last line
            continue
        if isinstance(record, dict) and "kind" in record and is_number(record.get("step")):
            numbers = {key: value for key, value in record.items() if is_number(value)}
            records.append({"kind": record["kind"], **numbers})
    return records


def plot_run(run_dir: str | Path) -> list[Path]:
    """Write RUN/report/loss.png and metrics.png from metrics.jsonl; returns the files. A picture without data
    is left out."""
    from trainer.analysis.drawing import curves_with_intervals, write_figure

    records = read_records(run_dir)
    train = [record for record in records if record["kind"] == "train"]
    valid = [record for record in records if record["kind"] == "valid"]
    losses = {
        name.replace("_", " "): _curves(train, {"": name})
        for name in sorted({key for record in train for key in record if key.endswith("loss")})
    }
    metrics = {
        f"{metric}, validation": _curves(valid, {part: f"{part}/{metric}" for part in ("rec", "src", "mean")})
        for metric in ("ndcg@10", "recall@10", "mrr")
    }
    written = []
    for name, panels in (("loss", losses), ("metrics", metrics)):
        if drawn := {title: curves for title, curves in panels.items() if curves}:
            path = RunFolder(run_dir).report / name
            written += write_figure(curves_with_intervals(drawn, "step"), path, formats=["png"])
    return written


def _curves(records: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> "list[Curve]":
    """One of each key (by its label) that any record has."""
    from trainer.analysis.drawing import Curve

    found = []
    for label, key in keys.items():
        having = [record for record in records if math.isfinite(record.get(key, math.nan))]
        if having:
            steps, values = ([record[name] for record in having] for name in ("step", key))
            found.append(Curve(label, steps, values, task=label))
    return found


def metric_rows(metrics: dict[str, float]) -> list[str]:
    """A small table of the usual metrics: one line a task."""
    names = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr")
    lines = [f"{'':<6}" + "".join(f"{name:>11}" for name in names)]
    for task in ("rec", "src", "mean"):
        if any(f"{task}/{name}" in metrics for name in names):
            cells = (
                f"{metrics[f'{task}/{name}']:>11.4f}" if f"{task}/{name}" in metrics else f"{'–':>11}"
                for name in names
            )
            lines.append(f"{task:<6}" + "".join(cells))
    return lines


def last_screen(run_dir: str | Path, progress: Progress, num_valid_events: int) -> list[str]:
    """What a finished run says: the best step and its metrics, where things are, what to do next."""
    place = shlex.quote(str(run_dir))
    return [
        "",
        f"best step {progress.best_step:,} of {progress.step:,}, {clock(progress.train_s)} of training",
        f"validation on {num_valid_events:,} events, sampled candidates:",
        *metric_rows(progress.best_metrics),
        f"model     {Path(run_dir) / 'model'}",
        f"pictures  {Path(run_dir) / 'report'}",
        f"next      gensr evaluate {place} --split test",
        f"          gensr register {place} NAME",
    ]
