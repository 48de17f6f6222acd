"""Two evaluations of the same candidates, compared event by event: the one way to say that a model is better.

RUN/evaluation-NAME.{json,parquet} ─read_stored─▶ StoredRanks ─check_same─▶ paired bootstrap over users
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_shards.schema import TASKS
from trainer.errors import RunError
from trainer.evaluation.bootstrap import Difference, paired_differences
from trainer.evaluation.metrics import METRICS, metric_values
from trainer.evaluation.segments import BUCKETS, METRIC
from trainer.evaluation.stored import evaluate_command, read_evaluation_file, read_ranks_file
from trainer.runs.run_folder import RunFolder

# of a protocol: what differs, in words, when the values do
SAME = {"manifest_hash": "data", "candidates": "candidates", "num_negatives": "candidates"}


@dataclass(frozen=True)
class StoredRanks:
    """One evaluation as it was written; rows sorted by event_id, [n] each."""

    where: str  # how messages name it
    protocol: dict[str, Any]
    event_id: np.ndarray
    task: np.ndarray  # "rec", "src"
    user: np.ndarray  # int, one number a user
    rank: np.ndarray  # expected rank, inf = not among the candidates
    num_tied: np.ndarray
    segments: dict[str, np.ndarray]  # name → bucket of each event, None where it has none

    def metric_values(self) -> np.ndarray:
        """[n, len(METRICS)]."""
        values: np.ndarray = metric_values(
            torch.from_numpy(self.rank), torch.from_numpy(self.num_tied)
        ).numpy()
        return values

    def of_task(self, task: str) -> "StoredRanks":
        return self._take(self.task == task)

    def _take(self, index: np.ndarray) -> "StoredRanks":
        columns = {
            name: getattr(self, name)[index] for name in ("event_id", "task", "user", "rank", "num_tied")
        }
        segments = {name: buckets[index] for name, buckets in self.segments.items()}
        return StoredRanks(self.where, self.protocol, **columns, segments=segments)


def read_stored(folder: Path, name: str, where: str) -> StoredRanks:
    """folder/evaluation-NAME.json and .parquet; name: test, valid-hard, … Raises RunError when one is
    missing or damaged."""
    document, rows = (RunFolder(folder).evaluation(name), RunFolder(folder).ranks(name))
    if lacking := next((path for path in (document, rows) if not path.is_file()), None):
        raise RunError(f"{where}: {lacking.name} is missing. Make it with: {evaluate_command(folder, name)}")
    protocol = read_evaluation_file(document)["protocol"]
    table = read_ranks_file(rows)
    stored = StoredRanks(
        where,
        protocol,
        event_id=table["event_id"].to_numpy(),
        task=table["task"].to_numpy(),
        user=table["user_id"].combine_chunks().dictionary_encode().indices.to_numpy(),
        rank=table["rank"].to_numpy(),
        num_tied=table["num_tied"].to_numpy(),
        segments={name: table[name].to_numpy() for name in BUCKETS if name in table.column_names},
    )
    return stored._take(np.argsort(stored.event_id, kind="stable"))


def check_same(a: StoredRanks, b: StoredRanks, same_tasks: bool = True) -> None:
    """Raises RunError unless both ranked the same candidates of the same events: prepared folder (manifest
    hash), kind and number of candidates, event ids. same_tasks=False: of the tasks that both have, if any."""
    _check_protocols(a, b)
    tasks = [{task for task in TASKS if (one.task == task).any()} for one in (a, b)]
    shared = tasks[0] & tasks[1]
    if same_tasks and tasks[0] != tasks[1]:
        named = " and ".join(
            f"{one.where}: {', '.join(sorted(of)) or 'none'}" for one, of in zip((a, b), tasks, strict=True)
        )
        raise RunError(f"these were evaluated on different tasks and cannot be compared ({named})")
    for task in sorted(shared):
        if not np.array_equal(a.event_id[a.task == task], b.event_id[b.task == task]):
            raise RunError(
                f"{a.where} and {b.where} were evaluated on different events of task {task} and cannot be "
                "compared. Evaluate both on the same events of the split"
            )


def _check_protocols(a: StoredRanks, b: StoredRanks) -> None:
    for key, meaning in SAME.items():
        values = [one.protocol.get(key) for one in (a, b)]
        if values[0] != values[1]:
            raise RunError(
                f"{a.where} and {b.where} were evaluated on different {meaning} ({key} "
                f"{str(values[0])[:12]} and {str(values[1])[:12]}) and cannot be compared. Evaluate both on "
                "one prepared folder with the same candidates; run.init_from=RUN run.max_epochs=0 makes a "
                "run of RUN's weights there (docs/continue.md)"
            )


def comparable(stored: Sequence[StoredRanks]) -> list[StoredRanks]:
    """The same runs, each two of which can be compared on the tasks that both have. A ranking of the whole
    catalogue counts on the events that all runs of its task ranked: their samples are drawn from the events
    of the tasks that a model does. Raises RunError as check_same()."""
    for other in stored[1:]:  # before their events: those of other data need have none in common
        _check_protocols(stored[0], other)
    if stored and stored[0].protocol.get("candidates") == "full":
        samples = {task: [one.event_id[one.task == task] for one in stored] for task in TASKS}
        ranked = {task: [events for events in of_task if len(events)] for task, of_task in samples.items()}
        common = {task: reduce(np.intersect1d, of_task) for task, of_task in ranked.items() if of_task}
        if not all(map(len, common.values())):
            raise RunError(
                f"{', '.join(one.where for one in stored)}: no event was ranked by all of them. Evaluate "
                "them again on every event: gensr evaluate RUN --candidates full --events 0"
            )
        stored = [
            one._take(sum((one.task == task) & np.isin(one.event_id, common[task]) for task in common) > 0)
            for one in stored
        ]
    for one, other in itertools.combinations(stored, 2):
        check_same(one, other, same_tasks=False)
    return list(stored)


def paired(a: StoredRanks, b: StoredRanks) -> dict[str, dict[str, dict[str, Any]]]:
    """{task: {metric: {"a", "b", "difference": b − a, "ci95": [low, high], "p_value", "num_events",
    "num_users"}}} of the tasks that both have. check_same() comes first."""
    figures = {}
    for task in TASKS:
        before, after = a.of_task(task), b.of_task(task)
        if len(before.rank) and len(after.rank):
            first, second = before.metric_values(), after.metric_values()
            found = paired_differences(first, second, before.user)
            figures[task] = {
                metric: _figures(first[:, i], second[:, i], found[i]) for i, metric in enumerate(METRICS)
            }
    return figures


def paired_segments(a: StoredRanks, b: StoredRanks) -> dict[str, dict[str, dict[str, Any]]]:
    """{task: {segment: {bucket: as paired()}}} of ndcg@10. The events are the same, so the
    buckets of either file serve. Raises RunError when neither holds any."""
    if not a.segments and not b.segments:
        raise RunError(
            f"{a.where} and {b.where} were evaluated without segments. Evaluate one of them again with: "
            "gensr evaluate RUN"
        )
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    at = METRICS.index(METRIC)
    for task in TASKS:
        before, after = a.of_task(task), b.of_task(task)
        if not len(before.rank) or not len(after.rank):
            continue
        first, second = before.metric_values()[:, at], after.metric_values()[:, at]
        for name, buckets in (before.segments or after.segments).items():
            for bucket in BUCKETS[name]:
                mine = buckets == bucket
                if mine.any():
                    found = paired_differences(first[mine, None], second[mine, None], before.user[mine])
                    of_segment = figures.setdefault(task, {}).setdefault(name, {})
                    of_segment[bucket] = _figures(first[mine], second[mine], found[0])
    return figures


def _figures(a: np.ndarray, b: np.ndarray, found: Difference) -> dict[str, Any]:
    return {
        "a": float(a.mean()),
        "b": float(b.mean()),
        "difference": found.value,
        "ci95": [found.low, found.high],
        "p_value": found.p_value,
        "num_events": found.num_events,
        "num_users": found.num_users,
    }
