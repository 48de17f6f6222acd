"""What counting knows, against direct computations; and mined negatives: allowed, repeatable, and as probable
as the correction says."""

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.schema import REC, SRC
from tests.tiny_world import make_batch, make_world
from trainer.batch import Batch, TrainClicks
from trainer.models.contract import World
from trainer.models.gensr.evidence import SHRINK, Drawn, Evidence, Seen, text_key
from trainer.models.gensr.mining import log_proposal, mined, open_mine
from trainer.models.layers import neighbours

NEAR, AFTER, NEAR_NEWEST, AFTER_NEWEST, USERS, TASTE, TASTE_BEST, WORDS, WORDS_BEST = range(9)
INSIDE, LAST, COVERED = 10, 11, 12
# (user, item) in order of time, as searches and recommendations of one moment
CLICKS = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 3), (2, 2), (2, 3), (2, 4), (3, 5)]


def clicks_of(pairs: list[tuple[int, int]], times: list[int] | None = None) -> TrainClicks:
    times = times or list(range(len(pairs)))
    rows = [(u, task, i, time) for (u, i), time in zip(pairs, times, strict=True) for task in (REC, SRC)]
    rows.sort(key=lambda row: (row[0], row[3], row[1]))  # what is tied is mixed
    user, task, item, time = torch.tensor(rows).T
    return TrainClicks(user=user, task=task, item=item, query=torch.full_like(user, -1), time=time)


def world_of(pairs: list[tuple[int, int]], times: list[int] | None = None) -> World:
    world = make_world(num_items=8, num_words=20)
    world.tables.cf = F.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    return replace(world, clicks=lambda: clicks_of(pairs, times))


def evidence_of(world: World, num_neighbours: int = 7) -> Evidence:
    evidence = Evidence(num_neighbours, world)
    evidence.fit(world)
    return evidence


def seen_of(evidence: Evidence, world: World, batch: Batch, own: bool) -> Seen:
    cf = world.tables.cf
    seen: Seen = evidence(batch, world.tables, cf[batch.history_items], cf[batch.candidates], own)
    return seen


def test_neighbours_and_followers_are_counted():
    world = world_of(CLICKS)
    batch = make_batch([[1, 2]], torch.tensor([[3, 4, 6]]))
    features_CF = seen_of(evidence_of(world), world, batch, own=False).features_BCF[0]
    # item 1 has users {0, 1}, 2 {0, 2}, 3 {0, 1, 2}, 4 {2}
    near_3 = 0.8 * 2 / (6**0.5 + SHRINK) + 2 / (6**0.5 + SHRINK)
    # 3 is the second after 1 of user 0, the first of user 1; the first after 2, twice
    after_3 = 0.8 * (0.5 + 1) / 6**0.5 + 2 / 6**0.5
    assert features_CF[0, NEAR] == pytest.approx(math.log1p(30 * near_3), abs=1e-6)
    assert features_CF[0, AFTER] == pytest.approx(math.log1p(30 * after_3), abs=1e-6)
    assert features_CF[1, NEAR] == features_CF[1, NEAR_NEWEST] > 0  # only user 2 clicked 4, and 2 before
    assert features_CF[2, [NEAR, AFTER, USERS]].eq(0).all()


