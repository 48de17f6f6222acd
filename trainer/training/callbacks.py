"""What a training run tells whoever wants to know. The terminal and the tracker are ordinary listeners."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.tracking.tracker import Tracker
from trainer.training.console import RunConsole


class Callback:
    """Override what you need; every method here does nothing.

    Methods are called on rank 0, on the thread that trains: they must not communicate with other ranks, and
    training waits for them. An exception ends the run as any other error does.
    """

    def on_step(self, step: int, num_steps: int) -> None:
        """An optimizer step has been made; `step` counts from 1. Nothing has left the device."""

    def on_log(self, step: int, record: Mapping[str, float]) -> None:
        """Every run.log_every_steps: means since the last record. loss, its parts, lr, epoch, events_per_s,
        memory_gb (peak so far: of tensors on a GPU, of the whole process on a CPU), train_s."""

    def on_validation(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        """metrics: rec/…, src/… and mean/… of the validation sample. is_best: RUN/model now holds these
        weights."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """The checkpoint of `step` is complete: written, synced and named `latest`. Training is already some
        steps further."""


class Listeners(Callback):
    """Tells several, in their order; none at all on ranks above 0."""

    def __init__(self, callbacks: Sequence[Callback], enabled: bool = True) -> None:
        self._callbacks = list(callbacks) if enabled else []

    def on_step(self, step: int, num_steps: int) -> None:
        self._tell("on_step", step, num_steps)

    def on_log(self, step: int, record: Mapping[str, float]) -> None:
        self._tell("on_log", step, record)

    def on_validation(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        self._tell("on_validation", step, metrics, is_best)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self._tell("on_checkpoint", step, folder)

    def _tell(self, method: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, method)(*arguments)


class Shown(Callback):
    """On the terminal, in train.log and in metrics.jsonl."""

    def __init__(self, console: RunConsole) -> None:
        self._console = console

    def on_step(self, step: int, num_steps: int) -> None:
        self._console.advance(step)

    def on_log(self, step: int, record: Mapping[str, float]) -> None:
        self._console.step(step, record)

    def on_validation(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        self._console.record({"kind": "valid", "step": step, **metrics})


class Tracked(Callback):
    """In MLflow, and where else tracking.also says."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def on_log(self, step: int, record: Mapping[str, float]) -> None:
        self._tracker.log_metrics({f"train/{name}": value for name, value in record.items()}, step)

    def on_validation(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        self._tracker.log_metrics({f"valid/{name}": value for name, value in metrics.items()}, step)
