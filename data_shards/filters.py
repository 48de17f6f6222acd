"""Which users and items stay: both behaviours, and at least k clicks each, repeated until nothing changes
(k-core)."""

import numpy as np

from data_shards.schema import SRC
from data_shards.work import BATCH_ROWS, in_threads

COUNTED_ROWS = 2 * BATCH_ROWS  # at once: each part makes counts of all items


def keep_users_and_items(
    user: np.ndarray,
    item: np.ndarray,
    task: np.ndarray,
    num_users: int,
    num_items: int,
    minimum: int,
    both_behaviours: bool,
    repeat: bool,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Clicks (three columns of one length, memory-mapped or not) → keep_user [num_users] bool, keep_item
    [num_items] bool, rounds.

    A click counts while its user and its item are kept. minimum 0 keeps items without clicks; users always
    need one. Without `repeat`: users with both behaviours first, then one count of the rest.
    """
    keep_user, keep_item = np.ones(num_users, bool), np.ones(num_items, bool)
    rounds = 0
    if both_behaviours and not repeat:
        rec, src, _ = _count(user, item, task, keep_user, keep_item, threads)
        keep_user = (rec > 0) & (src > 0)
    while True:
        rounds += 1
        rec, src, clicks = _count(user, item, task, keep_user, keep_item, threads)
        new_user, new_item = keep_user & (rec + src >= max(minimum, 1)), keep_item & (clicks >= minimum)
        if both_behaviours:
            new_user &= (rec > 0) & (src > 0)
        unchanged = new_user.sum() == keep_user.sum() and new_item.sum() == keep_item.sum()
        keep_user, keep_item = new_user, new_item
        if unchanged or not repeat:
            return keep_user, keep_item, rounds


def _count(
    user: np.ndarray,
    item: np.ndarray,
    task: np.ndarray,
    keep_user: np.ndarray,
    keep_item: np.ndarray,
    threads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clicks that remain: of each user in recommendation, of each user in search, of each item."""
    by_user_task, by_item = np.zeros(2 * len(keep_user), np.int64), np.zeros(len(keep_item), np.int64)

    all_kept = bool(keep_user.all() and keep_item.all())  # in the first round

    def count(start: int) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(start, start + COUNTED_ROWS)
        users, items, tasks = user[rows], item[rows], task[rows]
        if not all_kept:
            alive = keep_user[users] & keep_item[items]
            users, items, tasks = users[alive], items[alive], tasks[alive]
        user_task = users.astype(np.int64) * 2 + (tasks == SRC)
        return np.bincount(user_task, minlength=len(by_user_task)), np.bincount(items, minlength=len(by_item))

    for some_users, some_items in in_threads(count, range(0, len(user), COUNTED_ROWS), threads):
        by_user_task += some_users
        by_item += some_items
    return by_user_task[0::2], by_user_task[1::2], by_item
