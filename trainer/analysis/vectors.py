"""What a trained model makes of test events: the vectors and scores that the analyses look at.

Each event gives two rows: the clicked item (label 1) and its first stored negative (label 0). Models without
Ranker.representations() are recorded: `hidden` is the input of the last layer of score(), and it stands for
`history` and `input`, too; `recorded` says which layer that was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_shards.schema import TASKS
from trainer.batch import Batch
from trainer.config import DataConfig
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.errors import DataError
from trainer.models.contract import Ranker
from trainer.runtime.device import autocast, has_gpu

KINDS = ("history", "input", "hidden")
BATCH_EVENTS = 64


@dataclass(frozen=True)
class Vectors:
    """One row an event and item, clicked ones first; [n] or [n, D]."""

    event_id: NDArray[np.int64]
    user: NDArray[np.int64]
    task: NDArray[np.int64]
    label: NDArray[np.int64]  # 1: the clicked item, 0: a stored negative
    score: NDArray[np.float32]
    probability: NDArray[np.float32]  # of a click, as the model gives it
    history: NDArray[np.float32]
    input: NDArray[np.float32]
    hidden: NDArray[np.float32]
    recorded: str  # the layer whose input `hidden` is; "": the model shows its vectors itself

    def take(self, rows: NDArray[Any]) -> "Vectors":
        """Rows by indices or a mask [n]."""
        arrays = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays)

    def of(self, task: str, label: int | None = None) -> "Vectors":
        """The rows of one task, and of one label where it is given."""
        chosen = self.task == TASKS.index(task)
        return self.take(chosen if label is None else chosen & (self.label == label))

    @property
    def tasks(self) -> list[str]:
        return [name for number, name in enumerate(TASKS) if (self.task == number).any()]


def load_vectors(
    run_dir: str | Path, split: str = "test", num_events: int = 2000, min_users: int = 0
) -> Vectors:
    """Of a run's best weights. num_events: of each task, a fixed sample that is the same for every run on one
    prepared folder; 0 = all. Raises RunError for a folder without a model, DataError for a model that has no
    layers to look at, or where the events of a task are of fewer users than min_users."""
    from trainer.runs.weights import load_run_model  # transformers: seconds to import

    device = "cuda" if has_gpu() else "cpu"
    model, config, folder = load_run_model(run_dir, device)
    for task in model.tasks if min_users else ():
        stream = _stream(folder, split, config.data, num_events, task)
        _check_users(stream, split, task, num_events, min_users)
    with autocast(device, config.run.precision):
        return vectors_of(model, folder, config.data, split, num_events)


def vectors_of(
    model: Ranker, folder: PreparedFolder, data: DataConfig, split: str = "test", num_events: int = 2000
) -> Vectors:
    """load_vectors() of a model at hand, in evaluation mode."""
    parts, recorded = [], ""
    present = folder.tasks(split)
    for label in (1, 0):
        for task in model.tasks:
            if task not in present:
                continue
            for batch in _stream(folder, split, data, num_events, task):
                columns, recorded = _rows(model, batch.to(model.device), label)
                parts.append({name: column[batch.event_id.numpy() >= 0] for name, column in columns.items()})
    if not parts:
        raise DataError(f"{folder.name}: the {split} split has no events of the model's tasks")
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Vectors(**joined, recorded=recorded)


def _stream(folder: PreparedFolder, split: str, data: DataConfig, num_events: int, task: int) -> EvalStream:
    return EvalStream(folder, split, data, BATCH_EVENTS, max_events=num_events, tasks=(task,))


def _check_users(stream: EvalStream, split: str, task: int, num_events: int, min_users: int) -> None:
    """Reading the events takes seconds, their vectors may take hours: so it is said before."""
    users = torch.cat([torch.empty(0, dtype=torch.long), *(b.user[b.event_id >= 0] for b in stream)])
    num_users = len(users.unique())
    if 0 < num_users < min_users:
        fix = "raise --events" if len(users) == num_events else f"the {split} split has no more"
        raise DataError(
            f"{num_users} users among {len(users)} {TASKS[task]} events; at least {min_users} needed: {fix}"
        )


@torch.no_grad()
def _rows(model: Ranker, batch: Batch, label: int) -> tuple[dict[str, NDArray[Any]], str]:
    batch = _one_item(batch, label)
    with _last_layer(model, batch.num_events) as seen:
        score_B = model(model.prepare(batch), mode="score")[:, 0].float()
    shown = model.representations(batch)
    recorded = ""
    if not shown:
        if not seen:
            raise DataError(
                f"{model.title} has no layer between an event and its score: there is nothing to look at"
            )
        (recorded, hidden_BD), *_ = seen.items()
        shown = dict.fromkeys(KINDS, hidden_BD)
    columns = {
        "event_id": batch.event_id,
        "user": batch.user,
        "task": batch.task,
        "label": torch.full_like(batch.task, label),
        "score": score_B,
        "probability": model.probability(score_B),
        **{name: shown[name].float() for name in KINDS},
    }
    return {name: column.cpu().numpy() for name, column in columns.items()}, recorded


def _one_item(batch: Batch, label: int) -> Batch:
    """The clicked item alone, or the first of the others alone; labelled 1 in both cases, since that is the
    item that representations() looks at."""
    place_B = batch.labels.argmax(1) if label else batch.labels.argmin(1)
    item_B1 = batch.candidates.gather(1, place_B[:, None])
    return batch.with_candidates(item_B1, torch.ones_like(item_B1, dtype=torch.float32))


@contextmanager
def _last_layer(model: nn.Module, num_events: int) -> Iterator[dict[str, Tensor]]:
    """Records, while it lasts, the input [B, D] of the last layer that was called with a vector an event;
    without one, the mean over positions of the last that was called with a sequence an event."""
    seen: dict[str, Tensor] = {}
    sequences: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            given = inputs[0] if inputs else None
            if not isinstance(given, Tensor) or not given.is_floating_point() or given.ndim < 2:
                return
            if given.shape[-1] > 1 and given.numel() == num_events * given.shape[-1]:
                seen.clear()
                seen[name] = given.reshape(num_events, -1)
            elif given.shape[-1] > 1 and given.shape[0] == num_events and given.ndim == 3:
                sequences.clear()
                sequences[f"{name} (mean over positions)"] = given.mean(1)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(record(name)) for name, module in leaves if name]
    try:
        yield seen
        seen.update({} if seen else sequences)
    finally:
        for handle in handles:
            handle.remove()
