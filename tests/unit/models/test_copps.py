"""CoPPS: where the views of its contrastive terms come from, and that they are learned."""

from dataclasses import replace

import pytest
import torch

from data_shards.schema import NO_QUERY, REC, SRC
from tests.tiny_world import make_batch, make_world
from trainer.batch import TrainClicks
from trainer.models.baselines.copps import Copps, CoppsSettings
from trainer.models.layers.augment import cropped, masked, reordered
from trainer.models.layers.groups import Groups

# user, task, item, query, by user and time
CLICKS = [
    (0, REC, 10, NO_QUERY),
    (0, SRC, 11, 3),
    (0, SRC, 12, 4),
    (1, SRC, 13, 4),
    (2, SRC, 11, 5),
    (2, REC, 14, NO_QUERY),
    (2, SRC, 15, 3),
]


def make_model(rows=CLICKS, times=None, **settings):
    user, task, item, query = (torch.tensor(column) for column in zip(*rows, strict=True))
    time = torch.tensor(times or range(len(rows)))
    clicks = TrainClicks(user=user, task=task, item=item, query=query, time=time)
    world = replace(make_world(num_words=9), clicks=lambda: clicks)
    return Copps(CoppsSettings(dim=8, num_heads=2, dropout=0.0, **settings), world)


def events(queries, items, users, histories=None):
    size = len(queries)
    return make_batch(
        histories or [[]] * size,
        torch.tensor([[item, 0] for item in items]),
        query=torch.tensor(queries),
        user=torch.tensor(users),
        task=torch.full((size,), SRC),
    )


def test_a_group_is_drawn_from_and_nothing_else():
    groups = Groups(torch.tensor([2, -1, 0, 2, 2]))

    drawn = groups.draw(torch.tensor([[2, 0, 1, -1, 9]]).expand(200, -1))

    assert [set(column.tolist()) for column in drawn.T] == [{0, 3, 4}, {2}, {-1}, {-1}, {-1}]


def test_augmentations_keep_to_the_list():
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).repeat(50, 1)

    for row in cropped(ids).view(50, 3, 5).tolist():
        assert row[0] in ([1, 2, 3, 0, 0], [2, 3, 4, 0, 0], [3, 4, 5, 0, 0])
        assert row[1:] == [[6, 0, 0, 0, 0], [0] * 5]
    assert torch.equal(reordered(ids).sort(1).values, ids.sort(1).values)
    assert torch.equal(reordered(ids) != 0, ids != 0)
    assert not torch.equal(reordered(ids), ids)
    hidden = masked(ids)
    assert ((hidden == ids) | (hidden == 0)).all() and 0.2 < 1 - (hidden != 0).sum() / (ids != 0).sum() < 0.4


def test_partners_are_searches_of_other_users():
    model = make_model()

    # query 3 of user 0: user 2 in half the draws. Query 5 is user 2's own, item 11 was also user 0's.
    rows = torch.stack([model.partners(events([3, 5, 4], [11, 11, 12], [0, 2, 0])) for _ in range(100)])

    assert set(rows[:, 0].tolist()) == {6, 4, -1}
    assert set(rows[:, 1].tolist()) == {1, -1}
    assert set(rows[:, 2].tolist()) == {3, -1}


@pytest.mark.parametrize(("history", "expected"), [("all", [12, 15, 0]), ("src", [12, 0, 0])])
def test_the_history_of_a_click_came_before_it(history, expected):
    model = make_model(history=history)

    ids, words = model.row_of_click(torch.tensor([6, 3, -1]), 3)

    assert ids.tolist() == [expected, [0, 0, 0], [0, 0, 0]]
    assert torch.equal(words[:2], model.tables.query_words[[3, 4]])
    assert not words[2].any()


@pytest.mark.parametrize(("history", "expected"), [("all", [12, 13]), ("src", [11, 12])])
def test_the_history_of_a_click_is_that_of_its_event(history, expected):
    """An item of a moment once, nothing of the click's own moment; the newest searches, not the searches
    among the newest."""
    kinds = [(SRC, 10), (SRC, 11), (REC, 11), (REC, 12), (REC, 14), (SRC, 13), (REC, 13)]
    rows = [(0, SRC, 9, 3)] + [(1, task, item, 3 if task == SRC else NO_QUERY) for task, item in kinds]
    model = make_model(rows, [0, 1, 2, 2, 3, 4, 4, 4], history=history)

    assert model.row_of_click(torch.tensor([6]), 2)[0].tolist() == [expected]


def test_neighbours_share_a_query_or_a_category():
    model = make_model(replace=0.9)
    ids = torch.tensor([[12, 15, 0]]).expand(300, -1)  # items 11 (queries 3 and 5) and 14 (never searched)

    found = model.neighbours(ids)

    assert set(found[:, 0].tolist()) == {12, 16} and set(found[:, 1:].flatten().tolist()) == {15, 0}

    with_categories = make_model(replace=0.9)
    with_categories.tables.item_category = torch.zeros(30, 2, dtype=torch.int32)
    with_categories.tables.item_category[[11, 20]] = torch.tensor([1, 2], dtype=torch.int32)
    found = with_categories.neighbours(ids)
    assert set(found[:, 0].tolist()) == {12, 21} and set(found[:, 1:].flatten().tolist()) == {15, 0}


def test_contrastive_loss_falls_and_is_finite_without_history_or_partner():
    torch.manual_seed(0)
    model = make_model()
    batch = events([3, 5, 4, 0], [11, 11, 12, 1], [0, 2, 0, 1], [[10, 11], [3], [], [7, 8, 9]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss, report = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(report["contrastive_loss"]))
    assert torch.tensor(losses).isfinite().all()
    assert sum(losses[-10:]) < sum(losses[:10])
    assert "contrastive_loss" not in make_model(contrastive_weight=0.0)(batch)[1]
