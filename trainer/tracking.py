"""The only tracker: one MLflow run a job, from rank 0, that never stops or slows training.

Once a run has started, a store that fails is reported once; points then go to RUN/tracking-spool.jsonl and are sent when the store
answers again, at the end of the run or after a resume. The client interface is used instead of mlflow's global "active run": the run
of a killed process stays RUNNING instead of turning FINISHED.
"""

import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import yaml

from data_shards.schema import Manifest
from data_shards.settings import flatten, to_dict
from trainer.config import Config
from trainer.errors import EnvironmentProblem
from trainer.files import atomic

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]
SPOOL_NAME = "tracking-spool.jsonl"
RUN_FILE = "tracking.json"  # where a run folder says which MLflow run is its own
RETRY_EVERY_S = 60.0
MAX_TAG, MAX_PARAM, MAX_DIGEST = 5000, 6000, 36  # characters, MLflow's limits
MAX_METRICS, MAX_TAGS = 1000, 100  # entries of one request, MLflow's limits

log = logging.getLogger(__name__)


class Tracker:
    """What the training loop sees. This base class records nothing: ranks above 0, and tracking.enabled=false."""

    run_id: str = ""

    @staticmethod
    def start(config: Config, run_dir: str | Path, facts: Mapping[str, Any], enabled: bool = True, resume_run_id: str | None = None) -> "Tracker":
        """Open a new MLflow run, or `resume_run_id` again.

        `facts` describes data, code and machine as nested plain values. Known keys: "manifest" (a Manifest, becomes the run's dataset),
        "git" with "commit", "dirty", "diff"; everything else becomes tags.
        Raises EnvironmentProblem when a new run cannot be opened; a resumed run goes on with a spool instead.
        """
        if not (enabled and config.tracking.enabled):
            return NullTracker()
        return MlflowTracker(config, Path(run_dir), facts, resume_run_id)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One request for all of `metrics`. "@" in names becomes "_at_": rec/recall@10 → rec/recall_at_10."""

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """A file (plot, table, log) under the run's artifacts."""

    def log_dict(self, document: Mapping[str, Any], file_name: str) -> None:
        """A mapping as a YAML or JSON artifact."""

    def finish(self, status: Status) -> None:
        """Send what is left and close the run. Do not call it for a job that will be requeued: its run stays RUNNING."""


class NullTracker(Tracker):
    """Records nothing."""


