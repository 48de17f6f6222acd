"""KuaiSAR's five CSV files: field names, order and spelling as published
(kuaisar.github.io/detailed_statistics.html)."""

from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards import hashing
from data_shards.simulate import draws, names
from data_shards.simulate.behaviour import NO_ITEM, START_S, Log
from data_shards.simulate.world import (
    ITEM_CONCEPTS,
    MAX_SECONDS,
    MAX_THIRDS,
    NUM_COMMUNITIES,
    NUM_THEMES,
    Users,
    World,
)

BEIJING_S = 8 * 3600
MAX_COMMON_WORDS = 4  # words without meaning in a caption
NO_CAPTION, NO_CATEGORY, NO_THIRD, NO_FOURTH = 0.03, 0.04, 0.10, 0.55  # shares of the items
SOURCES = np.array(["USER_INPUT", "SEARCH_HISTORY", "QUERY_SUGGESTION", "RELATED_QUERY"])
SOURCES_CUMULATIVE = np.cumsum([0.6, 0.12, 0.16, 0.12])
OTHER_TYPES = np.array(["USER", "LIVE", "COMMODITY", "MUSIC", "IMAGE_ATLAS", "ADVERT"])
OTHER_TYPES_CUMULATIVE = np.cumsum([0.5, 0.2, 0.1, 0.1, 0.06, 0.04])
OTHER_ID_BASE, OTHER_ID_STEP = 100_000_000_000, 1000  # ids of users, live streams, … lie far above the items'
UPLOAD_TYPES = np.array(["LongImport", "ShortImport", "ShortCamera", "Kmovie", "UNKNOWN"])
UPLOAD_TYPES_CUMULATIVE = np.cumsum([0.35, 0.3, 0.2, 0.1, 0.05])
FORWARD, LIKE, FOLLOW = 0.01, 0.06, 0.015  # probabilities after a click
FOLLOWS_SOMEONE = 0.08

LEVELS = ("first", "second", "third", "fourth")
REC_FIELDS = (
    *("user_id", "item_id", "playing_time", "duration_ms", "time", "timestamp"),
    *("click", "forward", "like", "follow", "search", "search_item_related"),
)
SRC_FIELDS = (
    *("user_id", "search_session_id", "search_session_time", "search_session_timestamp"),
    *("keyword", "search_source", "item_id", "click_cnt", "item_type"),
)
ITEM_FIELDS = (
    *("item_id", "caption", "author_id", "item_type", "upload_time", "upload_type"),
    *(f"{level}_level_category_{part}" for level in LEVELS for part in ("id", "name", "name_en")),
)
ITEMS_FILE = "item_features.csv"
HEADERS = {
    "rec_inter.csv": REC_FIELDS,
    "src_inter.csv": SRC_FIELDS,
    "social_network.csv": ("user_id", "user_follow_id"),
    "user_features.csv": (
        "user_id",
        "search_active_level",
        "rec_active_level",
        "onehot_feat1",
        "onehot_feat2",
    ),
    ITEMS_FILE: ITEM_FIELDS,
}

# Purposes: the second argument of every draw (see world.py).
P_DURATION, P_PLAYED, P_FORWARD, P_LIKE, P_FOLLOW, P_REPEAT, P_TYPE, P_OTHER, P_SOURCE, P_AUTHOR, P_UPTYPE = (
    range(300, 311)
)
P_COMMON, P_CAPTION, P_NOCAT, P_NOTHIRD, P_NOFOURTH, P_SOCIAL, P_WHOM, P_ONEHOT1, P_ONEHOT2, P_USERID = range(
    311, 321
)


def user_ids(world: World) -> np.ndarray:
    """Public ids of all users, 1 … num_users, in no order."""
    return hashing.permutation(world.num_users, hashing.derive_seed(world.seed, P_USERID)) + 1


def write_header(file: BinaryIO, fields: tuple[str, ...]) -> None:
    file.write((",".join(fields) + "\n").encode())


def write_rows(file: BinaryIO, columns: list[pa.Array]) -> None:
    """Append rows to a CSV file; columns hold finished text (quoted by whoever makes it) or integers."""
    if len(columns[0]) == 0:
        return
    text = [column if pa.types.is_string(column.type) else pc.cast(column, pa.string()) for column in columns]
    lines = pc.binary_join_element_wise(*text[:-1], pc.binary_join_element_wise(text[-1], "\n", ""), ",")
    for chunk in lines.chunks if isinstance(lines, pa.ChunkedArray) else [lines]:
        first, last = chunk.offset, chunk.offset + len(chunk)
        offsets = np.frombuffer(chunk.buffers()[1], np.int32)
        file.write(memoryview(chunk.buffers()[2])[offsets[first] : offsets[last]])


def log_columns(
    world: World, log: Log, ids: np.ndarray, all_ids: np.ndarray, first_session: int
) -> dict[str, list[pa.Array]]:
    """Rows of the four files about users; `ids` are the public ids of the log's users."""
    return {
        "rec_inter.csv": rec_columns(world, log, ids),
        "src_inter.csv": src_columns(world, log, ids, first_session),
        "social_network.csv": social_columns(log.users, ids, all_ids),
        "user_features.csv": user_columns(world, log.users, ids),
    }


