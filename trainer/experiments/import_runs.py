"""`gensr runs import`: runs that were made where no tracking server could be reached, into one. Again and
again: a second import adds nothing.

    a store (mlflow.db of an offline node)      each of its runs: parameters, tags, every point with its time
                                                and step, datasets, files, status
    a run folder (RUN)                          the same from config.yaml, environment.json, metrics.jsonl,
                                                machine/, evaluation-*.json, report/;
                                                where RUN/tracking.json names a run of the target itself, that
                                                one gets what it lacks

A copy carries the tag `gensr.source` = the run's id where it was made, by which a later import finds it; what
the target has is not sent again.
"""

import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.errors import DataError
from data_shards.schema import read_manifest
from data_shards.secrets import mask_secrets
from trainer.config import Config
from trainer.errors import EnvironmentProblem, GensrError, RunError
from trainer.evaluation.stored import read_evaluation_file
from trainer.evaluation.summary import CANDIDATES, evaluation_name
from trainer.experiments.sweep import PARENT_TAG
from trainer.registry.model_card import metrics_of
from trainer.runs.run_folder import RunFolder, is_number
from trainer.runtime.progress import Notify, silent
from trainer.tracking.delivery import JsonLines, Record, is_point, machine_points, send
from trainer.tracking.store import (
    connect,
    is_server,
    metric_name,
    must_exist,
    one_line,
    open_experiment,
    path_of_file_uri,
    read_run_file,
    sqlite_path,
    sqlite_uri,
    tracking_uri,
)
from trainer.tracking.tracker import describe

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SOURCE_TAG = "gensr.source"
STATUS = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "crashed": "FAILED",
    "stopped": "KILLED",
    "running": "RUNNING",
}
EVALUATED = [evaluation_name(split, candidates) for split in ("valid", "test") for candidates in CANDIDATES]
PAGE = 1000  # runs of one answer


@dataclass
class Source:
    """A run as it was recorded somewhere else."""

    id: str
    name: str
    experiment: str
    status: str
    start_ms: int
    end_ms: int
    tags: dict[str, str] = field(default_factory=dict)
    dataset_inputs: list[Any] = field(default_factory=list)  # MLflow's own
    records: list[Record] = field(default_factory=list)  # parameters, points, datasets, texts
    files: list[tuple[Path, str]] = field(default_factory=list)  # and the folder they go to
    num_skipped: int = 0  # lines of its files that are no records


@dataclass(frozen=True)
class Imported:
    """What happened to one run. `added` counts new points: 0 where the target has them all."""

    run: str
    run_id: str
    new: bool
    added: int
    status: str
    left_out: int = 0  # lines and records that cannot be read, or that no store takes


def import_runs(source: str, into: str, progress: Notify = silent) -> list[Imported]:
    """`source`: a run folder, a folder of run folders, an sqlite file, or a tracking URI. `into`: the
    tracking URI of the target.

    Raises RunError when `source` holds no run, EnvironmentProblem when a store does not answer.
    """
    if is_same(source, into):
        raise RunError(f"{source} is the store that the runs should go into")
    done: dict[str, tuple[Source, Imported]] = {}
    try:
        runs = read_source(source)
        first = next(runs)  # a source that holds none is refused before the target is made
        target = connect(into)
        for run in itertools.chain([first], runs):
            imported = _import(target, into, run)
            done[run.id] = (run, imported)
            left_out = f", {imported.left_out:,} records left out" if imported.left_out else ""
            progress(f"{imported.run}: {imported.added:,} points added, {imported.status}{left_out}")
        for run, imported in done.values():  # once all have an id
            parent = done.get(run.tags.get(PARENT_TAG, ""))
            if parent is not None:
                target.set_tag(imported.run_id, PARENT_TAG, parent[1].run_id)
    except Exception as error:
        if isinstance(error, GensrError) and not isinstance(error, EnvironmentProblem):
            raise
        raise EnvironmentProblem(
            f"the runs of {mask_secrets(source)} cannot be brought into {mask_secrets(into)}: "
            f"{one_line(error).rstrip('.')}. What has arrived stays; repeat it."
        ) from error
    return [imported for _, imported in done.values()]


def target_of(folder: str) -> str:
    """The store that a run folder's run belongs in: the server that its configuration names, or the database
    beside it. Raises RunError for anything but a run folder."""
    run = RunFolder(folder)
    if not run.config.is_file():
        raise RunError(f"{folder} is no run folder. Say where its runs should go: --into URI")
    return tracking_uri(run.read_config(), folder)


# ---- writing -----------------------------------------------------------------------------------------------