class MlflowTracker(Tracker):
    """Rank 0's tracker. Every write is a list of plain records, so that the same records can be sent now or spooled."""

    def __init__(self, config: Config, run_dir: Path, facts: Mapping[str, Any], resume_run_id: str | None) -> None:
        self._spool = run_dir / SPOOL_NAME
        self._warned = False
        self._retry_at = 0.0
        self._last_step: dict[str, int] | None = None if resume_run_id else {}
        self.uri = tracking_uri(config, run_dir)
        if resume_run_id:
            self.run_id = resume_run_id
            self._attempt(lambda: self._client.update_run(resume_run_id, status="RUNNING"))
        else:
            self.run_id = self._create(config, run_dir)
            self._describe(config, run_dir, facts)
        self._deliver([])  # what an earlier process of this run could not send

    @cached_property
    def _client(self) -> "MlflowClient":
        """Connected on first use, so that a store which cannot be opened is handled where any failing request is."""
        return connect(self.uri)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        last = self._logged_steps()
        records = []
        for name, value in metrics.items():
            key = metric_name(name)
            if step > last.get(key, -1):  # after a resume the steps since the checkpoint are run, and reported, again
                last[key] = step
                records.append({"metric": [key, float(value), now_ms, step]})
        self._deliver(records)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        self._deliver([{"artifact": str(path), "folder": folder}])

    def log_dict(self, document: Mapping[str, Any], file_name: str) -> None:
        self._deliver([{"text": dump(document, file_name), "file": file_name}])

    def finish(self, status: Status) -> None:
        self._retry_at = 0.0
        self._deliver([])
        self._attempt(lambda: self._client.set_terminated(self.run_id, status))

    def _create(self, config: Config, run_dir: Path) -> str:
        try:
            experiment_id = open_experiment(self._client, self.uri, config.tracking.experiment, run_dir)
            run = self._client.create_run(experiment_id, run_name=config.tracking.run_name or run_dir.name)
        except Exception as error:
            raise EnvironmentProblem(
                f"MLflow at {mask_secrets(self.uri)} does not open a run: {one_line(error)}\n"
                "Check tracking.uri and that its folder can be written, or train without it: tracking.enabled=false"
            ) from error
        with atomic(run_dir / RUN_FILE) as path:
            path.write_text(json.dumps({"uri": mask_secrets(self.uri), "experiment_id": experiment_id, "run_id": run.info.run_id}, indent=2) + "\n")
        return str(run.info.run_id)

    def _describe(self, config: Config, run_dir: Path, facts: Mapping[str, Any]) -> None:
        tree = masked(to_dict(config))
        records: list[dict[str, Any]] = [{"params": {key: str(value)[:MAX_PARAM] for key, value in flatten(tree).items()}}]
        rest = {key: value for key, value in facts.items() if key != "manifest"}
        git = dict(rest.get("git") or {})
        if diff := git.pop("diff", ""):
            records.append({"text": str(diff), "file": "code.diff"})
        tags = flatten(masked({**rest, "git": git}))
        if git.get("commit"):
            tags["mlflow.source.git.commit"] = git["commit"]
        manifest = facts.get("manifest")
        if isinstance(manifest, Manifest):
            tags |= {"manifest_hash": manifest.hash, "split_fingerprint": manifest.fingerprint}
            records.append({"dataset": dataset_record(manifest, config.data.dir)})
        records.append({"tags": {key: str(value)[:MAX_TAG] for key, value in tags.items()}})
        records.append({"text": dump(tree, "config.yaml"), "file": "config.yaml"})
        if (run_dir / "environment.json").is_file():
            records.append({"artifact": str(run_dir / "environment.json"), "folder": ""})
        self._deliver(records)

    def _logged_steps(self) -> dict[str, int]:
        """The last step of each metric that the store or the spool has. Asked once, after a resume."""
        if self._last_step is None:
            steps: dict[str, int] = {}
            try:
                for key in self._client.get_run(self.run_id).data.metrics:
                    steps[key] = max(point.step for point in self._client.get_metric_history(self.run_id, key))
            except Exception as error:
                self._warn(error)
                self._retry_at = time.monotonic() + RETRY_EVERY_S
            for record in self._read_spool():
                if "metric" in record:
                    key, _, _, step = record["metric"]
                    steps[key] = max(step, steps.get(key, -1))
            self._last_step = steps
        return self._last_step

    def _deliver(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Send what was spooled, then `records`. On failure all of it is in the spool."""
        if time.monotonic() < self._retry_at:
            self._append_to_spool(records)
            return
        waiting = self._read_spool()
        if not waiting and not records:
            return
        try:
            self._send([*waiting, *records])
        except Exception as error:
            self._append_to_spool(records)
            self._warn(error)
            self._retry_at = time.monotonic() + RETRY_EVERY_S
            return
        self._spool.unlink(missing_ok=True)

    def _send(self, records: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        points = [Metric(*r["metric"]) for r in records if "metric" in r]
        for chunk in chunks(points, MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=chunk)
        for record in records:
            if "params" in record:
                for chunk in chunks([Param(k, v) for k, v in record["params"].items()], MAX_TAGS):
                    self._client.log_batch(self.run_id, params=chunk)
            elif "tags" in record:
                for chunk in chunks([RunTag(k, v) for k, v in record["tags"].items()], MAX_TAGS):
                    self._client.log_batch(self.run_id, tags=chunk)
            elif "dataset" in record:
                self._client.log_inputs(self.run_id, datasets=[dataset_input(record["dataset"])])
            elif "text" in record:
                self._client.log_text(self.run_id, record["text"], record["file"])
            elif "artifact" in record:
                self._client.log_artifact(self.run_id, record["artifact"], record["folder"] or None)

    def _attempt(self, action: Any) -> None:
        try:
            action()
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            log.warning("MLflow at %s failed (%s). Training goes on; points are kept in %s", mask_secrets(self.uri), one_line(error), self._spool)
        self._warned = True

    def _read_spool(self) -> list[dict[str, Any]]:
        if not self._spool.is_file():
            return []
        records = []
        for line in self._spool.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # the last line of a killed process
                continue
        return records

    def _append_to_spool(self, records: Sequence[Mapping[str, Any]]) -> None:
        try:
            with self._spool.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        except OSError as error:  # a full disk must not stop training either
            self._warn(error)


def tracking_uri(config: Config, run_dir: str | Path) -> str:
    """tracking.uri, or the sqlite file beside the run folder."""
    return config.tracking.uri or f"sqlite:///{Path(run_dir).resolve().parent / 'mlflow.db'}"


def connect(uri: str) -> "MlflowClient":
    """A client whose requests fail within seconds, not minutes, and which says nothing on its own."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow"):  # database migrations and hints
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def open_experiment(client: "MlflowClient", uri: str, name: str, run_dir: str | Path) -> str:
    """Id of the experiment; made if it is new. A local store keeps artifacts in mlartifacts/ beside the run folder, a server decides for itself."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        is_server = urlsplit(uri).scheme in ("http", "https")
        location = None if is_server else (Path(run_dir).resolve().parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another job was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def dataset_record(manifest: Manifest, data_dir: str) -> dict[str, Any]:
    raw = manifest.raw
    profile = {"counts": raw.get("counts"), "split": raw.get("split"), "seeds": raw.get("seeds"), "manifest_hash": manifest.hash}
    return {"name": str(raw.get("source", {}).get("name", "prepared")), "digest": manifest.hash, "uri": mask_secrets(data_dir), "profile": profile}


def dataset_input(record: Mapping[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=record["name"],
        digest=record["digest"][:MAX_DIGEST],
        source_type="local",
        source=json.dumps({"uri": record["uri"]}),
        profile=json.dumps(record["profile"]),
    )
    return DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", "training")])


def metric_name(name: str) -> str:
    """MLflow refuses "@": rec/recall@10 → rec/recall_at_10."""
    return name.replace("@", "_at_")


def mask_secrets(text: str) -> str:
    """Hide passwords in URLs: user:password@host and ?token=…"""
    text = re.sub(r"://[^/@\s]+@", "://***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:key|token|secret|password|signature|credential)[^=&\s]*=)[^&\s]+", r"\1***", text)


def masked(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping with mask_secrets applied to every text in it."""

    def visit(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: visit(child) for key, child in value.items()}
        if isinstance(value, list | tuple):
            return [visit(child) for child in value]
        return mask_secrets(value) if isinstance(value, str) else value

    return {key: visit(value) for key, value in tree.items()}


def dump(document: Mapping[str, Any], file_name: str) -> str:
    if file_name.endswith((".yaml", ".yml")):
        return yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)
    return json.dumps(document, indent=2, ensure_ascii=False)


def one_line(error: BaseException) -> str:
    """The first line of an error, for messages of our own."""
    text = str(error).strip().splitlines()
    return mask_secrets(text[0]) if text else type(error).__name__


def chunks(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
