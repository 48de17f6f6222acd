"""What a trained model says about some test events: how sure it is, and its best and worst answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.schema import NO_QUERY, SRC, TASKS
from trainer.analysis.calibration import Reliability, reliability
from trainer.batch import Batch
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.evaluation.metrics import expected_ranks
from trainer.evaluation.ranking import refuse_nan
from trainer.models.contract import Ranker, clicked_only
from trainer.runtime.device import autocast, default_device

NUM_EXAMPLES = 3  # best, and worst, of each task
NUM_READ = 5  # items of a history that an example names


@dataclass(frozen=True)
class Read:
    """An item of the history, and what each soft filter weighs it for the clicked item."""

    item: str
    searched: bool
    weights: dict[str, float]  # view → weight


@dataclass(frozen=True)
class Example:
    user: str
    query: str  # "" for a recommendation
    clicked: str
    rank: float  # of the clicked item, 1 = first; the mean place where others have its score
    num_candidates: int
    probability: float
    first: str  # the item that the model ranks first
    first_probability: float
    num_history: int
    history: tuple[Read, ...]  # those of the largest weight first; without weights the newest


@dataclass(frozen=True)
class Asked:
    """Of one task."""

    num_events: int
    num_negatives: int  # of a pair's event, in the reliability
    reliability: Reliability | None  # None: the model gives no P(click)
    best: tuple[Example, ...]
    worst: tuple[Example, ...]


def ask(run_dir: str | Path, num_events: int, split: str = "test") -> dict[str, Asked]:
    """task → what its model says about num_events events, a fixed sample. Raises a GensrError where the model
    or its prepared folder is not at hand."""
    from trainer.runs.weights import load_run_model  # transformers: seconds to import

    device = default_device()
    model, config, folder = load_run_model(run_dir, device)
    asked = {}
    for task in model.tasks:
        if task in folder.tasks(split):
            stream = EvalStream(
                folder, split, config.data, config.run.eval_batch_size, max_events=num_events, tasks=(task,)
            )
            with autocast(device, config.run.precision), torch.no_grad():
                asked[TASKS[task]] = _ask(model, folder, stream, config.data.num_negatives)
    return asked


def _ask(model: Ranker, folder: PreparedFolder, stream: EvalStream, num_negatives: int) -> Asked:
    batches, parts = [], []
    for batch in stream:
        batch = batch.take(torch.from_numpy(np.flatnonzero(batch.event_id.numpy() >= 0)))
        scores = model(model.prepare(batch.to(model.device)), mode="score").float()
        batches.append(batch)
        parts.append(torch.stack([scores.cpu(), model.probability(scores).float().cpu()]))
    candidates = torch.cat([batch.candidates for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    scores, probabilities = torch.cat(parts, 1)
    events = torch.cat([batch.event_id for batch in batches])
    refuse_nan(model.title, events.numpy(), scores.isnan().sum(1).numpy())
    users = torch.cat([batch.user for batch in batches])
    num_negatives = min(num_negatives, labels.shape[1] - 1)
    clicked = labels.argmax(1, keepdim=True)
    rank, _ = expected_ranks(scores, labels)
    # Where several share a rank: the surest first among the best, the least sure first among the worst.
    sure = probabilities.gather(1, clicked)[:, 0]
    order = np.lexsort((-sure.numpy(), rank.numpy()))
    table = _Texts(folder)
    sizes = np.cumsum([0, *(len(batch.labels) for batch in batches)])

    def example(row: int) -> Example:
        number = int(np.searchsorted(sizes, row, side="right")) - 1
        event = batches[number].rows(row - int(sizes[number]), row - int(sizes[number]) + 1)
        first = int(scores[row].argmax())
        return Example(
            **_event(model, event, table),
            rank=float(rank[row]),
            num_candidates=labels.shape[1],
            probability=float(sure[row]),
            first=table.item(int(candidates[row, first])),
            first_probability=float(probabilities[row, first]),
        )

    return Asked(
        num_events=len(labels),
        num_negatives=num_negatives,
        reliability=_reliability(probabilities, labels, users, num_negatives)
        if _gives_click_probability(model)
        else None,
        best=tuple(example(int(row)) for row in order[:NUM_EXAMPLES]),
        worst=tuple(example(int(row)) for row in order[::-1][:NUM_EXAMPLES]),
    )


def _gives_click_probability(model: Ranker) -> bool:
    """Whether probability() is meant as that of a click: learned as such, and not of an item's id."""
    return model.trained and type(model).probability is Ranker.probability and model.beams() is None


def _reliability(
    probabilities: Tensor, labels: Tensor, users: Tensor, num_negatives: int
) -> Reliability | None:
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        return None
    order = labels.argsort(dim=1, descending=True, stable=True)[
        :, : 1 + num_negatives
    ]  # the clicked item first
    p, y = (values.gather(1, order).numpy().ravel() for values in (probabilities, labels))
    return reliability(p, y, np.repeat(users.numpy(), 1 + num_negatives))


class _Texts:
    """Items and queries in words."""

    def __init__(self, folder: PreparedFolder) -> None:
        self.items, self.queries = folder.texts()
        self.item_ids, self.user_ids = folder.item_ids(), folder.user_ids()

    def item(self, row: int) -> str:
        text = " ".join(self.items[row].split())
        return (text[:80] + "…" if len(text) > 80 else text) or f"item {self.item_ids[row]}"

    def query(self, row: int) -> str:
        return "" if row == NO_QUERY else self.queries[row] or f"query {row} (anonymised words)"


def _event(model: Ranker, event: Batch, texts: _Texts) -> dict[str, Any]:
    weights = {
        name: of_view[0, 0].float().cpu().numpy()
        for name, of_view in model.explain(clicked_only(event).to(model.device)).items()
    }
    real = int(event.history_mask.sum())
    total = sum(weights.values()) if weights else np.arange(event.history_mask.shape[1], dtype=np.float64)
    read = [
        Read(
            texts.item(int(event.history_items[0, place])),
            bool(event.history_tasks[0, place] == SRC),
            {name: float(of_view[place]) for name, of_view in weights.items()},
        )
        for place in np.argsort(-np.asarray(total)[:real], kind="stable")[:NUM_READ]
    ]
    return {
        "user": str(texts.user_ids[int(event.user[0])]),
        "query": texts.query(int(event.query[0])),
        "clicked": texts.item(int(event.clicked)),
        "num_history": real,
        "history": tuple(read),
    }
