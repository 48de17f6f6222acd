"""Items shown beside a training click and not clicked: true negatives that training may use."""

from collections.abc import Iterator

import numpy as np

from data_shards.encode import EVENT_DTYPES
from data_shards.hashing import derive_seed
from data_shards.histories import choose_shown, moment_keys
from data_shards.negatives import KeySet, sorted_unique
from data_shards.options import PrepareSettings
from data_shards.schema import NO_QUERY
from data_shards.split import TRAIN
from data_shards.work import Work, in_threads, user_chunks

SHOWN_SEED = 15


def sort_shown(work: Work) -> None:
    """Columns shown_*: unclicked rows of kept users, items and queries, by user. Needs the final_* tables."""
    sql = f"""
        SELECT u.id AS user, i.id AS item, r.time AS time, r.task AS task, coalesce(q.id, {NO_QUERY}) AS query
        FROM rows r JOIN final_users u ON r.user_id = u.key JOIN final_items i ON r.item_id = i.key
            LEFT JOIN final_queries q ON r.query = q.key
        WHERE r.problem IS NULL AND NOT r.clicked AND (r.query IS NULL OR q.id IS NOT NULL)
        ORDER BY 1, 3, 2, 4, 5"""
    parts = ({name: batch.column(name).to_numpy() for name in EVENT_DTYPES} for batch in work.batches(sql))
    work.write_columns(parts, EVENT_DTYPES, "shown_")


def attach_shown(work: Work, settings: PrepareSettings, num_users: int) -> None:
    """Stage: columns shown_start, shown_count of every event and the flat column shown_chosen."""
    if settings.num_impressions:
        sort_shown(work)
    else:
        work.write_columns([], EVENT_DTYPES, "shown_")
    work.write_columns(
        _chunks(work, settings, num_users), {"shown_start": "i8", "shown_count": "i4", "shown_chosen": "i4"}
    )


def _chunks(work: Work, settings: PrepareSettings, num_users: int) -> Iterator[dict[str, np.ndarray]]:
    events, shown = work.columns(EVENT_DTYPES), work.columns(EVENT_DTYPES, "shown_")
    split = work.column("split", "i1")
    shown_starts = np.searchsorted(shown["user"], np.arange(num_users + 1, dtype=np.int32))
    seed, num_events = derive_seed(settings.seed, SHOWN_SEED), len(events["user"])

    def choose(bounds: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """→ moment of each event, number of items shown at each moment, these items by moment."""
        start, stop = bounds
        first_user, last_user = int(events["user"][start]), int(events["user"][stop - 1])
        near = slice(int(shown_starts[first_user]), int(shown_starts[last_user + 1]))
        here = {name: np.asarray(values[start:stop]) for name, values in events.items()}
        beside = {name: np.asarray(values[near]) for name, values in shown.items()}
        event_moment, shown_moment = _keys(here), _keys(beside)
        training = split[start:stop] == TRAIN
        moments = sorted_unique(event_moment[training])
        beside_training = KeySet(moments).contains(shown_moment)
        moment = np.searchsorted(moments, shown_moment[beside_training])
        item = beside["item"][beside_training]
        # row of `moments` of each event; the extra one, without items, for other events
        at = np.full(stop - start, len(moments))
        at[training] = np.searchsorted(moments, event_moment[training])
        clicked = KeySet(sorted_unique(_moment_item(at, here["item"])))
        free = ~clicked.contains(_moment_item(moment, item))
        moment, item = moment[free], item[free]
        rows = choose_shown(moment, item, moments, settings.num_impressions, seed)
        work.progress("impressions", stop, num_events)
        return at, np.bincount(moment[rows], minlength=len(moments) + 1), item[rows]

    written = 0
    for at, counts, items in in_threads(choose, user_chunks(events["user"]), work.threads):
        firsts = written + np.cumsum(counts) - counts
        written += len(items)
        yield {"shown_start": firsts[at], "shown_count": counts[at], "shown_chosen": items}


def _keys(rows: dict[str, np.ndarray]) -> np.ndarray:
    return moment_keys(rows["user"], rows["time"], rows["task"], rows["query"])


def _moment_item(moment: np.ndarray, item: np.ndarray) -> np.ndarray:
    return (moment.astype(np.int64) << 32) | item