def _import(target: "MlflowClient", into: str, run: Source) -> Imported:
    """One run into the target: a new run there, or what is missing in the one of an earlier import."""
    experiment_id = open_experiment(target, into, run.experiment, _beside(into))
    run_id = _find(target, experiment_id, run.id)
    new = not run_id
    if new:
        tags = {
            **{key: value for key, value in run.tags.items() if key not in (PARENT_TAG, "mlflow.runName")},
            SOURCE_TAG: run.id,
        }
        run_id = target.create_run(
            experiment_id, start_time=run.start_ms, tags=tags, run_name=run.name
        ).info.run_id
    there = target.get_run(run_id)
    for dataset in run.dataset_inputs if new else ():
        target.log_inputs(run_id, datasets=[dataset])
    records = list(_lacking(target, there, run.records))
    left_out = run.num_skipped + send(target, run_id, records)
    _send_files(target, run_id, run.files)
    if run.status != "RUNNING" and (there.info.status, there.info.end_time) != (run.status, run.end_ms):
        target.set_terminated(run_id, run.status, run.end_ms)
    return Imported(run.name, run_id, new, sum(map(is_point, records)), run.status, left_out)


def _lacking(target: "MlflowClient", there: Any, records: Iterable[Record]) -> Iterator[Record]:
    """Those that the target's run does not have."""
    known = {  # (key, step) → the newest (time, value)
        (key, point.step): (point.timestamp, point.value)
        for key in there.data.metrics
        for point in sorted(
            target.get_metric_history(there.info.run_id, key), key=lambda point: point.timestamp
        )
    }
    for record in records:
        if is_point(record):
            key, value, time_ms, step = record["metric"]
            then_ms, there_now = known.get((key, step), (-math.inf, None))
            if value != there_now and time_ms > then_ms:  # a repeated evaluation has others at the same step
                known[key, step] = (time_ms, value)
                yield record
        elif isinstance(record.get("params"), dict):
            yield {"params": {k: v for k, v in record["params"].items() if k not in there.data.params}}
        elif not ("dataset" in record and there.inputs and there.inputs.dataset_inputs):
            yield record


def _beside(into: str) -> str:
    """Beside which folder a local target keeps artifacts (open_experiment wants a run folder in it)."""
    path = sqlite_path(into)
    return str(path.parent / "run") if path is not None else "."


def _find(target: "MlflowClient", experiment_id: str, source_id: str) -> str:
    """The target's run for a source: made by it, or by an earlier import. "" when there is none."""
    try:
        return str(target.get_run(source_id).info.run_id)
    except Exception as error:
        if getattr(error, "error_code", "") not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    found = target.search_runs([experiment_id], f"tags.`{SOURCE_TAG}` = '{source_id}'", max_results=1)
    return str(found[0].info.run_id) if found else ""


def _send_files(target: "MlflowClient", run_id: str, files: Iterable[tuple[Path, str]]) -> None:
    """Those that the target does not have at this size; figures may change and keep it."""
    sizes: dict[str, dict[str, int]] = {}
    for path, folder in files:
        if folder not in sizes:
            sizes[folder] = {
                entry.path: entry.file_size
                for entry in target.list_artifacts(run_id, folder or None)
                if not entry.is_dir
            }
        name = f"{folder}/{path.name}" if folder else path.name
        same = sizes[folder].get(name) == path.stat().st_size
        if not same or (path.suffix == ".json" and _content(target, run_id, name) != path.read_bytes()):
            target.log_artifact(run_id, str(path), folder or None)


def _content(target: "MlflowClient", run_id: str, name: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="gensr-import-") as folder:
        return Path(target.download_artifacts(run_id, name, folder)).read_bytes()


def is_same(source: str, into: str) -> bool:
    """Whether both name one store; an sqlite file may be given as a path."""
    files = [sqlite_path(uri) or Path(uri) for uri in (source, into)]
    return source == into or (sqlite_path(into) is not None and files[0].resolve() == files[1].resolve())


# ---- reading -----------------------------------------------------------------------------------------------


def read_source(source: str) -> Iterator[Source]:
    """The runs of a store or folder, one at a time. Raises RunError when there are none."""
    path = Path(source)
    if is_server(source) or source.startswith("sqlite:"):
        yield from _of_store(connect(must_exist(source)), None)
    elif path.is_file():
        yield from _of_store(connect(must_exist(sqlite_uri(path.resolve()))), path.resolve().parent)
    elif RunFolder(path).config.is_file():
        yield of_folder(path)
    elif folders := sorted(file.parent for file in path.glob("*/config.yaml")):
        yield from map(of_folder, folders)
    else:
        raise RunError(
            f"{source} is not a run folder, a folder of run folders, a sqlite file (mlflow.db) or an address "
            "of a tracking server"
        )


def _of_store(client: "MlflowClient", folder: Path | None) -> Iterator[Source]:
    experiments = {experiment.experiment_id: experiment.name for experiment in client.search_experiments()}
    token, count = None, 0
    while True:
        page = client.search_runs(list(experiments), max_results=PAGE, page_token=token)
        for run in page:
            count += 1
            with tempfile.TemporaryDirectory(prefix="gensr-import-") as scratch:  # until the next run
                yield _of_run(client, run, experiments[run.info.experiment_id], folder, Path(scratch))
        token = page.token
        if not token:
            break
    if not count:
        raise RunError("the store to import from holds no runs")


