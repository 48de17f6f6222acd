"""A sweep: one run for each point of a list of settings, and what came of them.

    - {optim.lr: 3e-4}
    - {optim.lr: 1e-3, model.dropout: 0.2}        # YAML or JSON: a list, one mapping of dotted keys a run

`summarize` is the sweep's last job (slurm/sweep.sbatch): SWEEP/sweep.txt, SWEEP/sweep.json, and a parent run
in MLflow whose children the runs are.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_shards.secrets import mask_secrets
from data_shards.settings import flatten, overrides_of, parse_yaml
from trainer.config import Config
from trainer.errors import ConfigError, RunError
from trainer.runs.run_folder import RunFolder
from trainer.runtime.files import write_json, write_text
from trainer.tracking.store import (
    connect,
    one_line,
    open_experiment,
    read_run_file,
    tracking_uri,
    write_run_file,
)

TABLE, DOCUMENT = "sweep.txt", "sweep.json"
JOB_FILE = "job.json"  # in a run folder, {"job_id": …}: it was submitted
PARENT_TAG = "mlflow.parentRunId"  # what MLflow nests runs by
MAX_NAME = 60  # characters of a run folder's name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its folder's name and its settings."""

    name: str
    overrides: tuple[str, ...]


def read_document(path: str | Path) -> Any:
    """Raises ConfigError for a file that is neither YAML nor JSON."""
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML or JSON file: {error}") from error


def read_sweep(path: str | Path) -> list[Point]:
    """Raises ConfigError when the file does not hold a list of mappings, or lists a run twice."""
    document = read_document(path)
    if (
        not isinstance(document, list)
        or not document
        or not all(isinstance(entry, Mapping) and entry for entry in document)
    ):
        raise ConfigError(
            f"{path}: must be a list with one mapping for each run, for example\n- {{optim.lr: 3e-4}}\n- "
            f"{{optim.lr: 1e-3}}"
        )
    points = [point_of(number, flatten(entry)) for number, entry in enumerate(document)]
    if len({point.overrides for point in points}) < len(points):
        raise ConfigError(f"{path}: two runs have the same settings")
    if any(override.startswith("run.dir=") for point in points for override in point.overrides):
        raise ConfigError(
            f"{path}: run.dir is the sweep's folder, each run gets one below it; give run.dir=SWEEP on the "
            "command line"
        )
    return points


def point_of(number: int, settings: Mapping[str, Any]) -> Point:
    """`03-lr-3e-4-dropout-0.2`: the number keeps names apart, the rest is for people, rounded."""
    changes = "-".join(f"{str(key).rpartition('.')[2]}-{_short(value)}" for key, value in settings.items())
    name = f"{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', changes)}"[:MAX_NAME].rstrip("-._")
    return Point(name, tuple(overrides_of(settings)))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return json.dumps(value) if isinstance(value, bool | list) or value is None else str(value)


# ---- the end of a sweep ------------------------------------------------------------------------------------


