"""Leak checks on what was written: shards are read again and compared with the canonical clicks. They run in
every preparation."""

import threading
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.blocks import decode_blocks, tar_entries
from data_shards.errors import DataError
from data_shards.histories import first_of_runs, ragged_rows
from data_shards.negatives import KeySet, user_item_keys
from data_shards.schema import NO_QUERY, REC, SPLITS, SRC
from data_shards.split import HISTORY_ONLY, TRAIN
from data_shards.work import BATCH_ROWS, Work, in_threads
from data_shards.write import EventColumns


class Tally:
    """Counts of one check, added to by several threads."""

    def __init__(self) -> None:
        self.checked = self.violations = 0
        self.lock = threading.Lock()

    def add(self, checked: int, violations: Any) -> None:
        with self.lock:
            self.checked += int(checked)
            self.violations += int(violations)


def check_prepared(
    work: Work,
    columns: EventColumns,
    shards: dict[str, list[dict[str, Any]]],
    num_items: int,
    widths: dict[str, int],
    as_stored: Container[str] = (),
) -> dict[str, dict[str, int]]:
    """Stage: {check: {checked, violations}}. shards: as the manifest has them. widths: of each column of
    negatives (negatives, hard_negatives).

    Raises DataError when anything was violated: the folder is then not published. Violations of the checks
    `as_stored` are only counted: what they look at is the raw files' own.

    event_once              every event is in exactly one split, once, with the user, item, task, query and
                            time of its click
    clicks_in_time_order    each user's clicks are in time order, and the splits follow one another
    history_before_target   every history item is a click of the same user, strictly earlier than the target
    history_queries         the query of a search in a history is that of its click; a recommendation has none
    history_train_only      no history of a training event holds a validation or test click
    train_counts            the catalogue's click counts are those of the training shards
    negatives_unique        no stored negative twice in a row, nor the positive
    negatives_unseen        no stored negative was clicked by the user, in any split or task
    hard_negatives_…        the same of the mined ones, where the folder has them
    """
    names = (
        "event_once",
        "clicks_in_time_order",
        "history_before_target",
        "history_queries",
        "history_train_only",
        "train_counts",
        *(f"{name}_{what}" for name in widths for what in ("unique", "unseen")),
    )
    tallies = {name: Tally() for name in names}
    history_row = work.column("history_row", "i8")
    seen = np.zeros(len(columns.user), np.uint8)
    counts = np.zeros((2, num_items), np.int64)
    lock = threading.Lock()  # held by whoever adds to seen and counts

    def check(part: tuple[int, dict[str, Any]]) -> None:
        code, shard = part
        for table in decode_blocks(tar_entries(work.tree / shard["name"]), shard["blocks"]):
            block = table.to_batches()[0]
            rows = _check_events(block, columns, code, tallies["event_once"])
            _check_histories(block, rows, columns, history_row, code, tallies)
            if code != TRAIN:
                for name, width in widths.items():
                    _check_negatives(block, columns, num_items, name, width, tallies)
            with lock:
                np.add.at(seen, rows, 1)
                if code == TRAIN:
                    np.add.at(counts, (block.column("task").to_numpy(), block.column("item").to_numpy()), 1)
            work.progress("checks", tallies["event_once"].checked, len(seen))

    for _ in in_threads(
        check, ((code, shard) for code, name in enumerate(SPLITS) for shard in shards[name]), work.threads
    ):
        pass
    for start in range(0, len(seen), BATCH_ROWS):
        rows = slice(start, start + BATCH_ROWS)
        tallies["event_once"].add(0, (seen[rows] != (columns.split[rows] != HISTORY_ONLY)).sum())
    tallies["clicks_in_time_order"].add(len(seen), check_monotone(columns))
    _check_counts(work.tree / "catalog" / "items.parquet", counts, tallies["train_counts"])
    result = {
        name: {"checked": tally.checked, "violations": tally.violations} for name, tally in tallies.items()
    }
    broken = {
        name: tally["violations"]
        for name, tally in result.items()
        if tally["violations"] and name not in as_stored
    }
    if broken:
        raise DataError(
            f"leak checks failed: {broken}. The folder was not published; please report this with the "
            "settings used."
        )
    return result


