"""Scored events → ranks of the clicked items, gathered over all processes.

EvalStream (this rank's events) ─scorer─▶ scores_BC ─expected_ranks─▶ EventRanks ─gather─▶ EventRanks of all
"""

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from data_shards.schema import TASKS
from trainer.batch import Batch
from trainer.data import prefetched
from trainer.errors import RunError
from trainer.evaluation.metrics import METRICS, expected_ranks, metric_values
from trainer.models.contract import UNREACHED, Ranker
from trainer.runtime.device import autocast
from trainer.runtime.progress import CountProgress

ScoreFunction = Callable[[Batch], Tensor]  # events → scores_BC float32
# One value of this rank → the values of all ranks, in rank order, on every rank; for example
# partial(gather_objects, accelerator).
GatherObjects = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class EventRanks:
    """One row for each evaluated event, sorted by event_id; [n] each, and [n, K] of its K best candidates."""

    event_id: np.ndarray  # int64
    task: np.ndarray  # int64
    user: np.ndarray  # int64, row of the users table
    item: np.ndarray  # int64, the clicked item
    rank: np.ndarray  # float64, expected rank among the candidates, 1 = first, inf = not among them
    num_tied: np.ndarray  # int64, candidates with the clicked item's score, itself among them: 1 = no tie
    num_nan: np.ndarray  # int64, candidates scored NaN, which refuse_nan() does not let pass
    share_reached: np.ndarray  # float64, of the candidates: 1 unless a model decodes (Ranker.beams)
    best_items: np.ndarray  # [n, K] int64, best first, -1 where there are fewer than K; ties in any order
    best_scores: np.ndarray  # [n, K] float32, −inf where there are fewer

    def take(self, index: np.ndarray) -> "EventRanks":
        return EventRanks(**{name: column[index] for name, column in vars(self).items()})

    def of_task(self, task: int) -> "EventRanks":
        return self.take(self.task == task)

    def metric_values(self) -> Tensor:
        """[n, len(METRICS)] float64."""
        return metric_values(torch.from_numpy(self.rank), torch.from_numpy(self.num_tied))

    @staticmethod
    def concatenate(parts: "list[EventRanks]") -> "EventRanks":
        return EventRanks(
            **{
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in EventRanks.__dataclass_fields__
            }
        )


# ---- ranking -----------------------------------------------------------------------------------------------


def rank_events(
    scorer: ScoreFunction,
    stream: Iterable[Batch],
    gather: GatherObjects | None = None,
    progress: CountProgress | None = None,
    task: int | None = None,
    model: str = "the model",
    num_best: int = 0,
) -> EventRanks:
    """Score and rank this rank's batches, then gather all ranks' rows. Filler rows (event_id −1) are dropped.

    `task`: score the events of one task only. model: its name in messages. num_best: K, how many of the best
    candidates are kept with their scores. Every rank returns the same, or raises the RunError of
    refuse_nan(). Asserts that no event is lost or seen twice.
    """
    parts: list[EventRanks] = []
    num_skipped = 0
    num_batches = len(stream) if isinstance(stream, Sized) else 0
    with torch.no_grad():
        for number, batch in enumerate(prefetched(stream), start=1):
            if task is not None:
                num_skipped += int(((batch.event_id >= 0) & (batch.task != task)).sum())
                batch = batch.take(batch.task == task)
            # fillers are scored too, without a shortcut: under ZeRO-3 every rank must call the model equally
            # often
            parts.append(_rank_batch(scorer, batch, num_best))
            if progress is not None:
                progress(number, num_batches)
    assert parts, "every rank gets the same number of batches, at least one"
    mine = EventRanks.concatenate(parts)
    gathered = gather((mine, num_skipped)) if gather is not None else [(mine, num_skipped)]
    ranks = EventRanks.concatenate([rows for rows, _ in gathered])
    ranks = ranks.take(np.argsort(ranks.event_id, kind="stable"))
    assert (np.diff(ranks.event_id) > 0).all(), "an event was evaluated twice"
    expected = getattr(stream, "num_events", None)
    num_seen = len(ranks.event_id) + sum(skipped for _, skipped in gathered)
    assert expected is None or num_seen == expected, f"{num_seen} of {expected} events were evaluated"
    refuse_nan(model, ranks.event_id, ranks.num_nan)
    return ranks


