"""The files of a run folder: the one place that names them, and the readers of what others need of them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.secrets import masked
from data_shards.settings import flatten, read_yaml, to_dict
from trainer.config import Config
from trainer.configs import config_from_dict
from trainer.errors import RunError

STATUSES = ("running", "stopped", "finished", "failed", "crashed")
NESTED = ("git", "packages", "hardware", "parameters", "slurm")  # mappings of environment.json
MOST = 2**62  # of any integer: longer ones are no float


@dataclass(frozen=True)
class RunFolder:
    """RUN. Nothing is read before it is asked for."""

    path: Path

    def __init__(self, path: "str | Path") -> None:
        object.__setattr__(self, "path", Path(path))

    # ---- what a run is and where it stands -----------------------------------------------------------------

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Commit, packages, hardware."""
        return self.path / "environment.json"

    @property
    def status(self) -> Path:
        """{"status": running | stopped | finished | failed | crashed, "progress": {…}}."""
        return self.path / "status.json"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def metrics(self) -> Path:
        """A record a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    # ---- what came of it -----------------------------------------------------------------------------------

    @property
    def model(self) -> Path:
        """The best weights so far (runs/weights.py)."""
        return self.path / "model"

    @property
    def retrieval(self) -> Path:
        """Indexes of the catalogue."""
        return self.path / "retrieval"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def evaluation(self, name: str) -> Path:
        """name: SPLIT, SPLIT-full, SPLIT-hard."""
        return self.path / f"evaluation-{name}.json"

    def ranks(self, name: str) -> Path:
        """One row an event, beside evaluation(name)."""
        return self.path / f"evaluation-{name}.parquet"

    def lists(self, name: str) -> Path:
        """The best candidates of each event, only where they were asked for."""
        return self.path / f"lists-{name}.parquet"

    def is_evaluated(self, name: str) -> bool:
        return self.evaluation(name).is_file() and self.ranks(name).is_file()

    # ---- where else it is known ----------------------------------------------------------------------------

    @property
    def tracking(self) -> Path:
        """Which MLflow run is its own."""
        return self.path / "tracking.json"

    @property
    def spool(self) -> Path:
        """What the tracker has not sent yet."""
        return self.path / "tracking-spool.jsonl"

    @property
    def machine(self) -> Path:
        """NODE.jsonl: what each node measures of itself."""
        return self.path / "machine"

    @property
    def registry(self) -> Path:
        """Which version it became."""
        return self.path / "registry.json"

    # ---- readers -------------------------------------------------------------------------------------------

    def must_exist(self) -> None:
        """Raises RunError when the folder holds no run."""
        if not self.config.is_file():
            raise RunError(
                f"{self.path} is not a run folder: config.yaml is missing. Train one with: gensr train"
            )

    def read_config(self) -> Config:
        """Raises RunError when the folder holds no run."""
        self.must_exist()
        return config_from_dict(read_yaml(self.config))

    def read_settings(self) -> dict[str, Any]:
        """The configuration by dotted key, secrets masked, as it is understood today: a key that came later
        has its default in an older run. Raises as read_config()."""
        return dict(flatten(masked(to_dict(self.read_config()))))

    def read_status(self) -> dict[str, Any]:
        """status.json: "status", and "progress" as numbers by name; {} where there is none, half a one, or
        one that is damaged."""
        document = {"progress": {}, **read_json(self.status)}
        known = document.get("status") in STATUSES and _is_progress(document["progress"])
        return document if known else {}

    def read_progress(self) -> dict[str, Any]:
        """Of status.json; {} as there."""
        progress: dict[str, Any] = self.read_status().get("progress", {})
        return progress

    def standing(self) -> str:
        """`its run has stopped at step 1,200`, or "" where nothing says so."""
        status = self.read_status()
        if not status:
            return ""
        how = describe_status(status["status"])
        return f"its run {how}{',' if ',' in how else ''} at step {status['progress'].get('step', 0):,}"

    def read_environment(self) -> dict[str, Any]:
        """environment.json; without the parts of a damaged one that are not as it was written."""
        facts = read_json(self.environment)
        return {key: value for key, value in facts.items() if key not in NESTED or isinstance(value, dict)}

    @property
    def has_ended_well(self) -> bool:
        return self.read_status().get("status") == "finished"


def describe_status(status: str) -> str:
    """What a run with this status does or did: a killed one has no time to say so."""
    return "is running, or was killed" if status == "running" else f"has {status}"


def _is_progress(progress: Any) -> bool:
    """Numbers by name, among them "best_metrics", which are numbers by name."""
    if not isinstance(progress, dict):
        return False
    metrics = progress.get("best_metrics", {})
    numbers = [value for name, value in progress.items() if name != "best_metrics"]
    return isinstance(metrics, dict) and all(
        isinstance(value, bool) or (is_number(value) and math.isfinite(value))
        for value in [*numbers, *metrics.values()]
    )


def is_number(value: Any) -> bool:
    """Whether what stands in a file that may be damaged can be counted and drawn."""
    if isinstance(value, int):
        return not isinstance(value, bool) and -MOST <= value <= MOST
    return isinstance(value, float)


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; {} where it is missing or not whole."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