def rec_columns(world: World, log: Log, ids: np.ndarray) -> list[pa.Array]:
    """rec_inter.csv of a log; `ids` are the public ids of the log's users. Rows of one request share their
    timestamp."""
    feed, requests = log.feed, log.requests
    searched_after = np.zeros(len(requests.user), bool)
    searched_after[log.searches.request] = True
    related_after = np.zeros(len(requests.user), bool)
    related_after[log.searches.request] = log.searches.related
    last_of_request = np.r_[feed.group[1:] != feed.group[:-1], True] if len(feed.group) else np.zeros(0, bool)
    search = last_of_request & searched_after[feed.group]
    duration = durations_ms(world, feed.item)
    u = draws.uniform(feed.key, P_PLAYED)
    playing = np.where(feed.click, duration * (0.5 + 0.9 * u), np.minimum(duration * 0.4, 4000) * u).astype(
        np.int64
    )
    time_ms = requests.time_ms[feed.group]

    def after_click(purpose: int, probability: float) -> pa.Array:
        return _ints(feed.click & (draws.uniform(feed.key, purpose) < probability))

    return [
        _ints(ids[feed.user]),
        _ints(world.public_item[feed.item]),
        _floats(playing),
        _floats(duration),
        _datetimes(time_ms // 1000),
        _floats(time_ms),
        _ints(feed.click),
        after_click(P_FORWARD, FORWARD),
        after_click(P_LIKE, LIKE),
        after_click(P_FOLLOW, FOLLOW),
        _ints(search),
        _ints(search & related_after[feed.group]),
    ]


def src_columns(world: World, log: Log, ids: np.ndarray, first_session: int) -> list[pa.Array]:
    """src_inter.csv of a log; sessions are numbered from `first_session` on, one a search."""
    results, searches = log.results, log.searches
    video = results.item != NO_ITEM
    other = draws.pick(draws.uniform(results.key, P_TYPE), OTHER_TYPES_CUMULATIVE)
    other_id = OTHER_ID_BASE + OTHER_ID_STEP * (
        draws.below(results.key, P_OTHER, max(10, world.num_items // 5)) * len(OTHER_TYPES) + other
    )
    time_ms = searches.time_ms[results.group]
    again = draws.uniform(results.key, P_REPEAT) < 0.05  # click_cnt counts, so now and then it is 2
    source = SOURCES[draws.pick(draws.uniform(searches.key, P_SOURCE), SOURCES_CUMULATIVE)]
    keyword = list_text(searches.words, searches.words > 0)
    return [
        _ints(ids[results.user]),
        _ints(first_session + results.group),
        _datetimes(time_ms // 1000),
        _ints(time_ms),
        keyword.take(pa.array(results.group)),
        pa.array(source[results.group]),
        _ints(np.where(video, world.public_item[np.maximum(results.item, 0)], other_id)),
        _ints(results.click * (1 + again)),
        pa.array(np.where(video, "VIDEO", OTHER_TYPES[other])),
    ]


def item_columns(world: World, items: np.ndarray) -> list[pa.Array]:
    """item_features.csv of the given items (internal numbers)."""
    words, used = captions(world, items)
    keys = world.item_keys(items)
    topic = world.topic_of(items)
    community = (keys % np.uint64(NUM_COMMUNITIES)).astype(np.int64)
    author = 1 + (topic * NUM_COMMUNITIES + community) * 4 + draws.below(keys, P_AUTHOR, 4)
    upload_s = START_S + world.upload_day[items].astype(np.int64) * 86400
    upload = pc.cast(pa.array((upload_s + BEIJING_S) // 86400, pa.int32()).cast(pa.date32()), pa.string())
    kind = np.where(draws.uniform(keys, P_TYPE) < 0.97, "NORMAL", "UNKNOWN")
    upload_type = UPLOAD_TYPES[draws.pick(draws.uniform(keys, P_UPTYPE), UPLOAD_TYPES_CUMULATIVE)]
    head = [
        _ints(world.public_item[items]),
        list_text(words, used),
        _ints(author),
        pa.array(kind),
        upload,
        pa.array(upload_type),
    ]
    return head + _category_columns(world, items, topic)


def captions(world: World, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Public word ids of captions [n, ITEM_CONCEPTS + MAX_COMMON_WORDS], and which of them are there."""
    keys = world.item_keys(items)
    concepts = world.concepts[items].astype(np.int64)
    meaning = world.word(world.topic_of(items)[:, None], concepts, world.item_forms(items))
    u = draws.uniform(draws.keys_for(keys, P_COMMON, MAX_COMMON_WORDS), P_COMMON)
    # the first are the most frequent
    common = world.public_word[(u**2.5 * world.num_common_words).astype(np.int64)]
    words = np.concatenate([meaning, common], axis=1)
    used = np.ones(words.shape, bool)
    for column in range(1, ITEM_CONCEPTS):
        used[:, column] = (meaning[:, :column] != meaning[:, column : column + 1]).all(axis=1)
    used[:, ITEM_CONCEPTS:] = (
        np.arange(MAX_COMMON_WORDS) <= draws.below(keys, P_CAPTION, MAX_COMMON_WORDS)[:, None]
    )
    return words, used & (draws.uniform(keys, P_CAPTION) >= NO_CAPTION)[:, None]


def user_columns(world: World, users: Users, ids: np.ndarray) -> list[pa.Array]:
    """user_features.csv of a range of users."""
    level = np.digitize(users.activity, [0.4, 0.8, 1.5])
    search_level = np.digitize(users.activity * (0.5 + draws.uniform(users.keys, P_ONEHOT1)), [0.4, 0.8, 1.5])
    onehot1 = draws.below(users.keys, P_ONEHOT1, 3)
    onehot2 = np.where(
        draws.uniform(users.keys, P_ONEHOT2) < 0.3, users.community % 8, draws.below(users.keys, P_ONEHOT2, 8)
    )
    return [_ints(ids), _ints(search_level), _ints(level), _ints(onehot1), _ints(onehot2)]


def social_columns(users: Users, ids: np.ndarray, all_ids: np.ndarray) -> list[pa.Array]:
    """social_network.csv of a range of users: few follow one other user."""
    follows = draws.uniform(users.keys, P_SOCIAL) < FOLLOWS_SOMEONE
    whom = all_ids[draws.below(users.keys[follows], P_WHOM, len(all_ids))]
    other = whom != ids[follows]
    return [_ints(ids[follows][other]), _ints(whom[other])]


def durations_ms(world: World, items: np.ndarray) -> np.ndarray:
    """Length of each video, 5 s to some minutes, int64."""
    z = draws.normal(world.item_keys(items), P_DURATION).astype(np.float64)
    return (5000 + 25_000 * np.exp(0.8 * z)).astype(np.int64)


def list_text(words: np.ndarray, used: np.ndarray) -> pa.Array:
    """Rows of word ids → "[1, 2, 3]" with the quotes that CSV needs around a comma."""
    counts = used.sum(axis=1)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    rows = pa.ListArray.from_arrays(
        pa.array(offsets), pc.cast(pa.array(words[used], pa.int32()), pa.string())
    )
    inside = pc.binary_join(rows, ", ")
    quote = pa.array(np.where(counts > 1, '"', ""))
    return pc.binary_join_element_wise(quote, "[", inside, "]", quote, "")


def _category_columns(world: World, items: np.ndarray, topic: np.ndarray) -> list[pa.Array]:
    keys = world.item_keys(items)
    first = world.first_of(topic)
    second = world.second_of(topic) % world.num_seconds
    third = world.third_in_second(topic)
    theme = world.concepts[items, 0].astype(np.int64) % NUM_THEMES
    present = draws.uniform(keys, P_NOCAT) >= NO_CATEGORY
    with_third = present & (draws.uniform(keys, P_NOTHIRD) >= NO_THIRD)
    with_fourth = with_third & (draws.uniform(keys, P_NOFOURTH) >= NO_FOURTH)
    levels = [
        (present, first, names.FIRSTS[: world.num_firsts], 1 + first),
        (
            present,
            first * MAX_SECONDS + second,
            _table(world.num_firsts, MAX_SECONDS, names.second_names),
            101 + first * MAX_SECONDS + second,
        ),
        (
            with_third,
            second * MAX_THIRDS + third,
            _table(MAX_SECONDS, MAX_THIRDS, names.third_names),
            1001 + topic,
        ),
        (
            with_fourth,
            third * NUM_THEMES + theme,
            _table(MAX_THIRDS, NUM_THEMES, names.fourth_names),
            10_001 + topic * NUM_THEMES + theme,
        ),
    ]
    columns: list[pa.Array] = []
    for there, index, table, category_id in levels:
        code = pa.array(np.where(there, index + 1, 0))
        columns.append(_ints(np.where(there, category_id, 0)))
        columns += [
            pa.array([names.EMPTY[language]] + [row[language] for row in table]).take(code)
            for language in (0, 1)
        ]
    return columns


def _table(rows: int, columns: int, name_of: Callable[[int, int], tuple[str, str]]) -> list[tuple[str, str]]:
    return [name_of(row, column) for row in range(rows) for column in range(columns)]


def _ints(values: np.ndarray) -> pa.Array:
    return pa.array(np.asarray(values).astype(np.int64))


def _floats(values: np.ndarray) -> pa.Array:
    """Whole numbers written as floats ("60792.0"), which is how the published files have them."""
    return pc.binary_join_element_wise(pc.cast(_ints(values), pa.string()), ".0", "")


def _datetimes(seconds: np.ndarray) -> pa.Array:
    """Unix seconds → "2023-05-22 15:53:20", Beijing time."""
    return pc.cast(_ints(seconds + BEIJING_S).cast(pa.timestamp("s")), pa.string())