def test_counting_block_by_block_changes_nothing_and_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Items 0, 6 and 7 have no clicks: there is nothing to count of them."""
    whole, told = evidence_of(world_of(CLICKS)), list[tuple[str, int, int]]()
    monkeypatch.setattr(neighbours, "ROWS_AT_ONCE", 2)
    parts = evidence_of(replace(world_of(CLICKS), report=lambda *done: told.append(done)))
    assert told == [("common users", done, 5) for done in (2, 4, 5)]
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, parts.get_buffer(name)), name


# of user 0's clicks, the event's own, of item 3, last
@pytest.mark.parametrize(
    ("times", "items"),
    [
        ([0, 1, 2], [1, 2, 3]),
        ([0, 1, 2, 2, 2], [1, 2, 4, 5, 3]),  # others at its moment
        ([0, 1, 1, 2], [4, 1, 2, 3]),  # several before it at one moment
        ([0, 1, 2, 3], [1, 2, 1, 3]),  # one before it twice
        ([0, 1, 2, 3, 4], [2, 1, 1, 1, 3]),
        ([0, 1, 2, 3], [3, 1, 2, 3]),
    ],
    ids=["one by one", "own moment", "one moment", "again", "again and again", "clicked before"],
)
def test_a_training_event_is_seen_as_if_its_click_had_not_been_counted(times, items):
    others = [pair for pair in CLICKS if pair[0]]
    pairs, times = [(0, item) for item in items] + others, times + [10 * n for n in range(len(others))]
    history = [item for item, time in zip(items, times, strict=False) if time < times[len(items) - 1]]
    batch = make_batch([history], torch.tensor([[3, 5]]), user=torch.tensor([0]))
    own_place = len(items) - 1
    without = [column[:own_place] + column[own_place + 1 :] for column in (pairs, times)]
    ours, theirs = (
        seen_of(evidence_of(world), world, batch, own=own)
        for world, own in ((world_of(pairs, times), True), (world_of(*without), False))
    )
    torch.testing.assert_close(ours.features_BCF, theirs.features_BCF)
    assert torch.equal(
        ours.near_BNC & (ours.weight_BN > 0)[..., None], theirs.near_BNC & (theirs.weight_BN > 0)[..., None]
    )


def test_only_the_nearest_are_kept():
    evidence = evidence_of(world_of(CLICKS), num_neighbours=1)
    assert evidence.near[1].tolist() == [3] and evidence.near_users[1].tolist() == [2.0]
    assert evidence.near[6].tolist() == [8]  # nobody clicked it


def test_the_nearest_of_a_history_are_found():
    """By the sums that forward() gives each item of the catalogue."""
    world = world_of(CLICKS)
    evidence = evidence_of(world)
    batch = make_batch([[1, 2]], torch.arange(8)[None])
    near, follow = evidence.neighbours_of(batch, 3)
    by_feature = seen_of(evidence, world, batch, own=False).features_BCF[0]
    for found, feature in ((near, NEAR), (follow, AFTER)):
        best = by_feature[:, feature].topk(3)
        assert found.tolist() == best.indices[best.values > 0].tolist()
    assert evidence.neighbours_of(make_batch([[6]], torch.arange(8)[None]), 3)[0].tolist() == []


def test_words_that_repeat_in_a_history_count_for_each_of_its_items():
    """Several events of several items, padding among them, against one pair at a time."""
    world = world_of(CLICKS)
    evidence = evidence_of(world)
    world.tables.item_words[[2, 3]] = world.tables.item_words[[1, 1]]
    world.tables.item_words[4] = 0  # an item without words
    history, candidates = torch.tensor([[1, 2, 5], [4, 3, 3]]), torch.tensor([[3, 4], [0, 1]])
    found = evidence.shared_words(world.tables, history, candidates)
    for event, n, c in itertools.product(range(2), range(3), range(2)):
        one = evidence.shared_words(
            world.tables, history[event, n].view(1, 1), candidates[event, c].view(1, 1)
        )
        assert float(found[event, n, c]) == pytest.approx(float(one), abs=1e-6)
    assert float(found[0, 0, 0]) == pytest.approx(1, abs=1e-6) and found[0, :, 1].eq(0).all()


def test_shared_words_are_a_cosine():
    world = world_of(CLICKS)
    evidence = evidence_of(world)
    found = evidence.shared_words(world.tables, torch.tensor([[0, 1]]), torch.tensor([[2, 1, 3]]))[0]
    bags = torch.zeros(8, len(evidence.idf))
    for item, words in enumerate(world.tables.item_words):
        bags[item, words.long()] = 1
    bags = F.normalize(bags * evidence.idf, dim=1)
    torch.testing.assert_close(found, bags[[0, 1]] @ bags[[2, 1, 3]].T)


def with_categories(world: World) -> World:
    """Items 0 … 3 lie in category 1, of them 0 and 1 in 2 below it; query 0 is category 1's words."""
    tables = world.tables
    tables.item_category = torch.tensor([[1, 2], [1, 2], [1, 0], [1, 0]] + [[3, 0]] * 4, dtype=torch.int32)
    tables.query_tokens = torch.tensor([[5, 6, 0], [6, 5, 7]] + [[0, 0, 0]] * 5)
    return replace(world, num_categories=3)


