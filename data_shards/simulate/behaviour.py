"""What users do: sessions, feeds, clicks, searches. One function from a range of users to all their
impressions.

slot (4 a day) → focus topic, which lasts for some sessions and is often outside the long-term interests
  request (a batch of items sent at one time) → shown items → clicks
    search, with words of what was just watched (or of another interest) → results → clicks, or none
"""

from dataclasses import dataclass

import numpy as np

from data_shards.simulate import draws
from data_shards.simulate.world import (
    INTERESTS_CUMULATIVE,
    ITEM_CONCEPTS,
    QUERY_FORMAL,
    Users,
    World,
    make_users,
)

START_S = 1684684800  # 2023-05-22 00:00 in Beijing (UTC+8), the first day of KuaiSAR
SLOT_HOURS = np.array([7.0, 11.0, 16.0, 21.0])
REQUEST_SPACING_S = 200.0
MAX_REQUESTS = 12  # of a session
MIN_SHOWN, MAX_SHOWN = 4, 8  # items of one request
REC_CANDIDATES = 18  # what the feed chooses from
SEARCH_AFTER_REQUEST = 0.36
MIN_RESULTS, MAX_RESULTS = 3, 9
SEARCH_CANDIDATES = 40
# mean rows that a request brings with its searches, less those that a user has seen (measured)
ROWS_OF_REQUEST = 5.6 + SEARCH_AFTER_REQUEST * 5.6

FOCUS_KEPT = 0.86  # from slot to slot (a user opens the app in about half of them)
FOCUS_IS_INTEREST = 0.55  # otherwise any topic: only recent history shows it
FEED_FOCUS, FEED_INTERESTS = 0.55, 0.33  # shares of the feed; the rest is exploration
FEED_STYLE = 1.6  # how much of the affinity the feed knows
CLICK_BIAS, CLICK_STYLE, CLICK_FOCUS, CLICK_INTEREST = -3.6, 2.2, 1.3, 1.0  # logit of a click on a shown item

SEARCH_RELATED = 0.75  # of the searches are about the focus, the rest about a long-term interest
QUERY_CONCEPTS_CUMULATIVE = np.array([0.45, 0.85, 1.0])  # one, two or three concepts
QUERY_COMMON_WORD = 0.2  # a query also has a word that means nothing
SEARCH_MATCH, SEARCH_STYLE = 2.2, 1.2  # ranking of the results: concepts matched, affinity
RESULT_BIAS, RESULT_MATCH, RESULT_STYLE = -2.1, 0.9, 2.0  # logit of a click on a result
SEARCH_ABANDONED = 0.28  # searches whose results nobody looks at (on top of those without a good one)
NON_VIDEO = 0.12  # of the results are users, live streams, …
NO_ITEM = -1

# Purposes: the second argument of every draw (see world.py).
P_SLOT, P_KEEP, P_FOCUS, P_TREND, P_REQUESTS, P_REQUEST, P_TIME, P_SIZE, P_CAND, P_DRAW = range(200, 210)
P_EXTRA, P_SEARCH, P_RELATED, P_INTENT, P_LENGTH, P_FORMS, P_COMMON, P_NONVIDEO, P_ABANDON = range(210, 219)


@dataclass(frozen=True)
class Requests:
    """One row a request, in (user, time) order."""

    user: np.ndarray  # int64, row of Users
    key: np.ndarray  # uint64
    time_ms: np.ndarray  # int64
    day: np.ndarray  # int64
    focus: np.ndarray  # int64 topic


@dataclass(frozen=True)
class Impressions:
    """One row a shown item, grouped by `group` (row of Requests, or of Searches)."""

    group: np.ndarray  # int64
    user: np.ndarray  # int64, row of Users
    item: np.ndarray  # int64, or NO_ITEM for a result that is no video
    click: np.ndarray  # bool
    key: np.ndarray  # uint64


