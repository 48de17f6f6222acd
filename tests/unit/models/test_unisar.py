"""What the oracle of UniSAR does not say: how a batch becomes lists of items and sessions, and users who
lack a kind of history."""

from dataclasses import replace

import torch

from tests.tiny_world import count_encoded, make_batch, make_world
from trainer.batch import TrainClicks
from trainer.models.baselines.unisar import UniSar, UniSarSettings, sessions

HISTORIES = [[3, 4, 5, 6], [7, 8], [1, 2], []]
TASKS = [[0, 1, 1, 1], [0, 0], [1, 1], []]
QUERIES = [[-1, 2, 2, 3], [-1, -1], [-1, -1], []]


def make_unisar():
    torch.manual_seed(0)
    task = torch.tensor([0, 0, 0, 1])  # three recommendations for each search
    clicks = TrainClicks(user=task, task=task, item=task, query=task, time=task)
    world = replace(make_world(num_words=12), clicks=lambda: clicks)
    settings = UniSarSettings(
        id_dim=8, dim=8, ffn_dim=8, num_contrast=16, history_weight=1, query_item_weight=1
    )
    return UniSar(settings, world).eval()


def make_events(width=None):
    return make_batch(
        HISTORIES,
        torch.arange(12).view(4, 3),
        tasks=TASKS,
        queries=QUERIES,
        width=width,
        task=torch.tensor([0, 1, 1, 0]),
        query=torch.tensor([-1, 4, -1, -1]),
        user=torch.tensor([0, 4, -1, 2]),
    )


def test_a_session_is_a_run_of_clicks_for_one_known_query():
    src = torch.tensor([[True, True, False, True, True, True, True]])
    queries = torch.tensor([[2, 2, -1, 2, 3, -1, -1]])

    first, same = sessions(src, queries)

    assert first.tolist() == [[True, False, False, True, True, True, True]]
    assert same[0].int().sum(1).tolist() == [2, 2, 0, 1, 1, 1, 1]
    assert same[0, 0, 1] and same[0, 1, 0]


def test_a_catalogue_is_encoded_once_for_all_events(monkeypatch):
    model, batch = make_unisar(), make_events()
    encoded = count_encoded(monkeypatch, model.core)

    model.score_catalogue(batch)

    assert sum(encoded) == batch.history_items.numel() + model.world.num_items


def test_scores_do_not_depend_on_padding_other_rows_or_other_candidates():
    model, batch = make_unisar(), make_events()
    scores = model.score(batch)

    assert scores.isfinite().all() and scores.dtype == torch.float32
    torch.testing.assert_close(model.score(make_events(width=7)), scores)
    torch.testing.assert_close(
        torch.cat([model.score(batch.rows(i, i + 1)) for i in range(4)]), scores, atol=1e-6, rtol=0
    )
    whole = model.score_catalogue(batch)
    torch.testing.assert_close(whole.gather(1, batch.candidates), scores, atol=1e-6, rtol=0)


def test_the_query_decides_a_search():
    model, batch = make_unisar(), make_events()
    other = make_events()
    other.query[1] = 5

    changed = (model.score(batch) != model.score(other)).any(1)

    assert changed.tolist() == [False, True, False, False]


def test_users_who_lack_a_kind_of_history_have_finite_gradients():
    model = make_unisar().train()
    loss, report = model(make_events())
    loss.backward()

    assert loss.isfinite() and report["history_loss"] == 0, "only the first row has both kinds: no negatives"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    nothing, _ = model(make_events().rows(3, 4))
    assert nothing.isfinite()


def test_each_query_and_the_item_clicked_for_it_find_each_other_among_drawn_ones():
    model, batch = make_unisar(), make_events()
    core, tables, settings = model.core, model.tables, model.settings

    torch.manual_seed(3)
    _, report = model.loss(batch)

    torch.manual_seed(3)
    others = torch.randint(model.world.num_items, (settings.num_contrast,))
    drawn = torch.randint(model.world.num_queries, (settings.num_contrast,))
    other_items = core.item_vectors(others + 1, tables.item_words[others], tables.item_category[others])
    other_queries = core.text_vectors(tables.query_words[drawn])
    losses = []
    for item, query in ((4, 2), (5, 2), (6, 3)):  # all of the first row, a recommendation
        rows = torch.tensor([item])
        clicked = core.item_vectors(rows + 1, tables.item_words[rows], tables.item_category[rows])[0]
        asked = core.text_vectors(tables.query_words[query])
        for left, right, wrong in ((asked, clicked, other_items), (clicked, asked, other_queries)):
            products = torch.stack([left @ core.query_item.weight @ other for other in (right, *wrong)])
            losses.append(-(products.tanh() / core.query_item.temperature).log_softmax(0)[0])
    torch.testing.assert_close(report["query_item_loss"], torch.stack(losses).mean())


def test_a_search_weighs_alpha_times_the_recommendations_for_each():
    model, batch = make_unisar(), make_events()
    both = [
        make_events().take(torch.tensor([row])).with_candidates(batch.candidates[:1], batch.labels[:1])
        for row in (0, 1)
    ]
    of_rec, of_src = (model.loss(event)[1]["click_loss"] for event in both)

    scores = model.score(both[1])
    plain = torch.nn.functional.binary_cross_entropy_with_logits(scores, batch.labels[:1])
    torch.testing.assert_close(of_src, plain.detach() * model.settings.search_weight * 3)
    assert of_rec > of_src
