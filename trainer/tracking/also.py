"""tracking.also: the same numbers in TensorBoard or Weights & Biases, through accelerate's trackers.

MLflow stays the registry and the default. These get metrics and settings; what they do on a slow network is
theirs.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_shards.secrets import masked
from data_shards.settings import flatten, to_dict
from trainer.config import ALSO, Config
from trainer.errors import EnvironmentProblem
from trainer.tracking.tracker import Status, Tracker

log = logging.getLogger(__name__)


def beside(main: Tracker, config: Config, run_dir: Path) -> Tracker:
    """`main`, and with it those of tracking.also. Raises EnvironmentProblem where a package is missing or the
    service refuses."""
    others = [start(name, config, run_dir) for name in _names(config)]
    return Several(main, others) if others else main


def _names(config: Config) -> list[str]:
    return [name for name in config.tracking.also.split(",") if name]


def start(name: str, config: Config, run_dir: Path) -> Any:
    """accelerate's tracker of that name, started, with the run's settings."""
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # a run has made one; accelerate's loggers ask it
    run_name = config.tracking.run_name or run_dir.name
    try:
        if name == "tensorboard":
            tracker: Any = TensorBoardTracker("tensorboard", str(run_dir))  # RUN/tensorboard
        else:
            tracker = WandBTracker(config.tracking.experiment, name=run_name, dir=str(run_dir))
        tracker.start()
        settings = flatten(masked(to_dict(config)))
        tracker.store_init_configuration(
            {key: value for key, value in settings.items() if isinstance(value, bool | int | float | str)}
        )
    except Exception as error:  # an account that is missing, a folder that cannot be written
        reason = (str(error) or repr(error)).splitlines()[0]
        raise EnvironmentProblem(
            f"tracking.also={name}: failed to start: {reason}. Fix the cause, or drop it with tracking.also="
        ) from error
    return tracker


def check_packages(config: Config) -> None:
    """Raises EnvironmentProblem where one of tracking.also is not installed."""
    for name in _names(config):
        if not any(importlib.util.find_spec(package) for package in ALSO[name]):
            raise EnvironmentProblem(
                f"tracking.also={name}: the package is not installed. Install it (pip install {name}, or pip "
                f"install 'gensr[{name}]'), or leave it out: tracking.also="
            )


class Several(Tracker):
    """MLflow's tracker and others. One that fails later is dropped with a warning: training goes on."""

    def __init__(self, main: Tracker, others: Sequence[Any]) -> None:
        self._main, self._others = main, list(others)

    @property
    def run_id(self) -> str:
        return self._main.run_id

    @property
    def page(self) -> str:
        return self._main.page

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._main.log_metrics(metrics, step)
        self._tell("log", dict(metrics), step=step)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        self._main.log_artifact(path, folder)

    def log_dict(self, document: Mapping[str, Any], file_name: str) -> None:
        self._main.log_dict(document, file_name)

    def finish(self, status: Status) -> None:
        self._main.finish(status)
        self._tell("finish")

    def _tell(self, method: str, *arguments: Any, **named: Any) -> None:
        for other in list(self._others):
            try:
                getattr(other, method)(*arguments, **named)
            except Exception as error:
                self._others.remove(other)
                log.warning("%s takes no more records of this run: %s", type(other).__name__, error)
