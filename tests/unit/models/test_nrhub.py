"""What the oracle of NRHUB does not say: which clicks make which view, and views without clicks."""

import torch

from tests.tiny_world import make_batch, make_world
from trainer.models.baselines.nrhub import Nrhub, NrhubSettings

CANDIDATES = torch.tensor([[2, 9, 4]] * 3)


def make_nrhub(**settings):
    torch.manual_seed(0)
    return Nrhub(NrhubSettings(dim=8, hidden_dim=12, view_dim=6, **settings), make_world()).eval()


def test_searches_recommendations_and_known_queries_make_the_views():
    model = make_nrhub()
    batch = make_batch(
        [[3, 4, 5], [6], []], CANDIDATES, tasks=[[0, 1, 1], [1], []], queries=[[-1, 2, -1], [-1], []]
    )

    users = model.core(
        torch.tensor([[3, 0], [0, 0], [0, 0]]),
        torch.tensor([[5, 6], [7, 0], [0, 0]]),
        torch.tensor([[4], [0], [0]]),
    )
    scores = torch.einsum("bu,bcu->bc", users, model.core.item_vectors(CANDIDATES + 1))

    torch.testing.assert_close(model.score(batch), scores)
    torch.testing.assert_close(model.score_catalogue(batch)[:, CANDIDATES[0]], scores)
    assert scores.isfinite().all()


def test_users_are_told_apart_from_the_start():
    torch.manual_seed(0)
    core = Nrhub(NrhubSettings(), make_world(num_items=100)).core

    users = core(
        torch.zeros(2, 1, dtype=torch.int64),
        torch.zeros(2, 1, dtype=torch.int64),
        torch.arange(1, 21).view(2, 10),
    )

    assert torch.cosine_similarity(users[0], users[1], dim=0) < 0.5


def test_softmax_is_the_clicked_item_among_the_candidates():
    model = make_nrhub(loss="softmax")
    labels = torch.tensor([[0.0, 1.0, 0.0]] * 3)
    batch = make_batch([[3, 4], [6], []], CANDIDATES, labels=labels)

    loss, _ = model.loss(batch)

    torch.testing.assert_close(loss, -model.score(batch).log_softmax(1)[:, 1].mean())