def refuse_nan(model: str, event_id: np.ndarray, num_nan: np.ndarray) -> None:
    """Raises RunError where some of num_nan [n] is above 0, naming the first such event of event_id [n]: a
    NaN is above and below nothing, so whatever place it gets, the metrics are not the model's."""
    bad = np.flatnonzero(num_nan)
    if len(bad):
        raise RunError(
            f"{model} gives NaN as the score of {num_nan[bad[0]]:,} candidate(s) of event "
            f"{event_id[bad[0]]}, and so in {len(bad):,} of {len(event_id):,} events: these cannot be "
            "ranked. Its weights or its arithmetic overflow: try run.precision=fp32 or a smaller optim.lr"
        )


def _rank_batch(scorer: ScoreFunction, batch: Batch, num_best: int) -> EventRanks:
    scores_BC = scorer(batch).float().cpu()
    assert scores_BC.shape == batch.candidates.shape, (scores_BC.shape, batch.candidates.shape)
    ranks = ranks_of(scores_BC, batch.candidates, batch.labels, batch, batch.clicked, num_best)
    return ranks.take((batch.event_id >= 0).numpy())


def ranks_of(
    scores_BC: Tensor, items_BC: Tensor, labels_BC: Tensor, batch: Batch, clicked_B: Tensor, num_best: int
) -> EventRanks:
    """Of candidates that need not be those of the batch. labels_BC: 1 for the clicked item. A score of −inf:
    no candidate (padding, clicked before)."""
    rank, num_tied = expected_ranks(scores_BC, labels_BC)
    best_items, best_scores = best_of(scores_BC, items_BC, num_best)
    columns = {
        "event_id": batch.event_id,
        "task": batch.task,
        "user": batch.user,
        "item": clicked_B,
        "rank": rank,
        "num_tied": num_tied,
        "num_nan": scores_BC.isnan().sum(1),
        "share_reached": share_reached(scores_BC),
        "best_items": best_items,
        "best_scores": best_scores,
    }
    return EventRanks(**{name: column.numpy() for name, column in columns.items()})


def best_of(scores_BC: Tensor, items_BC: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """→ items [B, num_best], −1 where there are fewer, and their scores, best first."""
    best = torch.topk(scores_BC, min(num_best, scores_BC.shape[1]), dim=1)
    items = items_BC.gather(1, best.indices).masked_fill(best.values.isneginf(), -1)
    missing = (0, num_best - items.shape[1])
    return pad(items, missing, value=-1), pad(best.values, missing, value=-torch.inf)


def share_reached(scores_BC: Tensor) -> Tensor:
    """Of the candidates that some beam spells, [B] float64."""
    unreached_B = (scores_BC == UNREACHED).sum(1)
    return 1 - unreached_B.double() / (scores_BC != -torch.inf).sum(1).clamp(min=1)


def validate(
    scorer: ScoreFunction,
    stream: Iterable[Batch],
    gather: GatherObjects | None = None,
    progress: CountProgress | None = None,
    model: str = "the model",
) -> dict[str, float]:
    """Metrics during training, without intervals: {"rec/ndcg@10": …, "src/recall@5": …, "mean/mrr": …}.

    A task without events is left out; mean is over the tasks present. Raises as rank_events().
    """
    ranks = rank_events(scorer, stream, gather, progress, model=model)
    means = {
        name: ranks.of_task(task).metric_values().mean(0)
        for task, name in enumerate(TASKS)
        if (ranks.task == task).any()
    }
    means["mean"] = torch.stack(list(means.values())).mean(0)
    return {
        f"{name}/{metric}": float(values[i])
        for name, values in means.items()
        for i, metric in enumerate(METRICS)
    }


def autocast_scorer(model: Ranker, device: str, precision: str) -> ScoreFunction:
    """Batches to the device of a model, scoring under the run's precision. Scores come back as float32."""

    def scorer(batch: Batch) -> Tensor:
        with autocast(device, precision):
            return model.score(model.prepare(batch).to(device))

    return scorer


def gather_over_group(value: Any) -> list[Any]:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