def summarize(folder: str | Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Write the table of a sweep's runs and give them their parent in MLflow. Can be repeated. names:
    of their folders; None: every run folder below `folder`.

    Returns {"runs": [{"run", "status", "step", "best_step", "metric", "best"}] best first (None: it was never
    validated), "comparison": as `gensr compare`, or {}, "mlflow_run_id": the parent or ""}. Raises RunError
    when no run has started.
    """
    from trainer.evaluation.compare import compare  # torch: seconds to import

    folder = Path(folder)
    run_dirs = sorted(
        {
            path.parent
            for name in ("config.yaml", JOB_FILE)
            for path in folder.glob(f"*/{name}")
            if names is None or path.parent.name in names
        }
    )
    configs = {
        run_dir: RunFolder(run_dir).read_config()
        for run_dir in run_dirs
        if RunFolder(run_dir).config.is_file()
    }
    if not configs:
        raise RunError(f"{folder} holds no run that has started. Its jobs' output: {folder}/*.out")
    rows = [_row(run_dir, configs.get(run_dir)) for run_dir in run_dirs]
    rows.sort(key=lambda row: -(row["best"] or 0.0))
    evaluated = [run_dir for run_dir in run_dirs if RunFolder(run_dir).evaluation("test").is_file()]
    comparison = compare(evaluated) if evaluated else {}
    document = {"runs": rows, "comparison": comparison, "mlflow_run_id": ""}
    write_text(folder / TABLE, "\n".join(lines_of(document)) + "\n")
    write_json(folder / DOCUMENT, document)
    document["mlflow_run_id"] = _parent(folder, configs, rows)
    return document


def _row(run_dir: Path, config: Config | None) -> dict[str, Any]:
    status = RunFolder(run_dir).read_status() or {"status": "not started", "progress": {}}
    progress = status["progress"]
    step, value = progress.get("best_step", 0), progress.get("best_value", 0.0)
    return {
        "run": run_dir.name,
        "status": status["status"],
        "step": progress.get("step", 0),
        "best_step": step,
        "metric": config.run.select_metric if config else "",
        "best": value if step or value else None,
    }


def lines_of(document: Mapping[str, Any]) -> list[str]:
    """The table for people: runs by their best validation, then the test results of those that were
    evaluated."""
    from trainer.evaluation.compare import compare_lines

    rows: Sequence[Mapping[str, Any]] = document["runs"]
    width = max(len(row["run"]) for row in rows)
    metrics = sorted({row["metric"] for row in rows} - {""})
    lines = [f"Validation, sampled candidates ({', '.join(metrics)} at the best step)"]
    best = ["–" if row["best"] is None else f"{row['best']:.4f}" for row in rows]
    lines += [
        f"  {row['run']:<{width}}  {value:<6}  step {row['best_step']:,} of {row['step']:,}  {row['status']}"
        for row, value in zip(rows, best, strict=True)
    ]
    return [*lines, "", *compare_lines(document["comparison"])] if document["comparison"] else lines


def _parent(folder: Path, configs: Mapping[Path, Config], rows: Sequence[Mapping[str, Any]]) -> str:
    # one that failed may have been ahead of those that end
    best = next((row for row in rows if row["status"] == "finished"), rows[0])
    return adopt_runs(
        folder,
        configs,
        [folder / TABLE, folder / DOCUMENT],
        tags={"sweep": str(folder), "best_run": best["run"]},
        finished=all(row["status"] == "finished" for row in rows),
        again=f"gensr runs summarize {folder}",
    )


def adopt_runs(
    folder: Path,
    configs: Mapping[Path, Config],
    files: Sequence[Path],
    tags: Mapping[str, str],
    finished: bool,
    again: str,
) -> str:
    """The id of the parent run of the tracked ones among `configs` (run folder → its configuration), new or
    that of an earlier call, with `files` and `tags`; "" where nothing is tracked. A store that fails costs a
    warning, not the table; `again`: what repeats it."""
    tracked = {run_dir: run_id for run_dir in configs if (run_id := read_run_file(run_dir))}
    if not tracked:
        return ""
    first = next(iter(tracked))
    uri = tracking_uri(configs[first], first)
    try:
        client = connect(uri)
        parent = read_run_file(folder, uri)
        if not parent:
            experiment_id = open_experiment(client, uri, configs[first].tracking.experiment, first)
            parent = str(client.create_run(experiment_id, run_name=folder.name).info.run_id)
            write_run_file(folder, uri, experiment_id, parent)
        for run_id in tracked.values():
            client.set_tag(run_id, PARENT_TAG, parent)
        for file in files:
            client.log_artifact(parent, str(file))
        for key, value in tags.items():
            client.set_tag(parent, key, value)
        client.set_terminated(parent, "FINISHED" if finished else "FAILED")
    except Exception as error:
        log.warning(
            "MLflow at %s has not taken the parent run of %s: %s. Again: %s",
            mask_secrets(uri),
            folder,
            one_line(error),
            again,
        )
        return ""
    return parent
