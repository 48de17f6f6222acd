"""What the oracle of JSR does not say: the form of 2018, both tasks in one batch, the words' loss."""

import pytest
import torch

from data_shards.schema import REC, SRC
from tests.tiny_world import make_batch, make_world
from trainer.models.baselines.jsr import Jsr, JsrSettings

FORMS = [
    {"variant": 2018},
    {"variant": 2018, "items": "table", "num_layers": 0},
    {"variant": 2020, "word_dim": 6},
    {"variant": 2020, "word_dim": 6, "background": 0.2},
]


def make_model(**settings):
    torch.manual_seed(0)
    return Jsr(JsrSettings(dim=8, **settings), make_world(num_words=9))


def events():
    return make_batch(
        [[], [], []],
        torch.tensor([[3, 1, 2], [4, 5, 6], [7, 8, 9]]),
        query=torch.tensor([-1, 1, 2]),
        user=torch.tensor([2, 0, 1]),
        task=torch.tensor([REC, SRC, SRC]),
    )


@pytest.mark.parametrize("settings", FORMS)
def test_a_score_depends_on_nothing_else_and_the_catalogue_agrees(settings):
    model, batch = make_model(**settings).eval(), events()
    model.tables.item_words[3] = 0
    model.tables.query_words[2] = 0

    scores = model.score(batch)

    assert scores.isfinite().all() and scores.dtype == torch.float32
    torch.testing.assert_close(model.score(batch.rows(1, 3)), scores[1:])
    torch.testing.assert_close(
        model.score(batch.with_candidates(batch.candidates[:, 1:], batch.labels[:, 1:])), scores[:, 1:]
    )
    torch.testing.assert_close(model.score_catalogue(batch).gather(1, batch.candidates), scores)


@pytest.mark.parametrize("settings", FORMS)
def test_users_matter_in_recommendation_only_and_queries_in_search_only(settings):
    model, batch = make_model(**settings).eval(), events()
    scores = model.score(batch)

    batch.user.fill_(3)
    changed = (model.score(batch) - scores).abs().amax(1) > 1e-7
    assert changed.tolist() == [True, False, False]
    batch.query.copy_(torch.tensor([-1, 3, 4]))
    changed = (model.score(batch) - scores).abs().amax(1) > 1e-7
    assert changed.tolist() == [True, True, True]


@pytest.mark.parametrize("settings", FORMS)
def test_the_loss_falls(settings):
    model, batch = make_model(**settings), events()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss, _ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_words_without_weights_are_their_mean():
    model = make_model()
    words = torch.tensor([[1, 2, 0], [0, 0, 0]])

    vectors = model.core.words.vectors.weight
    expected = torch.stack([(vectors[1] + vectors[2]) / 2, torch.zeros(8)])

    torch.testing.assert_close(model.core.words(words), expected)


def test_the_catalogue_is_read_anew_after_training_went_on():
    model = make_model(variant=2020, word_dim=6, background=1.0 - 1e-6).eval()
    before = model.score(events())

    model.train()
    with torch.no_grad():
        model.core.language_model.words.weight[1:].normal_()
    after = model.eval().score(events())

    assert not torch.allclose(before[1:], after[1:])


def test_the_words_loss_is_a_mean_over_searches_and_the_published_one_is_not():
    core = make_model(variant=2020, word_dim=6).core
    words, items = torch.tensor([[1, 2, 3], [4, 0, 0], [0, 0, 0]]), torch.tensor([3, 4, 5])
    log_p = core.language_model.log_probabilities(core.items(items))

    by_hand = torch.stack([-log_p[0, :3].mean(), -log_p[1, 3], torch.tensor(0.0)])

    torch.testing.assert_close(core.word_losses(words, items), by_hand)
    matrix = torch.stack([-log_p[0, :3].sum(), -log_p[1, 3]]) / torch.tensor([[3.0], [1.0]])
    torch.testing.assert_close(core.word_losses(words, items, published=True), matrix.mean().expand(3))


@pytest.mark.parametrize("settings", FORMS)
def test_scores_under_autocast_are_finer_than_bf16(settings):
    model, batch = make_model(**settings).eval(), events()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model.score(batch)

    torch.testing.assert_close(scores, model.score(batch), atol=0.02, rtol=0.02)
    assert (scores.bfloat16().float() != scores).float().mean() > 0.5
