"""History windows by array arithmetic, and the impressions shown beside a click. Rows are sorted by (user,
time); chunks hold whole users."""

import numpy as np

from data_shards.hashing import mix64
from data_shards.schema import SRC


def first_of_runs(*columns: np.ndarray) -> np.ndarray:
    """True where any of the columns changes (and at row 0): the first row of each run, bool [rows]."""
    changed = np.zeros(len(columns[0]), bool)
    changed[:1] = True
    for values in columns:
        changed[1:] |= values[1:] != values[:-1]
    return changed


def moment_keys(user: np.ndarray, time: np.ndarray, task: np.ndarray, query: np.ndarray) -> np.ndarray:
    """A 64-bit hash of (user, time, task, query): what was on one screen shares it."""
    who = (user.astype(np.uint64) << np.uint64(32)) | (query.astype(np.int64) + 1).astype(np.uint64)
    return mix64(mix64(who, 1) ^ mix64(time.astype(np.int64) * 2 + task, 2))


def in_histories(user: np.ndarray, time: np.ndarray, item: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Which rows appear in histories, bool [rows]: an item clicked several times at one moment appears once,
    as a search if any of them was."""
    keep = np.ones(len(user), bool)
    starts = first_of_runs(user, time)
    group = np.cumsum(starts) - 1
    tied = np.flatnonzero(np.bincount(group)[group] > 1) if len(group) else np.zeros(0, np.int64)
    # within (user, time, item): searches first
    order = tied[np.lexsort((tied, task[tied] != SRC, item[tied], group[tied]))]
    keep[order[~first_of_runs(group[order], item[order])]] = False
    return keep


def windows(
    user: np.ndarray, time: np.ndarray, in_history: np.ndarray, history_max: int
) -> tuple[np.ndarray, np.ndarray]:
    """(first, count) of each row's history among the rows that appear in histories: the newest `history_max`
    strictly before its time."""
    before = np.cumsum(in_history) - in_history  # history rows above each row
    run_of_time = np.flatnonzero(first_of_runs(user, time))
    run_of_user = np.flatnonzero(first_of_runs(user))
    rows = np.arange(len(user))
    # all rows of one moment end where the moment begins
    end = before[run_of_time[np.searchsorted(run_of_time, rows, side="right") - 1]]
    user_start = before[run_of_user[np.searchsorted(run_of_user, rows, side="right") - 1]]
    start = np.maximum(user_start, end - history_max)
    return start, (end - start).astype(np.int32)


def ragged_rows(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenation of range(start, start + count) over all pairs, int64."""
    total = int(counts.sum())
    ends = np.cumsum(counts)
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)


def order_by_hash(group: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """Order of rows by (group, tie). group: int64 below 2**24; tie: uint64, of which 40 bits count; what is
    still equal keeps its order."""
    key = (group.astype(np.uint64) << np.uint64(40)) | (tie >> np.uint64(24))
    return np.argsort(key, kind="stable")


def choose_shown(moment: np.ndarray, item: np.ndarray, keys: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Rows of at most `limit` distinct items of each moment (ids below 2**24), chosen by hash. keys:
    moment_keys of each moment. → row numbers, by moment."""
    tie = mix64(mix64(keys, seed)[moment] ^ mix64(item, 1))
    order = order_by_hash(moment, tie)  # one item of one moment has one hash: repeats lie side by side
    order = order[first_of_runs(moment[order], item[order])]
    starts = first_of_runs(moment[order])
    first = np.flatnonzero(starts)
    rank = np.arange(len(order)) - first[np.cumsum(starts) - 1] if len(order) else order
    return order[rank < limit]
