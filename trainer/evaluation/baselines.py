"""The rows that stand beside every evaluation: models that are counted from the folder, on the same
candidates."""

from collections.abc import Callable
from typing import Any, TypeVar

from trainer.data.folder import PreparedFolder
from trainer.models.contract import Ranker
from trainer.models.zoo import model_class
from trainer.runs.weights import counted_model

T = TypeVar("T")
# name in reports: (model.name, its settings)
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "popularity": ("popularity", {}),
    "lightgcn": ("lightgcn", {"by": "user"}),
    "lightgcn_history": ("lightgcn", {"by": "history"}),
    "bm25": ("bm25", {}),
}


def available(folder: PreparedFolder, tasks: set[int]) -> list[str]:
    """Names of the baselines for these tasks; LightGCN only where the folder has a CF table."""
    kinds = {name: model_class(model) for name, (model, _) in BASELINES.items()}
    return [
        name
        for name, kind in kinds.items()
        if set(kind.tasks) & tasks and (folder.has_cf or "cf" not in kind.needs)
    ]


def build_baseline(name: str, folder: PreparedFolder) -> Ranker:
    """Counted from the folder, ready to score on the CPU."""
    model, settings = BASELINES[name]
    return counted_model(model, settings, folder)


def each_baseline(
    folder: PreparedFolder, tasks: set[int], measure: Callable[[str, Ranker], T]
) -> dict[str, T]:
    """measure(name, baseline) of every one that is available; one is in memory at a time."""
    return {name: measure(name, build_baseline(name, folder)) for name in available(folder, tasks)}