def _check_events(block: pa.RecordBatch, columns: EventColumns, code: int, tally: Tally) -> np.ndarray:
    rows = block.column("event_id").to_numpy()
    wrong = columns.split[rows] != code
    for name in ("user", "item", "task", "query", "time"):
        wrong |= block.column(name).to_numpy() != getattr(columns, name)[rows]
    tally.add(len(rows), wrong.sum())
    return rows


def _check_histories(
    block: pa.RecordBatch,
    rows: np.ndarray,
    columns: EventColumns,
    history_row: np.ndarray,
    code: int,
    tallies: dict[str, Tally],
) -> None:
    """The written items must be those of a run of the user's own clicks that ends before the target's time.

    Clicks of a user are in time order, so the last click of the run tells for all of it (rows of one user:
    first and last are that user's).
    """
    lists = block.column("history_items")
    count = np.diff(lists.offsets.to_numpy())
    start = columns.history_start[rows]
    clicks = history_row[ragged_rows(start, count)]
    same = (lists.flatten().to_numpy() == columns.item[clicks]) & (
        block.column("history_tasks").flatten().to_numpy() == columns.task[clicks]
    )
    queries = block.column("history_queries").flatten().to_numpy()
    wrong = (queries != columns.query[clicks]) | ((queries == NO_QUERY) != (columns.task[clicks] == REC))
    tallies["history_queries"].add(len(clicks), wrong.sum())
    some = count > 0
    first, last = history_row[start[some]], history_row[start[some] + count[some] - 1]
    user, time = block.column("user").to_numpy()[some], block.column("time").to_numpy()[some]
    early = (columns.user[first] == user) & (columns.user[last] == user) & (columns.time[last] < time)
    tallies["history_before_target"].add(len(clicks), (~same).sum() + (~early).sum())
    if code == TRAIN:
        # a click of no split may come last: all of them are looked at
        tallies["history_train_only"].add(len(clicks), (columns.split[clicks] > TRAIN).sum())


def _check_negatives(
    block: pa.RecordBatch,
    columns: EventColumns,
    num_items: int,
    name: str,
    width: int,
    tallies: dict[str, Tally],
) -> None:
    negatives = block.column(name).flatten().to_numpy().reshape(-1, width)
    user, item = block.column("user").to_numpy(), block.column("item").to_numpy()
    in_order = np.sort(negatives, axis=1)
    twice = (in_order[:, 1:] == in_order[:, :-1]).sum() + (negatives == item[:, None]).sum()
    outside = ((negatives < 0) | (negatives >= num_items)).sum()
    tallies[f"{name}_unique"].add(negatives.size, twice + outside)
    nearby = slice(
        int(np.searchsorted(columns.user, user.min())),
        int(np.searchsorted(columns.user, user.max(), side="right")),
    )
    clicked = KeySet(user_item_keys(columns.user[nearby], columns.item[nearby], num_items))
    tallies[f"{name}_unseen"].add(
        negatives.size, clicked.contains(user[:, None].astype(np.int64) * num_items + negatives).sum()
    )


def _check_counts(path: Path, counts: np.ndarray, tally: Tally) -> None:
    start = 0
    for batch in pq.ParquetFile(path).iter_batches(
        columns=["train_rec_clicks", "train_src_clicks"], batch_size=BATCH_ROWS
    ):
        rows = slice(start, start + batch.num_rows)
        wrong = (batch.column(0).to_numpy() != counts[REC, rows]) | (
            batch.column(1).to_numpy() != counts[SRC, rows]
        )
        tally.add(batch.num_rows, wrong.sum())
        start += batch.num_rows
    tally.add(0, start != counts.shape[1])


def check_monotone(columns: EventColumns) -> int:
    """Number of places where a user's clicks are out of time order or a split comes before an earlier one (0
    in a sound folder)."""
    wrong = 0
    before: np.ndarray = np.zeros(0, np.int64)  # the last event above
    for start in range(0, len(columns.user), BATCH_ROWS):
        rows = slice(max(0, start - 1), start + BATCH_ROWS)
        same_user = ~first_of_runs(columns.user[rows])[1:]
        wrong += int((same_user & (np.diff(columns.time[rows]) < 0)).sum())
        of_split = np.flatnonzero(columns.split[start : start + BATCH_ROWS] != HISTORY_ONLY) + start
        of_split = np.concatenate([before, of_split])
        same_user = ~first_of_runs(columns.user[of_split])[1:]
        wrong += int((same_user & (np.diff(columns.split[of_split]) < 0)).sum())
        before = of_split[-1:]
    return wrong
