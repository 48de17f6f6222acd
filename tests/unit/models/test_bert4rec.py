"""What the oracle of BERT4Rec does not say: which positions are masked, predicted and scored."""

import torch
import torch.nn.functional as F

from tests.tiny_world import make_batch, make_world
from trainer.models.baselines.bert4rec import Bert4Rec, Bert4RecSettings


def make_model(**settings):
    torch.manual_seed(0)
    world = make_world(num_items=9, history_max=4)
    return Bert4Rec(Bert4RecSettings(dim=8, ffn_dim=8, **settings), world).eval()


def test_the_last_item_alone_or_each_with_its_probability():
    ids = torch.tensor([[3, 4, 5, 0], [1, 0, 0, 0]]).repeat(500, 1)

    last = make_model(last_ratio=1.0).draw_masks(ids)
    drawn = make_model(last_ratio=0.0, mask_ratio=0.3).draw_masks(ids)

    assert last[:2].tolist() == [[False, False, True, False], [True, False, False, False]]
    assert not (drawn & (ids == 0)).any()
    assert 0.25 < drawn[ids != 0].float().mean() < 0.35


def test_only_the_last_masks_of_a_list_are_predicted():
    model = make_model(mask_ratio=0.5)  # two of four positions
    ids = torch.tensor([[3, 4, 5, 6], [1, 2, 0, 0]])
    masked = torch.tensor([[True, True, False, True], [True, False, False, False]])
    steps = torch.randn(2, 4, 8)

    loss = model.mask_loss(steps, masked, ids)

    logits = steps @ model.core.items.weight[1:10].T
    kept = [(0, 1, 4), (0, 3, 6), (1, 0, 1)]
    losses = [F.cross_entropy(logits[row, step], torch.tensor(item - 1)) for row, step, item in kept]
    torch.testing.assert_close(loss, sum(losses) / 3)
    assert model.mask_loss(steps, torch.zeros_like(masked), ids) == 0


def test_a_full_list_gives_up_its_oldest_item_for_the_mask():
    model = make_model()
    candidates = torch.arange(3)[None]
    full, newest = make_batch([[1, 2, 3, 4]], candidates), make_batch([[2, 3, 4]], candidates)

    torch.testing.assert_close(model.score(full), model.score(newest))
    torch.testing.assert_close(model.score_catalogue(full)[:, :3], model.score(full))
    assert model.score(make_batch([[]], candidates)).isfinite().all()
