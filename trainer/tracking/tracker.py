"""The only tracker: one MLflow run a job, from rank 0, that never stops or slows training.

Every call writes a line to RUN/tracking-spool.jsonl and returns; tracking/delivery.py sends it. The client
interface is used instead of mlflow's global "active run": the run of a killed process stays RUNNING instead
of turning FINISHED.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_shards.schema import Manifest
from data_shards.secrets import mask_secrets, masked
from data_shards.settings import flatten, to_dict
from trainer.config import Config
from trainer.errors import EnvironmentProblem
from trainer.runs.run_folder import RunFolder
from trainer.tracking.about import about_run, dataset_records
from trainer.tracking.delivery import Record, Sender
from trainer.tracking.store import (
    connect,
    dump,
    has_run,
    is_server,
    log_figures,
    metric_name,
    one_line,
    open_experiment,
    read_experiment_id,
    read_run_file,
    tracking_uri,
    training_page,
    write_run_file,
)

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]
MAX_TAG, MAX_PARAM = 5000, 6000  # characters, MLflow's limits
OPEN_WAIT_S = 30.0  # for the run's id, at the start; a store that is slower gets its run later
FINISH_WAIT_S = 60.0  # for the last points, at the end
STOP_WAIT_S = 20.0  # the same of a job that was told to stop: SLURM uses force after 30 s

log = logging.getLogger(__name__)


class Tracker:
    """What the training loop sees. This base class records nothing: ranks above 0, and
    tracking.enabled=false."""

    @property
    def run_id(self) -> str:
        """ "" without a run, and while the store has not opened it yet."""
        return ""

    @property
    def page(self) -> str:
        """Address of the experiment's page on an MLflow server; "" for a database, which no server shows."""
        return ""

    @staticmethod
    def start(
        config: Config,
        run_dir: str | Path,
        facts: Mapping[str, Any],
        enabled: bool = True,
        resume_run_id: str | None = None,
    ) -> "Tracker":
        """Open a new MLflow run, or continue the one that RUN/tracking.json names for this store, or
        without that file `resume_run_id`.

        `facts` describes data, code and machine as nested plain values. Known keys: "manifest" (a Manifest,
        becomes the run's dataset), "git" with "commit", "dirty", "diff"; everything else becomes tags. Raises
        EnvironmentProblem when a new run is refused (a wrong address or token, a file that cannot be opened);
        a server that does not answer gets the run when it does.
        """
        if not enabled:
            return Tracker()
        from trainer.tracking.also import beside, check_packages

        check_packages(config)
        in_mlflow = config.tracking.enabled
        main = MlflowTracker(config, Path(run_dir), facts, resume_run_id) if in_mlflow else Tracker()
        try:
            return beside(main, config, Path(run_dir))
        except EnvironmentProblem:
            main.finish("FAILED")  # nobody else would: this run does not begin
            raise

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """All of `metrics` at one step. "@" in names becomes "_at_": rec/recall@10 → rec/recall_at_10."""

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """A file (plot, table, log) under the run's artifacts."""

    def log_dict(self, document: Mapping[str, Any], file_name: str) -> None:
        """A mapping as a YAML or JSON artifact."""

    def finish(self, status: Status) -> None:
        """Send what is left and close the run. Do not call it for a job that will be requeued: its run stays
        RUNNING."""


