"""What the oracle of Query-SeqRec does not say: tokens of a batch, replacements, and the standard block."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from tests.tiny_world import make_batch, make_world
from trainer.batch import TrainClicks
from trainer.models.baselines.query_seqrec import QuerySeqRec, QuerySeqRecSettings, neighbours

NUM_ITEMS = 30


def make_model(**settings):
    torch.manual_seed(0)
    world = make_world(NUM_ITEMS, num_words=12)
    world.tables.query_words = torch.tensor([[3, 4, 0], [5, 0, 0], [0, 0, 0], [6, 7, 8]])
    return QuerySeqRec(
        QuerySeqRecSettings(dim=8, dropout=0, **settings), replace(world, num_queries=4)
    ).eval()


def make_events(width=None):
    return make_batch(
        [[3, 4, 5, 6, 7], [8, 9], []],
        torch.tensor([[20, 21]] * 3),
        tasks=[[0, 1, 1, 1, 1], [1, 0], []],
        queries=[[-1, 0, 0, 2, 3], [-1, -1], []],
        width=width,
    )


def tokens_of(model, batch):
    items, queries = model._clicks(batch)
    return model.tokens(batch, items, queries, items)


def test_a_query_stands_before_its_clicks_and_counts_once():
    ids, is_query, follows = tokens_of(make_model(), make_events())

    # query 2 has no words, the search for item 8 no known query
    assert ids[0, :7, 0].tolist() == [4, NUM_ITEMS + 3, 5, 6, 7, NUM_ITEMS + 6, 8]
    assert ids[0, 1].tolist() == [NUM_ITEMS + 3, NUM_ITEMS + 4, 0]  # its words
    assert is_query[0].nonzero()[:, 0].tolist() == [1, 5]
    assert follows[0, :7].tolist() == [0, 5, 6, 7, 0, 8, 0]
    assert ids[1, :3, 0].tolist() == [9, 10, 0]
    assert not ids[2].any() and not is_query[2].any()


def test_the_newest_tokens_stay():
    ids, is_query, follows = tokens_of(make_model(length=3), make_events())

    assert ids[0, :, 0].tolist() == [7, NUM_ITEMS + 6, 8] and is_query[0].tolist() == [False, True, False]
    assert follows[0].tolist() == [0, 8, 0]


def test_every_step_before_an_item_counts():
    model, batch = make_model(), make_events()
    ids, is_query, _ = tokens_of(model, batch)
    log_p = model.core.items(scores_of=model.core(ids, is_query)).log_softmax(-1)

    loss, _ = model.loss(batch)

    first = log_p[0, [1, 2, 3, 5, 6], [4, 5, 6, 7, 20]].mean()
    second, third = log_p[1, [0, 1], [9, 20]].mean(), log_p[2, 0, 20]
    torch.testing.assert_close(loss, -(first + second + third) / 3)


def test_scores_do_not_depend_on_padding_or_other_rows():
    model, batch = make_model(), make_events()
    scores = model.score(batch)

    assert scores.isfinite().all()
    torch.testing.assert_close(model.score(make_events(width=8)), scores)
    torch.testing.assert_close(torch.cat([model.score(batch.rows(i, i + 1)) for i in range(3)]), scores)
    nothing = make_batch([[], []], torch.tensor([[1, 2]] * 2), width=0)
    assert model.score(nothing).isfinite().all() and model.loss(nothing)[0].isfinite()


def test_neighbours_are_the_most_frequent_ones_repeated():
    sources = torch.tensor([2, 2, 2, 2, 0, 2])
    targets = torch.tensor([7, 9, 9, 5, 3, 7])

    found = neighbours(sources, targets, num_sources=4, columns=2)

    assert found.tolist() == [[4, 4], [0, 0], [8, 10], [0, 0]]
    assert neighbours(sources[:0], targets[:0], 2, 3).tolist() == [[0] * 3] * 2


def test_replacements_come_from_the_same_query_and_from_the_item_clicked():
    model = make_model(item_replace=1, query_replace=1, graph_share=1)
    query, item = torch.tensor([0, 3, 3]), torch.tensor([14, 15, 15])
    zeros = torch.zeros(3, dtype=torch.int64)
    clicks = TrainClicks(user=zeros, task=torch.ones_like(zeros), item=item, query=query, time=zeros)
    model._world[0] = replace(model.world, clicks=lambda: clicks)
    model.fit()

    items, queries = model.replaced(torch.tensor([[15, 9, 0]]), torch.tensor([[4, 1, 0]]))

    assert items.tolist() == [[16, 15, 0]]  # items 15 (query 3) and 14 (query 0), and padding
    assert queries[0, 0] == 1  # the query of item 14
    assert 1 <= queries[0, 1] <= 4 and queries[0, 2] == 0  # item 8 was never searched: any query


def test_the_standard_block_keeps_its_input():
    model = make_model(num_layers=1)
    block = model.core.blocks[0]
    x = torch.randn(1, 1, 8)
    seen = torch.ones(1, 1, 1, dtype=torch.bool)

    attention = block.attention
    normed = F.layer_norm(x, (8,), eps=1e-8)
    attended = x + attention.output(attention.value(normed))
    inner = block.inner(F.layer_norm(attended, (8,), eps=1e-8)).relu()

    torch.testing.assert_close(block(x, seen), attended + block.outer(inner))
