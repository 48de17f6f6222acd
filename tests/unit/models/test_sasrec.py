"""What the oracle of SASRec does not say: the loss over every step."""

import torch
import torch.nn.functional as F

from tests.tiny_world import make_batch, make_world
from trainer.models.baselines.sasrec import SasRec, SasRecSettings


def test_bce_is_the_mean_over_steps_then_over_events(monkeypatch):
    model = SasRec(SasRecSettings(dim=8, ffn_dim=8, loss="bce"), make_world(num_items=9)).eval()
    torch.nn.init.normal_(model.core.items.weight)
    batch = make_batch([[3, 1], [6]], torch.tensor([[5, 0], [2, 0]]))
    # the negative of event 0's second step was clicked before: it does not count
    negatives = torch.tensor([[8, 4], [1, 0]])
    monkeypatch.setattr(torch, "randint_like", lambda *_: negatives)

    loss, _ = model.loss(batch)

    h, e = model.core(torch.tensor([[4, 2], [7, 0]])), model.core.items.weight
    log_sigmoid = F.logsigmoid
    first = -log_sigmoid(h[0, 0] @ e[2]) - log_sigmoid(-h[0, 0] @ e[8]) - log_sigmoid(h[0, 1] @ e[6])
    second = -log_sigmoid(h[1, 0] @ e[3]) - log_sigmoid(-h[1, 0] @ e[1])
    torch.testing.assert_close(loss, (first / 2 + second) / 2)


def test_recommendations_only_is_a_setting():
    world = make_world()
    model = SasRec(SasRecSettings(history="rec"), world).eval()
    candidates = torch.arange(4)[None]
    mixed = make_batch([[4, 5, 6]], candidates, tasks=[[0, 1, 0]])
    rec = make_batch([[4, 6]], candidates)

    torch.testing.assert_close(model.score(mixed), model.score(rec))
    torch.testing.assert_close(model.score_catalogue(mixed)[:, :4], model.score(mixed))