class MlflowTracker(Tracker):
    """Rank 0's tracker: calls become records for the sender."""

    def __init__(
        self, config: Config, run_dir: Path, facts: Mapping[str, Any], resume_run_id: str | None
    ) -> None:
        self.uri, self._run_dir = tracking_uri(config, run_dir), run_dir
        known = read_run_file(run_dir, self.uri)
        # where the file is there, it says which store the id of the checkpoint is of
        if not RunFolder(run_dir).tracking.is_file():
            known = resume_run_id or ""

        def open_run(client: "MlflowClient") -> str:
            if known and has_run(client, known):
                return known
            if known:  # deleted meanwhile
                self._sender.put(describe(config, run_dir, facts, facts.get("manifest")))
            return self._create(client, config, run_dir)

        self._sender = Sender(self.uri, run_dir, open_run, resumed=bool(known))
        self._sender.run_id = known
        self._sender.put(
            [{"status": "RUNNING"}] if known else describe(config, run_dir, facts, facts.get("manifest"))
        )
        self._sender.unattended = bool(known)
        self._sender.start()
        if not known and not self._sender.opened.wait(OPEN_WAIT_S):
            self._sender.unattended = True
            log.warning(
                "MLflow at %s has not opened the run in %.0f s (slow, or locked by another program). "
                "Training continues; points are kept in %s",
                mask_secrets(self.uri),
                OPEN_WAIT_S,
                self._sender.spool.path,
            )
        if error := self._sender.refused:
            self._sender.spool.path.unlink(missing_ok=True)
            raise EnvironmentProblem(
                f"MLflow at {mask_secrets(self.uri)} does not open a run: {one_line(error)}\n"
                "Check tracking.uri and that its folder can be written, or train without it: "
                "tracking.enabled=false"
            ) from error

    @property
    def run_id(self) -> str:
        return self._sender.run_id

    @property
    def page(self) -> str:
        experiment_id = read_experiment_id(self._run_dir)
        return training_page(self.uri, experiment_id) if is_server(self.uri) and experiment_id else ""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        self._sender.put(
            [{"metric": [metric_name(name), float(value), now_ms, step]} for name, value in metrics.items()]
        )

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        self._sender.put([{"artifact": str(path), "folder": folder}])

    def log_dict(self, document: Mapping[str, Any], file_name: str) -> None:
        self._sender.put([{"text": dump(document, file_name), "file": file_name}])

    def finish(self, status: Status) -> None:
        self._sender.put([{"status": status, "end_ms": int(time.time() * 1000)}])
        complete = self._sender.close(STOP_WAIT_S if status == "KILLED" else FINISH_WAIT_S)
        if self._sender.num_lost:
            log.warning(
                "%d records of this run were left out: MLflow cannot take them", self._sender.num_lost
            )
        if not complete:
            spool = self._sender.spool.path
            log.warning(
                "MLflow at %s has not taken everything: gensr runs import %s sends it later",
                mask_secrets(self.uri),
                spool.parent,
            )

    def _create(self, client: "MlflowClient", config: Config, run_dir: Path) -> str:
        experiment_id = open_experiment(client, self.uri, config.tracking.experiment, run_dir)
        run = client.create_run(experiment_id, run_name=config.tracking.run_name or run_dir.name)
        write_run_file(run_dir, self.uri, experiment_id, run.info.run_id)
        return str(run.info.run_id)


def describe(
    config: Config, run_dir: Path, facts: Mapping[str, Any], manifest: Manifest | None
) -> list[Record]:
    """What a run is: settings as parameters, code, data and machine as tags, dataset and files."""
    tree = masked(to_dict(config))
    records: list[Record] = [
        {"params": {key: str(value)[:MAX_PARAM] for key, value in flatten(tree).items()}}
    ]
    rest = {key: value for key, value in facts.items() if key != "manifest"}
    git = dict(rest.get("git") or {})
    if diff := git.pop("diff", ""):
        records.append({"text": str(diff), "file": "code.diff"})
    tags = flatten(masked({**rest, "git": git}))
    tags |= about_run(config, masked(rest), manifest)
    if isinstance(manifest, Manifest):
        tags |= {"manifest_hash": manifest.hash, "split_fingerprint": manifest.fingerprint}
        records += [{"dataset": record} for record in dataset_records(manifest, config.data.dir)]
    records.append({"tags": {key: str(value)[:MAX_TAG] for key, value in tags.items()}})
    records.append({"text": dump(tree, "config.yaml"), "file": "config.yaml"})
    if RunFolder(run_dir).environment.is_file():
        records.append({"artifact": str(RunFolder(run_dir).environment), "folder": ""})
    return records


def log_evaluation(run_dir: Path, split: str, figures: Mapping[str, float], table: Sequence[str]) -> None:
    """The results of an evaluation → the run's figures, its table and evaluation-SPLIT.json. A store that
    fails costs a warning: repeat the evaluation, or import the folder."""
    config = RunFolder(run_dir).read_config()
    if not config.tracking.enabled:
        return
    uri = tracking_uri(config, run_dir)
    run_id = read_run_file(run_dir, uri)
    if not run_id:
        return
    try:
        client = connect(uri)
        log_figures(client, run_id, figures)
        client.log_text(run_id, "\n".join(table) + "\n", f"evaluation-{split}.txt")
        client.log_artifact(run_id, str(RunFolder(run_dir).evaluation(split)))
    except Exception as error:
        log.warning(
            "MLflow at %s has not taken the evaluation (%s): gensr runs import %s sends it later",
            mask_secrets(uri),
            one_line(error),
            run_dir,
        )
