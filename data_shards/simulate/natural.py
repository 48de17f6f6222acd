"""A world in natural words, as `gensr prepare tables` reads it: events.csv and items.csv.

title  Small steel garden trowel with hook, Fenwick, 30 cm    the item's concepts; what follows means nothing
query  best compact hand spade                                the search's concepts, often in other words

Titles and queries say what the anonymised words say (tables.py): concepts in an everyday or a formal word.
The kind of item says the topic.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.schema import REC, SRC, TASKS
from data_shards.simulate import draws
from data_shards.simulate.behaviour import NO_ITEM, P_COMMON, QUERY_COMMON_WORD, Log, Searches, query_forms
from data_shards.simulate.lexicon import make_kinds
from data_shards.simulate.world import CAPTION_FORMAL, QUERY_FORMAL, World

# more items need more kinds than the grammar has: world.make_world lays out 41 topics for as many
MAX_ITEMS = 5000
WITH_BRAND, WITH_SIZE = 0.8, 0.7  # shares of the titles
PLAIN_QUERY = 0.15  # of the queries name the kind only
# words of queries that mean nothing
FILLERS = ("best", "buy", "new", "good", "sale", "gift", "online", "nice")

ITEMS_FILE = "items.csv"
HEADERS = {
    "events.csv": ("user_id", "item_id", "time", "task", "query", "clicked"),
    ITEMS_FILE: ("item_id", "text", "category"),
}

# Purposes: the second argument of every draw (see world.py).
P_NOUN, P_BRAND, P_SIZE, P_PLAIN, P_FILLER = range(410, 415)


def titles(world: World, items: np.ndarray) -> list[str]:
    """The title of each item (internal numbers)."""
    kinds = make_kinds(world)
    keys = world.item_keys(items)
    columns = zip(
        world.topic_of(items).tolist(),
        world.concepts[items].tolist(),
        world.item_forms(items).tolist(),
        (draws.uniform(keys, P_NOUN) < CAPTION_FORMAL).tolist(),
        draws.uniform(keys, P_BRAND).tolist(),
        draws.uniform(keys, P_SIZE).tolist(),
        strict=True,
    )
    found = []
    for topic, concepts, forms, noun_form, brand, size in columns:
        kind = kinds[topic]
        phrase = kind.phrase(concepts, forms, noun_form)
        parts = [phrase[0].upper() + phrase[1:]]
        parts += [*_perhaps(kind.brands, brand / WITH_BRAND), *_perhaps(kind.sizes, size / WITH_SIZE)]
        found.append(", ".join(parts))
    return found


def queries(world: World, searches: Searches) -> list[str]:
    """The query of each search."""
    kinds = make_kinds(world)
    keys = searches.key
    columns = zip(
        searches.topic.tolist(),
        searches.concepts.tolist(),
        query_forms(keys).tolist(),
        (draws.uniform(keys, P_NOUN) < QUERY_FORMAL).tolist(),
        (draws.uniform(keys, P_PLAIN) < PLAIN_QUERY).tolist(),
        (draws.uniform(keys, P_COMMON) < QUERY_COMMON_WORD).tolist(),
        draws.below(keys, P_FILLER, len(FILLERS)).tolist(),
        strict=True,
    )
    found = []
    for topic, concepts, forms, noun_form, is_plain, has_filler, filler in columns:
        count = 0 if is_plain else sum(concept >= 0 for concept in concepts)
        phrase = kinds[topic].phrase(concepts[:count], forms[:count], noun_form)
        found.append(f"{FILLERS[filler]} {phrase}" if has_filler else phrase)
    return found


def item_columns(world: World, items: np.ndarray) -> list[pa.Array]:
    """items.csv of the given items (internal numbers)."""
    paths = pa.array([" > ".join(kind.path) for kind in make_kinds(world)])
    return [
        pa.array(world.public_item[items].astype(np.int64)),
        _quoted(pa.array(titles(world, items))),
        paths.take(pa.array(world.topic_of(items))),
    ]


def log_columns(
    world: World, log: Log, ids: np.ndarray, all_ids: np.ndarray, first_session: int
) -> dict[str, list[pa.Array]]:
    """Rows of events.csv by user and time; `ids` are the public ids of the log's users. Results that are no
    items are left out."""
    feed, results = log.feed, log.results
    is_item = results.item != NO_ITEM
    search = results.group[is_item]
    user = np.concatenate([feed.user, results.user[is_item]])
    time_ms = np.concatenate([log.requests.time_ms[feed.group], log.searches.time_ms[search]])
    item = np.concatenate([feed.item, results.item[is_item]])
    task = np.repeat([REC, SRC], [len(feed.item), len(search)])
    # text 0 is that of a recommendation: none
    text = np.concatenate([np.zeros(len(feed.item), np.int64), 1 + search])
    clicked = np.concatenate([feed.click, results.click[is_item]])
    order = np.lexsort((time_ms, user))
    columns = [
        pa.array(ids[user]),
        pa.array(world.public_item[item].astype(np.int64)),
        pa.array(time_ms),
        pa.array(TASKS).take(pa.array(task)),
        pa.array(["", *queries(world, log.searches)]).take(pa.array(text)),
        pa.array(clicked.astype(np.int64)),
    ]
    return {"events.csv": [column.take(pa.array(order)) for column in columns]}


def _perhaps(words: tuple[str, ...], u: float) -> list[str]:
    """One of the words, by a number in (0, 1); none where it is 1 or more."""
    return [words[int(u * len(words))]] if u < 1 else []


def _quoted(text: pa.Array) -> pa.Array:
    """For CSV: titles hold commas, and no quotes."""
    return pc.binary_join_element_wise('"', text, '"', "")
