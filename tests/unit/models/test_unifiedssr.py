"""What the oracle of UnifiedSSR does not say: the lists of a batch, soft windows, and what sees what."""

from dataclasses import replace

import torch

from tests.tiny_world import make_batch, make_world
from trainer.models.baselines.unifiedssr import UnifiedSsr, UnifiedSsrSettings
from trainer.models.layers.nce import nce, sampled_bce

CANDIDATES = torch.arange(15).view(5, 3)


def make_unifiedssr(**settings):
    torch.manual_seed(0)
    sizes = UnifiedSsrSettings(dim=8, num_heads=2, ffn_dim=16)
    return UnifiedSsr(replace(sizes, **settings), make_world(num_words=12)).eval()


def make_events(width=None):
    return make_batch(
        [[3, 4, 5, 6, 9], [7, 8, 9], [1], [], []],
        CANDIDATES,
        tasks=[[0, 1, 1, 1, 0], [1, 0, 1], [1], [], []],
        queries=[[-1, 2, 3, 4, -1], [5, -1, -1], [-1], [], []],
        width=width,
        task=torch.tensor([0, 1, 0, 1, 0]),
        query=torch.tensor([-1, 4, -1, 2, -1]),
        user=torch.tensor([0, 4, -1, -1, 1]),
    )


def test_a_search_reads_products_before_it_beside_their_queries():
    model, batch = make_unifiedssr(), make_events()
    core, words = model.core, model.tables.query_words

    texts = torch.stack([words[5], torch.zeros_like(words[5]), words[4]])[None]  # the second is unknown
    mask = torch.ones(1, 3, dtype=torch.bool)
    both = core.search(torch.tensor([5]), torch.tensor([[0, 8, 10]]), texts, mask, mask)
    p, q = (core.with_sessions(steps, mask, torch.tensor([3])).steps[:, -1] for steps in both)

    expected = core.scores(core.mix(p, q), CANDIDATES[[1]] + 1)
    torch.testing.assert_close(model.score(batch)[[1]], expected)


def test_the_loss_of_a_search_mixes_that_of_both_lists():
    model, batch = make_unifiedssr(session_weight=0, steps="last"), make_events().rows(1, 2)
    with torch.no_grad():
        model.core.mix.weight.fill_(0.8)

    p, p_last, q, q_last, _ = model._searched(batch)
    by_product, by_query = (
        sampled_bce(model.core.scores(last, batch.candidates + 1), batch.labels) for last in (p_last, q_last)
    )

    torch.testing.assert_close(model.loss(batch)[0], (0.8 * by_product + 0.2 * by_query).mean())
    apart = p.differences() + q.differences()
    whole = make_unifiedssr(session_weight=1, steps="last")
    whole.load_state_dict(model.state_dict())
    added = whole.loss(batch)[0] - model.loss(batch)[0]
    torch.testing.assert_close(added, apart.mean() - p.agreement(q).mean())


def test_scores_do_not_depend_on_padding_other_rows_or_other_candidates():
    for settings in ({}, {"windows": "hard", "causal": False, "num_layers": 1}):
        model, batch = make_unifiedssr(**settings), make_events()
        scores = model.score(batch)

        assert scores.isfinite().all() and scores.dtype == torch.float32
        torch.testing.assert_close(model.score(make_events(width=8)), scores)
        alone = torch.cat([model.score(batch.rows(i, i + 1)) for i in range(5)])
        torch.testing.assert_close(alone, scores)
        whole = model.score_catalogue(batch).gather(1, CANDIDATES)
        torch.testing.assert_close(whole, scores)


def test_a_step_does_not_see_the_future():
    core = make_unifiedssr().core
    user, mask = torch.tensor([1]), torch.ones(1, 3, dtype=torch.bool)

    before = core.recommend(user, torch.tensor([[4, 5, 6]]), mask)
    after = core.recommend(user, torch.tensor([[4, 5, 9]]), mask)

    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2], after[:, 2])


def test_soft_windows_learn_and_hard_ones_do_not():
    for windows in ("soft", "hard"):
        model = make_unifiedssr(windows=windows)

        model.loss(make_events())[0].backward()

        moved = model.core.windows.offsets.weight.grad
        assert (moved is not None and bool(moved.any())) == (windows == "soft")


def test_the_gradient_is_finite_also_without_any_history_and_for_one_task():
    model, batch = make_unifiedssr(), make_events()
    for events in (batch, batch.take(batch.task == 0), batch.take(batch.task == 1)):
        model.zero_grad()
        model.loss(events)[0].backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    nothing = make_batch([[], []], torch.tensor([[1, 2]] * 2), width=0, task=torch.tensor([0, 1]))
    assert model.loss(nothing)[0].isfinite() and model.score(nothing).isfinite().all()


def test_earlier_steps_predict_the_click_behind_them_without_sessions():
    model = make_unifiedssr(session_weight=0)
    batch = make_events().take(torch.tensor([True, False, True, False, False]))
    core, world = model.core, model.world

    torch.manual_seed(7)
    loss, _ = model.loss(batch)

    torch.manual_seed(7)
    drawn, _ = torch.randint(1, world.num_items + 1, (2, world.data.history_max, 2))
    lists, targets = torch.tensor([[4, 5, 6, 7, 10]]), [5, 6, 7, 10]
    steps = core.recommend(batch.user[:1] + 1, lists, lists != 0)[0]
    earlier = [
        nce(steps[t] @ core.products(torch.tensor([target]))[0] * core.scale,
            core.products(drawn[t]) @ steps[t] * core.scale)
        for t, target in enumerate(targets)
    ]  # fmt: skip
    last = make_unifiedssr(session_weight=0, steps="last")
    last.load_state_dict(model.state_dict())
    torch.testing.assert_close(loss - last.loss(batch)[0], torch.stack(earlier).mean() / 2)