@dataclass(frozen=True)
class Searches:
    request: np.ndarray  # int64, the request that it follows
    key: np.ndarray  # uint64
    time_ms: np.ndarray  # int64
    topic: np.ndarray  # int64
    related: np.ndarray  # bool: about what was just watched
    concepts: np.ndarray  # int64 [n, ITEM_CONCEPTS], -1 = unused
    words: np.ndarray  # int32 [n, ITEM_CONCEPTS + 1] public word ids, 0 = unused


@dataclass(frozen=True)
class Log:
    users: Users
    requests: Requests
    feed: Impressions
    searches: Searches
    results: Impressions


def make_log(world: World, start: int, stop: int, rows_per_day: float) -> Log:
    """Everything that users start … stop - 1 do; the same rows whatever the range they are asked in."""
    users = make_users(world, start, stop)
    requests = _requests(world, users, rows_per_day / ROWS_OF_REQUEST)
    feed = _feed(world, users, requests)
    searches, intent = _searches(world, users, requests)
    results = _results(world, users, requests, searches, intent)
    feed_kept, results_kept = _first_clicks_only(world, requests, feed, searches, results)
    return Log(users, requests, _take(feed, feed_kept), searches, _take(results, results_kept))


def _requests(world: World, users: Users, requests_per_day: float) -> Requests:
    slots_a_day = len(SLOT_HOURS)
    slot_keys = draws.keys_for(users.keys, P_SLOT, world.days * slots_a_day)  # [U, slots]
    mean = users.activity[:, None] * requests_per_day / slots_a_day
    # geometric: bursts and quiet days
    count = np.log(draws.uniform(slot_keys, P_REQUESTS)) / np.log(mean / (1 + mean))
    count = np.minimum(count.astype(np.int64), MAX_REQUESTS)
    focus = _focus(world, users, slot_keys)
    user, slot = np.nonzero(count)
    repeats = count[user, slot]
    row = np.repeat(np.arange(len(user)), repeats)
    # 0, 1, … inside the session
    index = np.arange(len(row)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    key = draws.keys_for(slot_keys[user, slot][row] + index.astype(np.uint64), P_REQUEST)
    day, hour = slot[row] // slots_a_day, SLOT_HOURS[slot[row] % slots_a_day]
    session_start = hour * 3600 + 5400 * draws.uniform(slot_keys[user, slot], P_TIME)[row]
    offset = session_start + REQUEST_SPACING_S * (index + 0.4 * draws.uniform(key, P_TIME))
    time_ms = ((START_S + day * 86400) * 1000 + offset * 1000).astype(np.int64)
    return Requests(user[row], key, time_ms, day, focus[user, slot][row])


def _focus(world: World, users: Users, slot_keys: np.ndarray) -> np.ndarray:
    """Topic of the moment, [U, slots]: drawn anew now and then, else that of the slot before."""
    drawn = draws.uniform(slot_keys, P_KEEP) >= FOCUS_KEPT
    drawn[:, 0] = True
    interest = np.take_along_axis(
        users.interests, draws.pick(draws.uniform(slot_keys, P_FOCUS), INTERESTS_CUMULATIVE), axis=1
    )
    u = draws.uniform(slot_keys, P_TREND)
    anything = draws.pick((u - FOCUS_IS_INTEREST) / (1 - FOCUS_IS_INTEREST), world.topic_cumulative)
    fresh = np.where(u < FOCUS_IS_INTEREST, interest, anything)
    last_draw = np.maximum.accumulate(np.where(drawn, np.arange(slot_keys.shape[1]), 0), axis=1)
    return np.take_along_axis(fresh, last_draw, axis=1)


def _feed(world: World, users: Users, requests: Requests) -> Impressions:
    keys = draws.keys_for(requests.key, P_CAND, REC_CANDIDATES)  # [R, M]
    u_kind, u_rank, u_noise = draws.uniform3(keys, P_DRAW)
    u_topic, u_click, _ = draws.uniform3(keys, P_EXTRA)
    interest = users.interests[requests.user[:, None], draws.pick(u_topic, INTERESTS_CUMULATIVE)]
    explored = draws.pick(u_topic, world.topic_cumulative)
    topic = np.where(
        u_kind < FEED_FOCUS,
        requests.focus[:, None],
        np.where(u_kind < FEED_FOCUS + FEED_INTERESTS, interest, explored),
    )
    item = world.item_at(topic, u_rank)
    affinity = world.affinity(users.taste[requests.user][:, None, :], item)
    score = FEED_STYLE * affinity + draws.gumbel(u_noise)
    size = MIN_SHOWN + draws.below(requests.key, P_SIZE, MAX_SHOWN - MIN_SHOWN + 1)
    group, column = _shown(world, item, score, requests.day, size)
    topic, item = topic[group, column], item[group, column]
    logit = (
        CLICK_BIAS + CLICK_STYLE * affinity[group, column] + CLICK_FOCUS * (topic == requests.focus[group])
    )
    logit += CLICK_INTEREST * (topic[:, None] == users.interests[requests.user[group]]).any(axis=1)
    click = u_click[group, column] < _sigmoid(logit)
    return Impressions(group, requests.user[group], item, click, keys[group, column])


def _searches(world: World, users: Users, requests: Requests) -> tuple[Searches, np.ndarray]:
    """The searches, and the item that each user has in mind: one of the topic, popular and to the user's
    taste."""
    request = np.nonzero(draws.uniform(requests.key, P_SEARCH) < SEARCH_AFTER_REQUEST)[0]
    key = draws.keys_for(requests.key[request], P_SEARCH)
    user = requests.user[request]
    related = draws.uniform(key, P_RELATED) < SEARCH_RELATED
    interest = users.interests[user, draws.pick(draws.uniform(key, P_FOCUS), INTERESTS_CUMULATIVE)]
    topic = np.where(related, requests.focus[request], interest)
    _, u_rank, u_noise = draws.uniform3(draws.keys_for(key, P_INTENT, 8), P_DRAW)
    wanted = world.item_at(np.broadcast_to(topic[:, None], u_rank.shape), u_rank)
    score = SEARCH_STYLE * world.affinity(users.taste[user][:, None, :], wanted) + draws.gumbel(u_noise)
    intent = np.take_along_axis(wanted, score.argmax(axis=1)[:, None], axis=1)[:, 0]
    length = 1 + draws.pick(draws.uniform(key, P_LENGTH), QUERY_CONCEPTS_CUMULATIVE)
    used = np.arange(ITEM_CONCEPTS) < length[:, None]
    concepts = np.where(used, world.concepts[intent].astype(np.int64), -1)
    forms = query_forms(key)
    words = np.zeros((len(key), ITEM_CONCEPTS + 1), np.int32)
    words[:, :ITEM_CONCEPTS] = np.where(used, world.word(topic[:, None], np.maximum(concepts, 0), forms), 0)
    u = draws.uniform(key, P_COMMON)
    rank = ((u / QUERY_COMMON_WORD) ** 2 * world.num_common_words).astype(np.int64)
    words[:, ITEM_CONCEPTS] = np.where(
        u < QUERY_COMMON_WORD, world.public_word[np.minimum(rank, world.num_common_words - 1)], 0
    )
    # after this request, before the next
    delay_ms = 60_000 + (60_000 * draws.uniform(key, P_TIME)).astype(np.int64)
    return Searches(
        request, key, requests.time_ms[request] + delay_ms, topic, related, concepts, words
    ), intent


def query_forms(search_keys: np.ndarray) -> np.ndarray:
    """Which synonym a query uses for each of its concepts: int64 [n, ITEM_CONCEPTS]."""
    u = draws.uniform(draws.keys_for(search_keys, P_FORMS, ITEM_CONCEPTS), P_FORMS)
    return (u < QUERY_FORMAL).astype(np.int64)


def _results(
    world: World, users: Users, requests: Requests, searches: Searches, intent: np.ndarray
) -> Impressions:
    user, day = requests.user[searches.request], requests.day[searches.request]
    keys = draws.keys_for(searches.key, P_CAND, SEARCH_CANDIDATES)
    u_kind, u_rank, u_noise = draws.uniform3(keys, P_DRAW)
    u_topic, u_click, _ = draws.uniform3(keys, P_EXTRA)
    topic = np.where(u_kind < 0.9, searches.topic[:, None], draws.pick(u_topic, world.topic_cumulative))
    item = world.item_at(topic, u_rank)
    topic[:, 0], item[:, 0] = searches.topic, intent
    match = matched_concepts(world, searches.concepts, item) * (topic == searches.topic[:, None])
    affinity = world.affinity(users.taste[user][:, None, :], item)
    score = SEARCH_MATCH * match + SEARCH_STYLE * affinity + draws.gumbel(u_noise)
    size = MIN_RESULTS + draws.below(searches.key, P_SIZE, MAX_RESULTS - MIN_RESULTS + 1)
    group, column = _shown(world, item, score, day, size)
    key = keys[group, column]
    logit = RESULT_BIAS + RESULT_MATCH * match[group, column] + RESULT_STYLE * affinity[group, column]
    looked_at = draws.uniform(searches.key, P_ABANDON) >= SEARCH_ABANDONED
    click = (u_click[group, column] < _sigmoid(logit)) & looked_at[group]
    non_video = draws.uniform(key, P_NONVIDEO) < NON_VIDEO
    return Impressions(group, user[group], np.where(non_video, NO_ITEM, item[group, column]), click, key)


def matched_concepts(world: World, query: np.ndarray, items: np.ndarray) -> np.ndarray:
    """How many of the query's concepts [n, ITEM_CONCEPTS] each item [n, m] has (of the same topic): int64 [n,
    m]."""
    own = world.concepts[items]
    count = np.zeros(items.shape, np.int64)
    for column in range(ITEM_CONCEPTS):
        wanted = query[:, column, None]
        repeated = (query[:, :column] == wanted).any(axis=1)[:, None]
        count += (own == wanted[:, :, None]).any(axis=2) & (wanted >= 0) & ~repeated
    return count


def _shown(
    world: World, item: np.ndarray, score: np.ndarray, day: np.ndarray, size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the `size` best different candidates that are uploaded by `day`, in the order of
    rows."""
    score = np.where(world.upload_day[item] <= day[:, None], score, -np.inf)
    order = np.argsort(item, axis=1, kind="stable")
    ordered = np.take_along_axis(item, order, axis=1)
    twin = np.zeros(item.shape, bool)
    np.put_along_axis(twin, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    score[twin] = -np.inf
    best = np.argsort(-score, axis=1, kind="stable")[:, : int(size.max(initial=0))]
    kept = (np.arange(best.shape[1]) < size[:, None]) & (np.take_along_axis(score, best, axis=1) > -np.inf)
    row, place = np.nonzero(kept)
    return row, best[row, place]


def _first_clicks_only(
    world: World, requests: Requests, feed: Impressions, searches: Searches, results: Impressions
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows stay: an item that a user has clicked is not shown to that user again, by either service."""
    item = np.concatenate([feed.item, results.item])
    click = np.concatenate([feed.click, results.click])
    time_ms = np.concatenate([requests.time_ms[feed.group], searches.time_ms[results.group]])
    # NO_ITEM is a pair of its own
    pair = np.concatenate([feed.user, results.user]) * (world.num_items + 1) + item + 1
    order = np.lexsort((time_ms, pair))
    pair, click = pair[order], click[order]
    clicks_before = np.cumsum(click) - click
    first = np.r_[True, pair[1:] != pair[:-1]]
    at_start = clicks_before[first][np.cumsum(first) - 1] if len(pair) else clicks_before
    keep = np.empty(len(pair), bool)
    keep[order] = clicks_before == at_start
    keep |= item == NO_ITEM
    return keep[: len(feed.item)], keep[len(feed.item) :]


def _take(rows: Impressions, keep: np.ndarray) -> Impressions:
    return Impressions(rows.group[keep], rows.user[keep], rows.item[keep], rows.click[keep], rows.key[keep])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))  # float64: see draws.gumbel
