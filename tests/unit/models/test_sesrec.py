"""What the oracle of SESRec does not say: how a batch becomes two histories, and users who lack one."""

from dataclasses import replace

import torch

from tests.tiny_world import count_encoded, make_batch, make_world
from trainer.models.baselines.sesrec import Interests, SesRec, SesRecSettings

CANDIDATES = torch.arange(12).view(4, 3)


def make_sesrec(**settings):
    torch.manual_seed(0)
    sizes = SesRecSettings(dim=8, query_dim=4, word_dim=4, user_dim=6, num_heads=2, num_contrast=16)
    return SesRec(replace(sizes, head_dims=(12, 6), **settings), make_world(num_words=12)).eval()


def make_events(width=None):
    return make_batch(
        [[3, 4, 5, 6], [7, 8], [1, 2], []],
        CANDIDATES,
        tasks=[[0, 1, 1, 1], [0, 0], [1, 1], []],
        queries=[[-1, 2, 2, 3], [-1, -1], [-1, 4], []],
        width=width,
        user=torch.tensor([0, 4, -1, 2]),
    )


def test_an_empty_set_is_the_whole_history():
    mask = torch.tensor([[True, True, False]] * 2)
    weights = torch.tensor([[0.7, 0.3, 0.0], [0.5, 0.5, 0.0]])

    interests = Interests.of(torch.zeros(2, 3, 4), mask, weights)

    assert interests.similar.tolist() == [[True, False, False], [True, True, False]]
    assert interests.dissimilar.tolist() == [[False, True, False], [True, True, False]]


def test_searches_become_queries_with_the_mean_of_their_clicks():
    model = make_sesrec()
    core, tables = model.core, model.tables

    _, src, *_ = model._histories(make_events())

    items = core.item_vectors(torch.tensor([5, 6, 7]))
    queries = core.query_vectors(torch.tensor([3, 4]), tables.query_words[[2, 3]])
    slots = torch.stack([queries[0] + items[:2].mean(0), queries[1] + items[2]])
    rec = core.item_vectors(torch.tensor([[4]]))
    _, expected = core.encode(rec, torch.ones(1, 1) == 1, slots[None], torch.ones(1, 2) == 1)
    torch.testing.assert_close(src.slots[0, :2], expected.slots[0])
    assert src.mask.sum(1).tolist() == [2, 0, 2, 0]


def test_a_catalogue_is_encoded_once_for_all_events(monkeypatch):
    model, batch = make_sesrec(), make_events()
    encoded = count_encoded(monkeypatch, model.core)

    model.score_catalogue(batch)

    assert sum(encoded) == batch.history_items.numel() + model.world.num_items


def test_scores_do_not_depend_on_padding_other_rows_or_other_candidates():
    for padding in (False, True):
        model, batch = make_sesrec(padding_in_co_attention=padding), make_events()
        scores = model.score(batch)

        assert scores.isfinite().all() and scores.dtype == torch.float32
        torch.testing.assert_close(model.score(make_events(width=7)), scores)
        alone = torch.cat([model.score(batch.rows(i, i + 1)) for i in range(4)])
        torch.testing.assert_close(alone, scores, atol=1e-6, rtol=0)
        whole = model.score_catalogue(batch).gather(1, CANDIDATES)
        torch.testing.assert_close(whole, scores, atol=1e-6, rtol=0)


def test_the_gradient_of_users_without_a_kind_of_history_is_finite():
    model = make_sesrec()

    loss, report = model.loss(make_events())
    loss.backward()

    assert set(report) == {"click_loss", "query_item_loss", "triplet_loss"}
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    # without any history at all
    nothing = make_batch([[], []], torch.tensor([[1, 2]] * 2), width=0)
    assert model.loss(nothing)[0].isfinite() and model.score(nothing).isfinite().all()