def _of_run(client: "MlflowClient", run: Any, experiment: str, folder: Path | None, scratch: Path) -> Source:
    info, data = run.info, run.data
    records: list[Record] = [{"params": dict(data.params)}] if data.params else []
    for key in data.metrics:
        records += [
            {"metric": [key, point.value, point.timestamp, point.step]}
            for point in client.get_metric_history(info.run_id, key)
        ]
    return Source(
        id=info.run_id,
        name=info.run_name,
        experiment=experiment,
        status=info.status,
        start_ms=info.start_time,
        end_ms=info.end_time or 0,
        tags=dict(data.tags),
        dataset_inputs=list(run.inputs.dataset_inputs if run.inputs else ()),
        records=records,
        files=list(_artifacts(client, run, folder, scratch)),
    )


def _artifacts(
    client: "MlflowClient", run: Any, folder: Path | None, scratch: Path
) -> Iterator[tuple[Path, str]]:
    """Files of a run and their folders, fetched into `scratch` from a server; where the store was copied here
    from another machine, its artifacts are beside it."""
    location = run.info.artifact_uri
    root = path_of_file_uri(location)
    if folder is not None and not root.is_dir():
        root = folder / "mlartifacts" / str(root).partition("/mlartifacts/")[2]
    if is_server(location) or location.startswith("mlflow-artifacts:"):
        root = scratch
        if client.list_artifacts(run.info.run_id):
            client.download_artifacts(run.info.run_id, "", str(root))
    for path in sorted(file for file in root.rglob("*") if file.is_file()):
        parent = str(path.parent.relative_to(root))
        yield path, "" if parent == "." else parent


def of_folder(folder: Path) -> Source:
    """A run folder as a run: what its tracker would have recorded, with times counted from its beginning."""
    run = RunFolder(folder)
    config, status = run.read_config(), run.read_status()
    start_ms = int(run.config.stat().st_ctime * 1000)
    lines, num_skipped = _lines(run.metrics)
    spooled, skipped = _lines(run.spool)
    num_skipped += skipped
    records: list[Record] = [
        record for record in spooled if "artifact" not in record and "status" not in record
    ]
    records += describe(config, folder, run.read_environment(), _manifest(config))
    records += list(_points(lines, start_ms))
    files = []
    for path in sorted(run.machine.glob("*.jsonl")):
        samples, skipped = _lines(path)
        num_skipped += skipped
        records += [point for sample in samples for point in machine_points(path.stem, sample)]
    for evaluated in EVALUATED:
        path = run.evaluation(evaluated)
        if path.is_file():
            figures = metrics_of(read_evaluation_file(path), evaluated)
            made_ms = path.stat().st_mtime_ns // 1_000_000
            records += [{"metric": [name, value, made_ms, 0]} for name, value in figures.items()]
            files.append((path, ""))
    files += [(path, "report") for path in sorted(run.report.glob("*.png"))]
    return Source(
        id=read_run_file(folder) or f"folder-{_identity(folder, lines)}",
        name=config.tracking.run_name or folder.resolve().name,
        experiment=config.tracking.experiment,
        status=STATUS.get(status.get("status", ""), "FAILED"),
        start_ms=start_ms,
        end_ms=start_ms + int(status.get("progress", {}).get("train_s", 0.0) * 1000),
        records=records,
        files=files,
        num_skipped=num_skipped,
    )


def _identity(folder: Path, lines: list[dict[str, Any]]) -> str:
    """Of a folder that never had a run: its settings and its first measurement."""
    content = RunFolder(folder).config.read_text(encoding="utf-8") + json.dumps(lines[:1])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _points(lines: Iterable[Mapping[str, Any]], start_ms: int) -> Iterator[Record]:
    """metrics.jsonl as points, named as training names them."""
    seconds = 0.0
    for line in lines:
        if "kind" not in line or not is_number(line.get("step")):
            continue
        if is_number(line.get("train_s")) and math.isfinite(line["train_s"]):
            seconds = line["train_s"]
        for name, value in line.items():
            if name not in ("kind", "step") and is_number(value):
                time_ms = start_ms + int(seconds * 1000)
                yield {"metric": [metric_name(f"{line['kind']}/{name}"), float(value), time_ms, line["step"]]}


def _manifest(config: Config) -> Any:
    try:
        return read_manifest(config.data.dir)
    except DataError:  # the prepared folder is not here
        return None


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a file, and how many of its lines are none."""
    lines, records = JsonLines(path), []
    while (page := lines.read())[1] > lines.position:
        records += page[0]
        lines.position = page[1]
    return records, lines.num_skipped