def categorised() -> tuple[World, Evidence]:
    world = with_categories(world_of(CLICKS))
    evidence = evidence_of(world)
    keys = torch.tensor([[0, 0, 0], [6, 5, 0], [5, 6, 7], [9, 0, 0]])
    evidence.category_key.copy_(text_key(keys))
    return world, evidence


def test_the_category_whose_words_are_the_query():
    world, evidence = categorised()
    task, query = torch.tensor([SRC, SRC, REC]), torch.tensor([0, 1, -1])
    batch = make_batch([[4]] * 3, torch.arange(8).expand(3, -1), task=task, query=query)
    features = seen_of(evidence, world, batch, own=False).features_BCF
    assert features[0, :, INSIDE].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert features[0, :, LAST].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert features[1, :, INSIDE].tolist() == features[1, :, LAST].tolist() == [1, 1] + [0] * 6
    assert features[2, :, [INSIDE, LAST, COVERED]].eq(0).all()
    assert features[0, :, COVERED].min() >= 0 and features[0, :, COVERED].max() <= 1


# ---- mined negatives ---------------------------------------------------------------------------------------


def drawn(count: int, batch: Batch, world: World, evidence: Evidence) -> tuple[Batch, Tensor]:
    mine = open_mine(world, evidence)
    arguments = (evidence, mine, world.tables)
    changed = mined(batch, count, *arguments)
    assert torch.equal(changed.candidates, mined(batch, count, *arguments).candidates)
    seen = seen_of(evidence, world, changed, own=True)
    return changed, log_proposal(changed, seen, count / (batch.candidates.shape[1] - 1), *arguments)


def many_events(history: list[int], query: int, clicked: int, user: int, num_events: int = 4000) -> Batch:
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randint(0, 8, (num_events, 5), generator=generator)
    candidates[:, 0] = clicked
    task = torch.full((num_events,), REC if query < 0 else SRC)
    rows = torch.full((num_events,), query)
    return make_batch(
        [history] * num_events, candidates, task=task, query=rows, user=torch.full((num_events,), user)
    )


def test_mined_negatives_are_neighbours_that_the_user_has_not_clicked():
    world = world_of(CLICKS)
    evidence = evidence_of(world)
    batch = many_events([2], query=-1, clicked=5, user=3)
    changed, _ = drawn(2, batch, world, evidence)
    assert torch.equal(changed.candidates[:, :3], batch.candidates[:, :3])
    counts = changed.candidates[:, 3:].flatten().bincount(minlength=8)
    assert counts[[1, 3, 4]].sum() == counts.sum()  # the neighbours of 2
    assert (counts[[1, 3, 4]] / counts.sum() - 1 / 3).abs().max() < 0.02
    changed, _ = drawn(
        2, many_events([2], query=-1, clicked=5, user=0), world, evidence
    )  # user 0 clicked 1, 3
    assert (changed.candidates[:, 3:] == 1).float().mean() < 0.15  # a uniform draw that could not be replaced


def test_scores_are_corrected_by_how_often_a_candidate_is_drawn():
    """The mean of 1/q over what is drawn by q is 1: a sampled softmax has the whole catalogue's optimum."""
    world, evidence = categorised()
    for history, query in (([2], -1), ([4], 0), ([6], -1)):
        batch = many_events(history, query, clicked=5, user=4)
        changed, log_q = drawn(2, batch, world, evidence)
        weights = (-log_q[:, 1:]).exp()
        for item in range(8):
            if item in (history[0], 5):
                continue  # never mined: the event's own
            share = (weights * (changed.candidates[:, 1:] == item)).mean()
            assert share == pytest.approx(1 / 8, rel=0.15), (history, query, item)


def test_mining_alone_needs_no_numbers() -> None:
    world, evidence = categorised()
    batch = many_events([4, 6], query=0, clicked=5, user=4, num_events=50)
    for own in (False, True):
        seen, alone = seen_of(evidence, world, batch, own), evidence.drawn(batch, world.tables, own)
        for field in fields(Drawn):
            assert torch.equal(getattr(alone, field.name), getattr(seen, field.name)), field.name
        assert seen.near_BNC.any() and seen.in_category_BC.any()
