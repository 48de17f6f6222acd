"""The planted world: what items are and what users like. Nothing here depends on who is simulated when.

    topics   leaves of a category tree; each has its own concepts, and each concept several words (synonyms)
    items    one topic, three concepts, a popularity rank inside the topic, and a style that no text shows
    users    a few topics, and a taste: users and items fall into communities, and affinity = taste · style

A model that reads text finds topics and concepts, collaborative filtering finds topics and styles: neither
has it all.
"""

from dataclasses import dataclass

import numpy as np

from data_shards import hashing
from data_shards.simulate import draws

STYLE_DIM = 8
NUM_COMMUNITIES = 10  # of users by taste and of items by style
COMMUNITY_SPREAD = 0.45  # noise of a member around its community, in units of a centre's coordinates (±1)
# styles and tastes are int8: 16 = one unit, so affinities are exact integers on every machine
STYLE_SCALE = 16
# the r-th most popular item of a topic is chosen ∝ (r + POPULARITY_OFFSET) ** -POPULARITY_EXPONENT
POPULARITY_EXPONENT = 0.8
# 1 / (1 - POPULARITY_EXPONENT): an integer, so drawing a rank needs products only, the same bits everywhere
POPULARITY_ROOT = 5
POPULARITY_OFFSET = 2.0
TOPIC_EXPONENT = 0.6  # the same for topics, over all users
ITEM_CONCEPTS = 3
NUM_FORMS = 2  # a concept has an everyday and a formal word
# who says it formally: words of queries and captions differ, so exact matching misses much
CAPTION_FORMAL, QUERY_FORMAL = 0.3, 0.7
# of a topic's concepts use the words of their second-level category: a word may mean several topics
SHARED_CONCEPTS = 0.2
INTERESTS_CUMULATIVE = np.cumsum([0.36, 0.25, 0.18, 0.12, 0.09])  # share of each long-term topic of a user
NEW_ITEMS = 0.10  # of the items are uploaded while the log runs
MISSING_FEATURES = 0.002  # of the items are in the logs but not in item_features.csv
MAX_FIRSTS, MAX_SECONDS, MAX_THIRDS, NUM_THEMES = 24, 12, 12, 6  # names in names.py
ITEM_BLOCK = 1 << 17  # items made at once: bounds temporary memory

# Purposes: the second argument of every draw, so that no two decisions share a hash.
P_ITEM, P_USER, P_CENTRE, P_COMMUNITY, P_STYLE, P_CONCEPT, P_UPLOAD, P_FORM = range(100, 108)
P_MISSING, P_ACTIVITY, P_INTEREST, P_HOME, P_NEAR, P_WORDS, P_IDS = range(108, 115)


