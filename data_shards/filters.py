"""Which users and items stay: both behaviours, and at least k clicks each, repeated until nothing changes
(k-core)."""

from typing import Any

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
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Clicks (three columns of one length, memory-mapped or not) → keep_user [num_users] bool, keep_item
    [num_items] bool, removed.

    A click counts while its user and its item are kept. minimum 0 keeps items without clicks; users always
    need one. Without `repeat`: users with both behaviours first, then one count of the rest.

    removed: {step, round, users, items, rec, src} that each step of each round removes. A click goes with its
    user, if that is removed in the round, else with its item.
    """
    keep_user, keep_item = np.ones(num_users, bool), np.ones(num_items, bool)
    tally = _Tally(minimum)
    rounds = 0
    if both_behaviours and not repeat:
        rec, src, _ = _count(user, item, task, keep_user, keep_item, threads)
        tally.enter(rec, src)
        keep_user = (rec > 0) & (src > 0)
        tally.users(1, "users without both tasks", ~keep_user, rec, src)
    while True:
        rounds += 1
        rec, src, clicks = _count(user, item, task, keep_user, keep_item, threads)
        tally.enter(rec, src)
        one_task = keep_user & ((rec == 0) | (src == 0)) if both_behaviours else np.zeros(num_users, bool)
        few = keep_user & ~one_task & (rec + src < max(minimum, 1))
        rare = keep_item & (clicks < minimum)
        tally.users(rounds, "users without both tasks", one_task, rec, src)
        tally.users(rounds, f"users with fewer than {max(minimum, 1)} clicks", few, rec, src)
        tally.items(rounds, rare)
        keep_user, keep_item = keep_user & ~one_task & ~few, keep_item & ~rare
        if not (one_task.any() or few.any() or rare.any()):
            return keep_user, keep_item, tally.steps
        if not repeat:
            tally.enter(*_count(user, item, task, keep_user, keep_item, threads)[:2])
            return keep_user, keep_item, tally.steps


class _Tally:
    """What each step removes. The clicks that go with items are known when those that remain are counted."""

    def __init__(self, minimum: int) -> None:
        self.minimum = minimum
        self.steps: list[dict[str, Any]] = []
        self.left = (0, 0)  # rec, src: clicks of the last count, less those that went with users since

    def enter(self, rec: np.ndarray, src: np.ndarray) -> None:
        """The clicks that a round begins with, by user."""
        total = int(rec.sum()), int(src.sum())
        if self.steps and "items" in self.steps[-1]:
            self.steps[-1].update(rec=self.left[0] - total[0], src=self.left[1] - total[1])
        self.left = total

    def users(self, number: int, step: str, gone: np.ndarray, rec: np.ndarray, src: np.ndarray) -> None:
        if gone.any():
            clicks = int(rec[gone].sum()), int(src[gone].sum())
            self.left = self.left[0] - clicks[0], self.left[1] - clicks[1]
            self.steps.append(
                {"step": step, "round": number, "users": int(gone.sum()), "rec": clicks[0], "src": clicks[1]}
            )

    def items(self, number: int, gone: np.ndarray) -> None:
        if gone.any():
            step = f"items with fewer than {self.minimum} clicks"
            self.steps.append({"step": step, "round": number, "items": int(gone.sum()), "rec": 0, "src": 0})


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
