"""How good a scorer could be that knows the planted world: the ceiling for every model. Never written into a
log."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import DataError
from data_shards.schema import SRC
from data_shards.simulate import behaviour as b
from data_shards.simulate.csv_tables import OTHER_ID_BASE, user_ids
from data_shards.simulate.simulated import Simulated
from data_shards.simulate.world import (
    INTERESTS_CUMULATIVE,
    POPULARITY_EXPONENT,
    POPULARITY_OFFSET,
    World,
    make_users,
)

OPTIMUM_FILE = "optimum.json"  # in a prepared folder: metrics of these scores (trainer/evaluation/optimum.py)


@dataclass(frozen=True)
class Clicks:
    """Clicked videos with the hidden state behind them, one row each, in internal numbering."""

    user: np.ndarray  # int64
    item: np.ndarray  # int64
    time_ms: np.ndarray  # int64
    search: np.ndarray  # bool
    focus: np.ndarray  # int64 topic: of the moment (recommendation) or of the query (search)
    concepts: np.ndarray  # int64 [n, 3] of the query, -1 = none
    words: np.ndarray  # int32 [n, 4] of the query, 0 = none

    def take(self, rows: np.ndarray) -> "Clicks":
        return Clicks(**{name: values[rows] for name, values in vars(self).items()})


def planted_clicks(world: World, rows_per_day: float) -> Clicks:
    """Every click of the world with its causes (small worlds: all users at once)."""
    log = b.make_log(world, 0, world.num_users, rows_per_day)
    feed, results = log.feed.click, log.results.click & (log.results.item != b.NO_ITEM)
    request, search = log.feed.group[feed], log.results.group[results]
    blank_concepts = np.full((len(request), log.searches.concepts.shape[1]), -1)
    blank_words = np.zeros((len(request), log.searches.words.shape[1]), np.int32)
    return Clicks(
        user=np.concatenate([log.feed.user[feed], log.results.user[results]]),
        item=np.concatenate([log.feed.item[feed], log.results.item[results]]),
        time_ms=np.concatenate([log.requests.time_ms[request], log.searches.time_ms[search]]),
        search=np.arange(len(request) + len(search)) >= len(request),
        focus=np.concatenate([log.requests.focus[request], log.searches.topic[search]]),
        concepts=np.concatenate([blank_concepts, log.searches.concepts[search]]),
        words=np.concatenate([blank_words, log.searches.words[search]]),
    )


def oracle_scores(world: World, users: b.Users, clicks: Clicks, candidates: np.ndarray) -> np.ndarray:
    """About log P(click | user, hidden focus, query) of candidates [n, C]: float64, comparable in a row."""
    topic = world.topic_of(candidates)
    rank = candidates - world.topic_start[topic]
    log_popularity = -POPULARITY_EXPONENT * np.log(rank + POPULARITY_OFFSET)
    log_mass = np.log(world.topic_mass.astype(np.float64))[topic]
    affinity = world.affinity(users.taste[clicks.user][:, None, :], candidates).astype(np.float64)
    on_topic = topic == clicks.focus[:, None]
    interests = users.interests[clicks.user]
    share = np.diff(np.concatenate([[0.0], INTERESTS_CUMULATIVE]))
    interest = sum(share[k] * (topic == interests[:, k, None]) for k in range(len(share)))
    global_share = np.diff(np.concatenate([[0.0], world.topic_cumulative]))[topic]
    explored = 1 - b.FEED_FOCUS - b.FEED_INTERESTS
    shown = (
        np.log(b.FEED_FOCUS * on_topic + b.FEED_INTERESTS * interest + explored * global_share)
        + log_popularity
        - log_mass
    )
    rec = (
        shown
        + (b.FEED_STYLE + b.CLICK_STYLE) * affinity
        + b.CLICK_FOCUS * on_topic
        + b.CLICK_INTEREST * (interest > 0)
    )
    match = b.matched_concepts(world, clicks.concepts, candidates) * on_topic
    found = np.log(0.9 * on_topic + 0.1 * global_share) + log_popularity - log_mass
    src = found + (b.SEARCH_MATCH + b.RESULT_MATCH) * match + (b.SEARCH_STYLE + b.RESULT_STYLE) * affinity
    return np.where(clicks.search[:, None], src, rec)


class Oracle:
    """Scores by the planted preference for a prepared folder: rows of its users and items become the world's
    users, items and clicks again."""

    def __init__(self, raw: Path, user_ids_of_rows: Sequence[Any], item_ids_of_rows: Sequence[Any]) -> None:
        """The world of raw/simulated.json; original ids of the folder's users and items. Raises DataError for
        ids that the world does not have. Among them are the results that are image atlases: in a KuaiSAR
        folder the filter of five clicks drops them, unless many users search among few items."""
        arguments = Simulated.read(raw)
        self.raw, self.world = raw, arguments.world()
        self.users = make_users(self.world, 0, self.world.num_users)
        self.user = _positions(user_ids(self.world), user_ids_of_rows, raw)
        self.item = _positions(self.world.public_item, item_ids_of_rows, raw)
        clicks = planted_clicks(self.world, arguments.rows_per_day)
        # a user clicks an item once: see behaviour._first_clicks_only
        key = clicks.user * self.world.num_items + clicks.item
        order = np.argsort(key)
        self.clicks, self.key = clicks.take(order), key[order]

    def scores(
        self, user: np.ndarray, item: np.ndarray, task: np.ndarray, candidates: np.ndarray
    ) -> np.ndarray:
        """About log P(click) of candidates [n, C] at the clicks of users [n] on items [n]: float64 [n, C],
        comparable in a row. All are rows of the folder. Raises DataError for a click that the world does not
        have."""
        key = self.user[user] * self.world.num_items + self.item[item]
        row = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        if not ((self.key[row] == key) & (self.clicks.search[row] == (task == SRC))).all():
            raise _another_world(self.raw)
        return oracle_scores(self.world, self.users, self.clicks.take(row), self.item[candidates])


def _positions(ids: np.ndarray, wanted: Sequence[Any], raw: Path) -> np.ndarray:
    """Where each wanted id is among `ids`, a permutation of 1 … n: int64."""
    position = np.zeros(len(ids) + 1, np.int64)
    position[ids] = np.arange(len(ids))
    values = np.asarray(wanted)
    if values.dtype.kind not in "iu" or values.min() < 1:
        raise _another_world(raw)
    if others := int((values >= OTHER_ID_BASE).sum()):
        raise DataError(
            f"{others} of the folder's items are image atlases that searches found, which the planted "
            f"preferences do not rank. Prepare {raw} again with a larger min_interactions, which drops them."
        )
    if values.max() > len(ids):
        raise _another_world(raw)
    return np.asarray(position[values])


def _another_world(raw: Path) -> DataError:
    return DataError(
        f"the prepared folder does not come from the logs in {raw}. Prepare them again, or delete both and "
        "start anew."
    )
