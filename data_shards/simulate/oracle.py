"""How good a scorer could be that knows the planted world: the ceiling for every model. Never written into a
log."""

from dataclasses import dataclass

import numpy as np

from data_shards.simulate import behaviour as b
from data_shards.simulate.world import INTERESTS_CUMULATIVE, POPULARITY_EXPONENT, POPULARITY_OFFSET, World


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
