"""Rivals without deep nets against direct computations on a small catalogue."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_shards.schema import REC, SRC
from tests.tiny_world import make_batch, make_world
from trainer.batch import TrainClicks
from trainer.models.baselines.bm25 import Bm25, Bm25Settings
from trainer.models.baselines.bm25_popularity import Bm25Popularity, Bm25PopularitySettings
from trainer.models.baselines.bpr_mf import BprMf, BprMfSettings
from trainer.models.baselines.category import Category, CategorySettings, Paths
from trainer.models.baselines.transitions import Transitions, TransitionsSettings


def clicks_of(*rows: tuple[int, int, int, int]) -> TrainClicks:
    """(user, task, item, time) each."""
    user, task, item, time = torch.tensor(rows).T
    return TrainClicks(user=user, task=task, item=item, query=torch.full_like(user, -1), time=time)


# ---- BPR-MF ------------------------------------------------------------------------------------------------


def test_bpr_loss_is_the_mean_over_pairs_plus_the_norms():
    model = BprMf(BprMfSettings(dim=4, reg=0.1, item_bias=True), make_world(num_items=9))
    for table in (model.factors.users, model.factors.items, model.factors.biases):
        torch.nn.init.normal_(table.weight)  # type: ignore[union-attr]
    candidates = torch.tensor([[2, 5, 7], [1, 0, 3]])
    labels = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    batch = make_batch([[], []], candidates, user=torch.tensor([3, 0]), labels=labels)

    loss, _ = model.loss(batch)

    factors: Any = model.factors
    p, q, b = (t.weight for t in (factors.users, factors.items, factors.biases))
    expected = torch.zeros(())
    for user, clicked, others in ((4, 6, (3, 8)), (1, 2, (1, 4))):
        score = {i: p[user] @ q[i] + b[i, 0] for i in (clicked, *others)}
        pairs = sum(-F.logsigmoid(score[clicked] - score[j]) for j in others) / 2
        biased = torch.cat([q, b], 1).square().sum(1)
        norms = p[user].square().sum() + biased[clicked] + sum(biased[j] for j in others) / 2
        expected = expected + (pairs + 0.1 * norms) / 2
    torch.testing.assert_close(loss, expected)


def test_bpr_asks_with_the_mean_of_the_history_where_the_user_is_unknown():
    model = BprMf(BprMfSettings(dim=4, item_bias=False), make_world(num_items=9)).eval()
    batch = make_batch([[3, 5], [], [2]], torch.arange(9).expand(3, 9), user=torch.tensor([-1, -1, 1]))
    p, q = model.factors.users.weight, model.factors.items.weight
    scores = model.score(batch)
    torch.testing.assert_close(scores[0], q[1:] @ (q[4] + q[6]) / 2)
    assert scores[1].eq(0).all()
    torch.testing.assert_close(scores[2], q[1:] @ p[2])
    torch.testing.assert_close(model.score_catalogue(batch), scores)


# ---- BM25 with popularity ----------------------------------------------------------------------------------


def test_bm25_popularity_adds_the_logarithm_of_clicks():
    texts = ["steel bolt", "steel nut", "", "wooden box"]
    clicks = clicks_of((0, REC, 3, 0), (0, SRC, 3, 0), (1, REC, 0, 0))
    world = replace(
        make_world(num_items=4, num_queries=1), texts=lambda: (texts, ["steel"]), clicks=lambda: clicks
    )
    plain = Bm25(Bm25Settings(k1=0.9, b=0.4), world)
    model = Bm25Popularity(Bm25PopularitySettings(weight=2.0, k1=0.9, b=0.4), world)
    model.fit()
    batch = make_batch([[], []], torch.tensor([[0, 1, 2, 3]] * 2), query=torch.tensor([0, -1]))
    popular = 2 * torch.tensor([math.log(2), 0.0, 0.0, math.log(3)])
    torch.testing.assert_close(model.score(batch), plain.score(batch) + popular)
    torch.testing.assert_close(model.score_catalogue(batch), model.score(batch))
    assert model.score(batch)[1].argmax() == 3


# ---- category ----------------------------------------------------------------------------------------------

PATHS = [
    (),
    ("Tools",),
    ("Toys & Games",),
    ("Tools", "Saws"),
    ("Tools", "Drills"),
    ("Tools", "Saws", "Hand Saws"),
    ("Toys & Games", "Games"),  # the same words as category 2
]


def category_model(by: str, queries: list[str]) -> Category:
    world = make_world(num_items=6, num_queries=len(queries))
    world.tables.item_category = torch.tensor(
        [[1, 3, 0], [1, 3, 5], [1, 4, 0], [2, 0, 0], [2, 6, 0], [0, 0, 0]], dtype=torch.int32
    )
    world.tables.cf = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    clicks = clicks_of((0, REC, 1, 0), (0, REC, 5, 1), (0, REC, 5, 2))
    world = replace(
        world,
        num_categories=6,
        clicks=lambda: clicks,
        texts=lambda: ([], queries),
        categories=lambda: PATHS,
    )
    model = Category(CategorySettings(by=by), world)  # type: ignore[arg-type]
    model.fit()
    return model.eval()


@pytest.mark.parametrize("by", ["popularity", "cf"])
def test_category_ranks_what_is_in_it_then_what_lies_below_it_then_the_rest(by):
    queries = ["tools saws", "Saws for the tools", "toys games", "drills", "tools drills cheap"]
    model = category_model(by, queries)
    candidates = torch.arange(6).expand(len(queries), 6)
    batch = make_batch([[2, 4]] * 5, candidates, query=torch.arange(5))
    scores = model.score(batch)
    place = [[3, 2, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [0, 0, 0, 3, 3, 0], [0] * 6, [0, 0, 3, 0, 0, 0]]
    assert scores.floor().int().tolist() == place
    torch.testing.assert_close(model.score_catalogue(batch), scores)
    order = scores - scores.floor()
    if by == "popularity":
        expected = np.log1p([0, 1, 0, 0, 0, 2]) / (1 + math.log(3))
    else:
        match = ((model.tables.cf[2] + model.tables.cf[4]) / 2 @ model.tables.cf.T).numpy()
        expected = 0.5 + 0.49 * match / (1 + abs(match))
    np.testing.assert_allclose(order.numpy(), np.tile(expected, (5, 1)), atol=1e-5)


def test_category_without_a_query_is_the_order_alone():
    model = category_model("popularity", ["tools"])
    scores = model.score(make_batch([[]], torch.arange(6)[None], query=torch.tensor([-1])))
    assert scores.lt(1).all()


def test_a_path_is_found_by_its_words_in_order_then_by_the_most_words():
    paths = Paths([(1, ["a"]), (2, ["b"]), (3, ["a", "b"]), (4, ["b", "a"]), (5, ["a", "c"])])
    assert paths.find(["b", "a"]) == 4
    assert paths.find(["x", "b", "a"]) == 3  # of equals the first
    assert paths.find(["c", "x"]) == 0


# ---- transitions -------------------------------------------------------------------------------------------


def test_transitions_count_followers_within_the_steps():
    # user 0: 4 5 6 4 7 (5 bought twice as one click); user 1: 4 6
    sequence = [
        (0, REC, 4, 0),
        (0, REC, 5, 1),
        (0, SRC, 5, 1),
        (0, REC, 6, 2),
        (0, SRC, 4, 3),
        (0, REC, 7, 4),
    ]
    clicks = clicks_of(*sequence, (1, REC, 4, 0), (1, REC, 6, 1))
    world = replace(make_world(num_items=9), clicks=lambda: clicks)
    settings: Any = TransitionsSettings(steps=2, step_decay=0.25, decay=0.5)
    model = Transitions(settings, world)
    model.fit()

    counts = torch.zeros(9, 9)
    for items in ([4, 5, 6, 4, 7], [4, 6]):
        for place, item in enumerate(items):
            for step in (1, 2):
                if place + step < len(items) and items[place + step] != item:
                    counts[item, items[place + step]] += 0.25 ** (step - 1)
    number = torch.tensor([1.0, 1, 1, 1, 3, 1, 2, 1, 1])  # clicks, 1 where there are none
    follows = counts / (number[:, None] * number).sqrt()
    batch = make_batch([[4, 5], []], torch.arange(9).expand(2, 9))
    torch.testing.assert_close(model.score(batch)[0], 0.5 * follows[4] + follows[5])
    torch.testing.assert_close(model.score_catalogue(batch), model.score(batch))
    assert follows[4, 7] > 0 and follows[7].eq(0).all()  # directed