@dataclass(frozen=True)
class World:
    """Items are numbered topic by topic, most popular first; `public_item` is the id that the log shows."""

    seed: int
    num_users: int
    num_items: int
    days: int
    topic_start: np.ndarray  # int64 [T + 1]: items topic_start[t] … topic_start[t+1]-1 belong to topic t
    topic_cumulative: np.ndarray  # float64 [T]
    # float32 [T], integral of the popularity law over the topic's items (times 1 - exponent)
    topic_mass: np.ndarray
    num_firsts: int
    num_seconds: int
    num_concepts: int  # of each topic
    num_common_words: int
    public_item: np.ndarray  # int32 [I], 1 … I
    style: np.ndarray  # int8 [I, STYLE_DIM]
    concepts: np.ndarray  # uint8 [I, ITEM_CONCEPTS]
    upload_day: np.ndarray  # int16 [I]; negative: before the log starts
    public_word: np.ndarray  # int32 [V], 1 … V

    @property
    def num_topics(self) -> int:
        return len(self.topic_cumulative)

    @property
    def num_words(self) -> int:
        return len(self.public_word)

    @property
    def num_shared_concepts(self) -> int:
        """Concepts 0 … n - 1 of a topic use the words of its second-level category."""
        return int(SHARED_CONCEPTS * self.num_concepts)

    def topic_of(self, items: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.topic_start, items, side="right") - 1

    def first_of(self, topics: np.ndarray) -> np.ndarray:
        return topics % self.num_firsts

    def second_of(self, topics: np.ndarray) -> np.ndarray:
        """Index of the second-level category over the whole tree."""
        return (topics % self.num_firsts) * self.num_seconds + (topics // self.num_firsts) % self.num_seconds

    def third_in_second(self, topics: np.ndarray) -> np.ndarray:
        return topics // self.num_firsts // self.num_seconds

    def item_at(self, topics: np.ndarray, u: np.ndarray) -> np.ndarray:
        """The item of each topic at quantile u of the topic's popularity (inverse of the power law's
        integral)."""
        start = self.topic_start[topics]
        low = np.float32(POPULARITY_OFFSET ** (1 / POPULARITY_ROOT))
        root = low + u.astype(np.float32) * self.topic_mass[topics]
        square = root * root
        rank = (square * square * root - np.float32(POPULARITY_OFFSET)).astype(np.int64)
        return start + np.clip(rank, 0, self.topic_start[topics + 1] - start - 1)

    def affinity(self, taste: np.ndarray, items: np.ndarray) -> np.ndarray:
        """taste int8 [..., STYLE_DIM] · style of items [...] → float32, about 1 inside a community, 0 ± 0.35
        outside."""
        dot = np.einsum("...d,...d->...", taste, self.style[items], dtype=np.int32)
        return dot.astype(np.float32) * np.float32(1 / (STYLE_DIM * STYLE_SCALE**2))

    def word(self, topics: np.ndarray, concepts: np.ndarray, forms: np.ndarray) -> np.ndarray:
        """Public word ids (1 … V) of concepts in one of their forms; all arguments broadcast."""
        shared = concepts < self.num_shared_concepts
        owner = np.where(shared, self.num_topics + self.second_of(topics), topics)
        return self.public_word[
            self.num_common_words + (owner * self.num_concepts + concepts) * NUM_FORMS + forms
        ]

    def item_keys(self, items: np.ndarray) -> np.ndarray:
        return hashing.mix64(items, hashing.derive_seed(self.seed, P_ITEM))

    def item_forms(self, items: np.ndarray) -> np.ndarray:
        """Which synonym a caption uses for each of its concepts: int64 [..., ITEM_CONCEPTS]."""
        return (
            draws.uniform(draws.keys_for(self.item_keys(items), P_FORM, ITEM_CONCEPTS), P_FORM)
            < CAPTION_FORMAL
        ).astype(np.int64)

    def has_features(self, items: np.ndarray) -> np.ndarray:
        return draws.uniform(self.item_keys(items), P_MISSING) >= MISSING_FEATURES


@dataclass(frozen=True)
class Users:
    """A range of users: rows are users start … start + len - 1 of the world."""

    keys: np.ndarray  # uint64 [U]
    community: np.ndarray  # int64 [U]
    taste: np.ndarray  # int8 [U, STYLE_DIM]
    interests: np.ndarray  # int64 [U, 5] topics, strongest first (may repeat)
    activity: np.ndarray  # float64 [U], mean about 1


def make_world(users: int, items: int, days: int, seed: int) -> World:
    """Lay out topics, words and items. About 80 bytes an item, of which 20 stay."""
    topics = int(np.clip(round(36 * (items / 4000) ** 0.55), 6, MAX_FIRSTS * MAX_SECONDS * MAX_THIRDS))
    topics = min(topics, items)
    firsts = min(MAX_FIRSTS, max(2, round(topics**0.5)))
    seconds = min(MAX_SECONDS, max(1, round((topics / firsts) ** 0.5)))
    concepts = int(np.clip(round(8 * (items / 4000) ** 0.28), 6, 250))
    common = round(150 * (items / 4000) ** 0.5)
    weight = np.arange(3, topics + 3) ** -TOPIC_EXPONENT
    # popular topics hold more items, but fewer than their share of views
    bounds = np.concatenate([[0], np.cumsum(weight**0.5)])
    start = np.round(bounds / bounds[-1] * (items - topics)).astype(np.int64) + np.arange(topics + 1)
    num_words = common + (topics + firsts * seconds) * concepts * NUM_FORMS
    world = World(
        seed=seed,
        num_users=users,
        num_items=items,
        days=days,
        topic_start=start,
        topic_cumulative=np.cumsum(weight) / weight.sum(),
        topic_mass=(
            (np.diff(start) + POPULARITY_OFFSET) ** (1 / POPULARITY_ROOT)
            - POPULARITY_OFFSET ** (1 / POPULARITY_ROOT)
        ).astype(np.float32),
        num_firsts=firsts,
        num_seconds=seconds,
        num_concepts=concepts,
        num_common_words=common,
        public_item=(hashing.permutation(items, hashing.derive_seed(seed, P_IDS, 0)) + 1).astype(np.int32),
        style=np.empty((items, STYLE_DIM), np.int8),
        concepts=np.empty((items, ITEM_CONCEPTS), np.uint8),
        upload_day=np.empty(items, np.int16),
        public_word=(hashing.permutation(num_words, hashing.derive_seed(seed, P_WORDS)) + 1).astype(np.int32),
    )
    for block in range(0, items, ITEM_BLOCK):
        _fill_items(world, np.arange(block, min(block + ITEM_BLOCK, items)))
    return world


def _fill_items(world: World, items: np.ndarray) -> None:
    keys = world.item_keys(items)
    world.style[items] = _members(world, keys, draws.below(keys, P_COMMUNITY, NUM_COMMUNITIES))
    u = draws.uniform(draws.keys_for(keys, P_CONCEPT, ITEM_CONCEPTS), P_CONCEPT)
    # the first concepts of a topic are the common ones
    world.concepts[items] = (u**1.5 * world.num_concepts).astype(np.uint8)
    v = draws.uniform(keys, P_UPLOAD)
    new = v < NEW_ITEMS
    world.upload_day[items] = np.where(new, v / NEW_ITEMS * world.days, -1 - (v - NEW_ITEMS) * 400).astype(
        np.int16
    )


def _members(world: World, keys: np.ndarray, community: np.ndarray) -> np.ndarray:
    """Vectors of community members, int8 [len(keys), STYLE_DIM]."""
    centre_keys = hashing.mix64(
        np.arange(NUM_COMMUNITIES * STYLE_DIM), hashing.derive_seed(world.seed, P_CENTRE)
    )
    centres = np.where(centre_keys >> np.uint64(63), 1, -1).reshape(NUM_COMMUNITIES, STYLE_DIM)
    noise = draws.normal(draws.keys_for(keys, P_STYLE, STYLE_DIM), P_STYLE)
    return np.round(STYLE_SCALE * (centres[community] + np.float32(COMMUNITY_SPREAD) * noise)).astype(np.int8)


def make_users(world: World, start: int, stop: int) -> Users:
    """Users start … stop - 1 of the world: the same whatever the range they are asked in."""
    keys = hashing.mix64(np.arange(start, stop), hashing.derive_seed(world.seed, P_USER))
    community = draws.below(keys, P_COMMUNITY, NUM_COMMUNITIES)
    activity = np.exp(0.55 * draws.normal(keys, P_ACTIVITY).astype(np.float64) - 0.55**2 / 2)
    slots = draws.keys_for(keys, P_INTEREST, len(INTERESTS_CUMULATIVE))
    anywhere = draws.pick(draws.uniform(slots, P_INTEREST), world.topic_cumulative)
    # half of the other interests lie in the first-level category of the strongest
    home = world.first_of(anywhere[:, :1])
    in_home = -(-(world.num_topics - home) // world.num_firsts)
    near = home + world.num_firsts * draws.below(slots, P_NEAR, in_home)
    is_near = draws.uniform(slots, P_HOME) < 0.5
    is_near[:, 0] = False
    return Users(
        keys, community, _members(world, keys, community), np.where(is_near, near, anywhere), activity
    )
