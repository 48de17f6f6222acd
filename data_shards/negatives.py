"""Stored negatives of validation and test events: unique, never an item the user has interacted with in any split or task."""

import numpy as np

from data_shards.errors import DataError
from data_shards.hashing import derive_seed, mix64, uniform_below

ROUNDS = 200  # redraws before the exact way; a handful suffices unless nearly every item is taken


def user_item_keys(user: np.ndarray, item: np.ndarray, num_items: int) -> np.ndarray:
    """Sorted unique keys user * num_items + item, int64."""
    return np.unique(user.astype(np.int64) * num_items + item)


def contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which of `keys` are in `sorted_keys`, bool, same shape as keys."""
    if len(sorted_keys) == 0:
        return np.zeros(keys.shape, bool)
    position = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[position] == keys


def draw_negatives(event_id: np.ndarray, user: np.ndarray, taken: np.ndarray, num_items: int, num_negatives: int, seed: int) -> np.ndarray:
    """event_id, user: [E]; taken: sorted keys (user_item_keys) of every click of these users → items [E, num_negatives] int32.

    Uniform over the items the user never clicked; a hash of (seed, event_id, position) draws, so any subset of events gives the same rows.
    Raises DataError when a user leaves fewer than num_negatives items.
    """
    _check_possible(user, taken, num_items, num_negatives)
    slots = np.arange(num_negatives, dtype=np.int64)
    row_seed = mix64(event_id, seed)
    drawn = np.full((len(event_id), num_negatives), -1, np.int64)
    open_rows = np.arange(len(event_id))
    for round_number in range(ROUNDS):
        bits = mix64(row_seed[open_rows, None] + slots.astype(np.uint64), derive_seed(seed, round_number))
        current = drawn[open_rows]
        wanted = np.where(current < 0, uniform_below(bits, num_items), current)
        wanted[contains(taken, user[open_rows, None].astype(np.int64) * num_items + wanted)] = -1
        drawn[open_rows] = _without_repeats(wanted)
        open_rows = open_rows[(drawn[open_rows] < 0).any(axis=1)]
        if len(open_rows) == 0:
            return drawn.astype(np.int32)
    for row in open_rows:  # nearly all items taken: the free items with the smallest hashes
        items = np.arange(num_items)
        free = items[~contains(taken, int(user[row]) * num_items + items)]
        drawn[row] = free[np.argsort(mix64(free, int(row_seed[row] >> np.uint64(2))), kind="stable")[:num_negatives]]
    return drawn.astype(np.int32)


def _without_repeats(items: np.ndarray) -> np.ndarray:
    """[E, n] with every second appearance in a row replaced by -1 (the first position keeps the item)."""
    order = np.argsort(items, axis=1, kind="stable")
    in_order = np.take_along_axis(items, order, axis=1)
    repeat = np.zeros(items.shape, bool)
    np.put_along_axis(repeat, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
    return np.where(repeat, -1, items)


def _check_possible(user: np.ndarray, taken: np.ndarray, num_items: int, num_negatives: int) -> None:
    users = np.unique(user).astype(np.int64)
    clicked = np.searchsorted(taken, (users + 1) * num_items) - np.searchsorted(taken, users * num_items)
    free = num_items - int(clicked.max(initial=0))
    if free < num_negatives:
        raise DataError(
            f"a user has interacted with all but {free} of {num_items} items: {num_negatives} negatives cannot be drawn. "
            + (f"Use num_negatives={free} or fewer." if free > 0 else "The log needs more items.")
        )
