"""The planted world rewards what the project builds: each kind of knowledge ranks better than the one before,
none is enough alone.

NDCG@10 with 1 + 99 uniform negatives on the last day of a small world; simple numpy scorers stand in for the
models.
"""

from collections.abc import Callable

import numpy as np
import pytest

from data_shards.simulate import behaviour as b
from data_shards.simulate import csv_tables
from data_shards.simulate.oracle import Clicks, oracle_scores, planted_clicks
from data_shards.simulate.world import World, make_users, make_world

USERS, ITEMS, DAYS = 500, 2000, 14
NUM_NEGATIVES = 99


class Exam:
    """Training counts, test clicks and their candidates (column 0 is the clicked item) of one world."""

    def __init__(self, seed: int = 0, events: int = 400):
        self.world: World = make_world(USERS, ITEMS, DAYS, seed)
        self.clicks = planted_clicks(self.world, rows_per_day=24.0)
        self.users = make_users(self.world, 0, USERS)
        day = (self.clicks.time_ms // 1000 - b.START_S) // 86400
        train = (day < DAYS - 1) & ~self.clicks.search
        self.seen = np.zeros((USERS, ITEMS), bool)
        self.seen[self.clicks.user, self.clicks.item] = True
        matrix = np.zeros((USERS, ITEMS), np.float32)
        matrix[self.clicks.user[train], self.clicks.item[train]] = 1
        self.popularity = matrix.sum(0)
        together = matrix.T @ matrix
        np.fill_diagonal(together, 0)
        norm = np.sqrt(np.maximum(self.popularity, 1))
        self.similarity = together / norm[:, None] / norm
        rng = np.random.default_rng(seed)
        self.test = {}
        for search in (False, True):
            rows = rng.permutation(np.nonzero((day == DAYS - 1) & (self.clicks.search == search))[0])[:events]
            negatives = [
                rng.choice(np.nonzero(~self.seen[self.clicks.user[r]])[0], NUM_NEGATIVES, replace=False)
                for r in rows
            ]
            self.test[search] = rows, np.column_stack([self.clicks.item[rows], negatives])

    def rows(self, search: bool) -> Clicks:
        picked = self.test[search][0]
        return Clicks(*(getattr(self.clicks, name)[picked] for name in Clicks.__dataclass_fields__))

    def ndcg(self, search: bool, score: Callable[[Clicks, np.ndarray], np.ndarray]) -> float:
        scores = score(self.rows(search), self.test[search][1])
        above, equal = (scores[:, 1:] > scores[:, :1]).sum(1), (scores[:, 1:] == scores[:, :1]).sum(1)
        # ties: mean over their places
        ranks = [np.arange(a, a + e + 1) for a, e in zip(above, equal, strict=True)]
        return float(np.mean([np.where(r < 10, 1 / np.log2(r + 2), 0).mean() for r in ranks]))

    def knn(self, last: int) -> Callable[[Clicks, np.ndarray], np.ndarray]:
        """Similarity of a candidate to the user's `last` clicks before the event, newer ones weighing more
        when they are few."""

        def score(rows: Clicks, candidates: np.ndarray) -> np.ndarray:
            out = np.zeros(candidates.shape)
            for row in range(len(candidates)):
                mine = np.nonzero(
                    (self.clicks.user == rows.user[row]) & (self.clicks.time_ms < rows.time_ms[row])
                )[0]
                items = self.clicks.item[mine[np.argsort(self.clicks.time_ms[mine])]][-last:]
                weight = 0.85 ** np.arange(len(items))[::-1] if last < 100 else np.ones(len(items))
                out[row] = weight @ self.similarity[np.ix_(items, candidates[row])]
            return out

        return score

    def overlap(self, rows: Clicks, candidates: np.ndarray) -> np.ndarray:
        """Words that query and caption share, rare ones counting more: BM25 without its constants."""
        words, used = csv_tables.captions(self.world, np.arange(ITEMS))
        words = np.where(used, words, -1)
        frequency = np.bincount(words[used], minlength=self.world.num_words + 1)
        weight = np.log(1 + ITEMS / (1 + frequency))
        shared = (words[candidates][:, :, None, :] == rows.words[:, None, :, None]).any(axis=3)
        return (shared * np.where(rows.words > 0, weight[rows.words], 0)[:, None, :]).sum(axis=2)

    def topic(self, rows: Clicks, candidates: np.ndarray) -> np.ndarray:
        return (self.world.topic_of(candidates) == rows.focus[:, None]) + 0.0


@pytest.fixture(scope="module")
def exam() -> Exam:
    return Exam()


def test_recommendation_is_a_ladder(exam: Exam) -> None:
    rng = np.random.default_rng(0)
    chance = exam.ndcg(False, lambda rows, candidates: rng.random(candidates.shape))
    popularity = exam.ndcg(False, lambda rows, candidates: exam.popularity[candidates])
    static, recent = exam.ndcg(False, exam.knn(10_000)), exam.ndcg(False, exam.knn(20))
    oracle = exam.ndcg(
        False, lambda rows, candidates: oracle_scores(exam.world, exam.users, rows, candidates)
    )
    assert chance < 0.07
    assert popularity > chance + 0.03
    assert static > popularity + 0.1  # collaborative filtering beats popularity
    assert recent > static + 0.02  # interests drift
    assert oracle > recent + 0.15  # and there is more to learn


def test_search_needs_words_meaning_and_taste(exam: Exam) -> None:
    words = exam.ndcg(True, exam.overlap)
    history = exam.ndcg(True, exam.knn(20))
    topic = exam.ndcg(True, exam.topic)
    oracle = exam.ndcg(True, lambda rows, candidates: oracle_scores(exam.world, exam.users, rows, candidates))
    assert 0.3 < words < 0.7  # exact words are good, not perfect
    assert history > 0.3  # a search often follows what was watched
    assert topic > words + 0.1  # synonyms: understanding a query beats matching it
    assert oracle > topic + 0.08


def test_taste_decides_inside_a_topic_and_is_in_no_text(exam: Exam) -> None:
    same_topic_style = np.array(
        [
            exam.world.style[exam.world.topic_start[t] : exam.world.topic_start[t + 1]].mean(0)
            for t in range(4)
        ]
    )
    assert np.abs(same_topic_style).max() < 16  # topics do not share a style
    rows, _ = exam.test[False]
    clicked = exam.rows(False)
    mine = exam.world.affinity(exam.users.taste[clicked.user], clicked.item)
    anyone = exam.world.affinity(exam.users.taste[(clicked.user + 1) % USERS], clicked.item)
    assert len(rows) == 400
    assert mine.mean() > anyone.mean() + 0.3


def test_clicks_of_a_query_match_it(exam: Exam) -> None:
    searched = exam.rows(True)
    match = b.matched_concepts(exam.world, searched.concepts, searched.item[:, None])[:, 0]
    stray = b.matched_concepts(exam.world, searched.concepts, np.roll(searched.item, 1)[:, None])[:, 0]
    # a stray item has the concept's number by chance, in another topic
    assert match.mean() > 1.7 * stray.mean()


def test_a_user_does_not_depend_on_the_range() -> None:
    world = make_world(50, 300, 4, seed=9)
    whole, part = make_users(world, 0, 50), make_users(world, 20, 30)
    assert np.array_equal(whole.taste[20:30], part.taste)
    assert np.array_equal(whole.interests[20:30], part.interests)
    log = b.make_log(world, 20, 30, 24.0)
    everyone = b.make_log(world, 0, 50, 24.0)
    mine = (everyone.feed.user >= 20) & (everyone.feed.user < 30)
    assert np.array_equal(everyone.feed.item[mine], log.feed.item)
    assert np.array_equal(everyone.feed.click[mine], log.feed.click)


@pytest.mark.parametrize("items", [200, 1000, 50_000])
def test_topics_hold_all_items_at_any_size(items: int) -> None:
    world = make_world(10, items, 3, seed=1)
    assert world.topic_start[0] == 0
    assert world.topic_start[-1] == items
    assert (np.diff(world.topic_start) >= 1).all()
    assert sorted(world.public_item.tolist()) == list(range(1, items + 1))
    u = np.linspace(0, 1, 100_001)[:-1]
    topic = np.zeros(len(u), np.int64)
    drawn = world.item_at(topic, u)
    assert drawn.min() == 0
    assert drawn.max() == world.topic_start[1] - 1
    assert (np.diff(drawn) >= 0).all()
