"""What the oracle of USER does not say: sessions cut from a batch, and rows that lack something."""

from dataclasses import replace

import torch

from tests.tiny_world import make_batch, make_world
from trainer.models.baselines.user import User, UserSettings, cut

CANDIDATES = torch.arange(12).view(4, 3)


def make_user(**settings):
    torch.manual_seed(0)
    sizes = UserSettings(dim=8, num_heads=2, head_dim=4, ffn_dim=16, session_length=2)
    return User(replace(sizes, **settings), make_world(num_words=12)).eval()


def make_events(width=None):
    return make_batch(
        [[3, 4, 5, 6, 9], [7, 8], [1], []],
        CANDIDATES,
        tasks=[[0, 1, 1, 1, 0], [0, 0], [1], []],
        queries=[[-1, 2, 3, 4, -1], [-1, -1], [-1], []],
        width=width,
        task=torch.tensor([0, 1, 1, 0]),
        query=torch.tensor([-1, 4, -1, -1]),
        user=torch.tensor([0, 4, -1, -1]),
    )


def test_sessions_are_cut_from_the_newest_click():
    entries = torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 0, 0, 0], [0, 0, 0, 0, 0]])[..., None]

    older, older_mask, recent, recent_mask = cut(entries, entries[..., 0] != 0, 2)

    assert older[..., 0].tolist() == [[[0, 1], [2, 3]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    assert recent[..., 0].tolist() == [[4, 5], [6, 7], [0, 0]]
    assert torch.equal(older_mask, older[..., 0] != 0) and torch.equal(recent_mask, recent[..., 0] != 0)


def test_a_candidate_after_the_history_is_the_last_output_of_the_whole_layer():
    layer = make_user().core.history_layer
    history, candidates = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([[True, True, False], [False] * 3])

    after = layer(candidates, torch.ones(2, 4, dtype=torch.bool), history, mask)

    for number in range(4):
        both = torch.cat([history, candidates[:, [number]]], 1)
        whole = layer(both, torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1))
        torch.testing.assert_close(after[:, number], whole[:, -1])


def test_scores_do_not_depend_on_padding_other_rows_or_other_candidates():
    model, batch = make_user(), make_events()
    scores = model.score(batch)

    assert scores.isfinite().all() and scores.dtype == torch.float32
    torch.testing.assert_close(model.score(make_events(width=8)), scores)
    alone = torch.cat([model.score(batch.rows(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(alone, scores, atol=1e-6, rtol=0)
    whole = model.score_catalogue(batch).gather(1, CANDIDATES)
    torch.testing.assert_close(whole, scores, atol=1e-6, rtol=0)


def test_before_training_what_is_more_like_the_question_scores_higher():
    model, batch = make_user(), make_events()
    question, items = model._question(batch), model._item_vectors(batch.candidates)

    likeness = model.core.cosines(question, items).sum(-1)

    torch.testing.assert_close(model.score(batch), (likeness / 2).tanh())


def test_a_search_reads_its_query_and_a_recommendation_its_user():
    model, batch = make_user(), make_events()
    scores = model.score(batch)

    other_query = model.score(replace(batch, query=torch.tensor([3, 5, -1, 2])))
    other_user = model.score(replace(batch, user=torch.tensor([1, 1, 1, 1])))

    assert (other_query != scores).any(1).tolist() == [False, True, False, False]
    assert (other_user != scores).any(1).tolist() == [True, False, False, True]


def test_the_gradient_is_finite_also_without_any_history():
    model = make_user()

    model.loss(make_events())[0].backward()

    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    nothing = make_batch([[], []], torch.tensor([[1, 2]] * 2), width=0)
    assert model.loss(nothing)[0].isfinite() and model.score(nothing).isfinite().all()
