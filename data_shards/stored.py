"""Splits, negatives and histories that the raw files themselves hold (sources.StoredSql), in the places of
those that gensr would make."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_shards.encode import EVENT_DTYPES
from data_shards.errors import DataError
from data_shards.schema import NO_QUERY, REC
from data_shards.split import HISTORY_ONLY
from data_shards.work import BATCH_ROWS, Work

# of each event that has a row in the raw files: row of the canonical clicks, and what the raw row says
STORED_DTYPES = {"row": "i8", "number": "i8", "split": "i1", "rec_count": "i4", "src_count": "i4"}
LIST_DTYPES = {"row": "i8", "task": "i1", "position": "i4"}
PAIRS = 2_000_000  # (event, entry of a list) looked at together
# leak checks whose violations are the raw files' own: counted in the manifest, and no reason to refuse them
AS_STORED = frozenset({"clicks_in_time_order", "history_train_only", "negatives_unique", "negatives_unseen"})
AS_COUNTED = AS_STORED | {"history_before_target"}  # with history_rule=count


def match_rows(work: Work, stored: dict[str, str]) -> dict[str, Any]:
    """Stage: columns stored_* of the events by row. Needs the final_* tables. → rows, and how many of them
    repeat another's click."""
    _put_events(work)
    # of rows with one click, the one of the latest split: no test event is lost
    found = work.batches(
        f"""SELECT e.row, p.number, p.split, p.rec_count, p.src_count
        FROM ({_final(stored["predictions"])}) p JOIN event_rows e
            USING (user_id, item_id, time, task, query_id)
        ORDER BY e.row, p.split DESC, p.number"""
    )
    kept = repeated = 0
    last = -1

    def parts() -> Iterator[dict[str, np.ndarray]]:
        nonlocal kept, repeated, last
        for batch in found:
            columns = {name: batch.column(name).to_numpy() for name in STORED_DTYPES}
            row = columns["row"]
            first = np.diff(row, prepend=last) != 0
            if len(row):
                last = int(row[-1])
            kept += int(first.sum())
            repeated += int((~first).sum())
            yield {name: values[first] for name, values in columns.items()}

    work.write_columns(parts(), STORED_DTYPES, "stored_")
    rows = work.scalar(f"SELECT count(*) FROM {stored['predictions']}")
    assert kept + repeated == rows, f"{rows - kept - repeated} stored rows match no click"
    return {"rows": kept, "repeated": repeated}


def _final(scan: str) -> str:
    """SQL: rows of raw ids with final ones (user_id, item_id, query_id) in place of theirs."""
    return f"""
        SELECT s.* EXCLUDE (user_id, item_id, query), u.id AS user_id, i.id AS item_id,
            coalesce(q.id, {NO_QUERY}) AS query_id
        FROM {scan} s JOIN final_users u ON s.user_id = u.key JOIN final_items i ON s.item_id = i.key
            LEFT JOIN final_queries q ON s.query = q.key"""


def _put_events(work: Work) -> None:
    """Table event_rows: the canonical clicks with their row numbers."""
    events = work.columns(EVENT_DTYPES)
    names = {"user": "user_id", "item": "item_id", "query": "query_id", "time": "time", "task": "task"}
    columns = {names[name]: pa.array(values) for name, values in events.items()}
    work.put_table("event_rows", pa.table({**columns, "row": pa.array(np.arange(len(events["user"])))}))


def _column(work: Work, name: str) -> np.ndarray:
    return work.column(f"stored_{name}", STORED_DTYPES[name])


def stored_split(work: Work, num_events: int) -> np.ndarray:
    """Split code of each click, int8 [events]; HISTORY_ONLY where the raw files make no event of it."""
    split = np.full(num_events, HISTORY_ONLY, np.int8)
    split[_column(work, "row")] = _column(work, "split")
    return split


def stored_negatives(
    work: Work, stored: dict[str, str], item_keys: np.ndarray, split: str, code: int
) -> Iterator[np.ndarray]:
    """The negatives of a split's events as final ids, int32 [rows, negatives], in the order of the events.
    item_keys: the raw id of each final one, int64 [items]."""
    raw = np.load(Path(stored["negatives"]) / f"negatives_{split}.npy", mmap_mode="r")
    order = np.argsort(item_keys)
    in_order = item_keys[order]
    number = _column(work, "number")[_column(work, "split") == code]
    rows = max(1, BATCH_ROWS // max(raw.shape[1], 1))
    for start in range(0, len(number), rows):
        keys = raw[number[start : start + rows]]
        place = np.minimum(np.searchsorted(in_order, keys), len(in_order) - 1)
        if (in_order[place] != keys).any():
            raise DataError(
                f"a stored negative, item {keys[in_order[place] != keys][0]}, is not in the catalogue. Keep "
                "min_interactions=0 with split=stored."
            )
        yield order[place].astype(np.int32)


# ---- history_rule=count ------------------------------------------------------------------------------------


def counted_histories(
    work: Work, stored: dict[str, str], history_max: int
) -> Iterator[dict[str, np.ndarray]]:
    """Parts of the columns of the histories stage, user after user: as many entries of the user's lists as
    the event's counts say, merged by time (clicks before searches of one moment), the newest history_max."""
    events = work.columns(EVENT_DTYPES)
    lists = _lists(work, stored)
    row, counts = _column(work, "row"), {name: _column(work, name) for name in ("rec_count", "src_count")}
    user_of_entry, user_of_event = events["user"][lists["row"]], events["user"][row]
    num_users = int(events["user"][-1]) + 1
    users_of = {"entry": user_of_entry, "event": user_of_event, "click": events["user"]}
    starts = {name: np.searchsorted(users, np.arange(num_users + 1)) for name, users in users_of.items()}
    written = 0
    for user in range(num_users):
        of_user = {name: slice(*first[user : user + 2].tolist()) for name, first in starts.items()}
        entry = {name: np.asarray(values[of_user["entry"]]) for name, values in lists.items()}
        here = row[of_user["event"]]
        limits = [values[of_user["event"]] for values in counts.values()]
        length = np.zeros(of_user["click"].stop - of_user["click"].start, np.int32)
        chosen = [np.zeros(0, np.int64)]
        at_once = max(1, PAIRS // max(len(entry["row"]), 1))
        for start in range(0, len(here), at_once):
            rec, src = (limit[start : start + at_once, None] for limit in limits)
            inside = entry["position"] < np.where(entry["task"] == REC, rec, src)
            from_end = np.cumsum(inside[:, ::-1], axis=1)[:, ::-1]
            inside &= from_end <= history_max
            length[here[start : start + at_once] - of_user["click"].start] = inside.sum(axis=1)
            chosen.append(entry["row"][np.nonzero(inside)[1]])
        flat = np.concatenate(chosen)
        ends_of = written + np.cumsum(length, dtype=np.int64)
        written += len(flat)
        yield {
            "history_start": ends_of - length,
            "history_count": length,
            "history_item": events["item"][flat],
            "history_task": events["task"][flat],
            "history_query": events["query"][flat],
            "history_row": flat,
        }


def _lists(work: Work, stored: dict[str, str]) -> dict[str, np.ndarray]:
    """Columns list_*: the entries of all users' lists in the order of histories; row is that of the click."""
    found = work.batches(
        f"""SELECT e.row, e.task, p.position
        FROM ({_final(stored["lists"])}) p JOIN event_rows e USING (user_id, item_id, time, task, query_id)
        ORDER BY e.user_id, e.time, e.task, p.position, p.place"""
    )
    parts = ({name: batch.column(name).to_numpy() for name in LIST_DTYPES} for batch in found)
    work.write_columns(parts, LIST_DTYPES, "list_")
    return work.columns(LIST_DTYPES, "list_")
