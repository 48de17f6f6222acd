"""Comparison of two tasks' gradients, against finite differences and by hand."""

import math

import pytest
import torch
from torch import nn

from trainer.analysis.gradients import TOTAL, compare, gradients_of, layer_of
from trainer.errors import DataError


class Shared(nn.Module):
    """A shared encoder, a head for each task, and a frozen table."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.search_head = nn.Linear(4, 1)
        self.rec_head = nn.Linear(4, 1)
        self.table = nn.Embedding(5, 3).requires_grad_(False)


def losses(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)

    def search():
        return (module.search_head(module.encoder(x)) - target[:, :1]).square().mean()

    def rec():
        return (module.rec_head(module.encoder(x + 1)) + target[:, 1:2]).square().mean()

    return search, rec


def compared(module, search, rec, **options):
    return compare(gradients_of(module, search), gradients_of(module, rec), **options)


def numerical_gradient(parameter, loss, step=1e-5):
    flat, gradient = parameter.data.view(-1), []
    for place in range(len(flat)):
        value, ends = flat[place].item(), []
        for sign in (1, -1):
            flat[place] = value + sign * step
            ends.append(loss().item())
        flat[place] = value
        gradient.append((ends[0] - ends[1]) / (2 * step))
    return torch.tensor(gradient, dtype=torch.float64)


def test_figures_equal_those_of_finite_differences():
    torch.manual_seed(0)
    module = Shared().double()
    search, rec = losses(module)
    rows = {row.layer: row for row in compared(module, search, rec)}
    assert list(rows) == ["encoder.0", "encoder.2", TOTAL]  # heads belong to one task, the table is frozen
    for layer, prefix in (("encoder.0", "encoder.0."), ("encoder.2", "encoder.2."), (TOTAL, "encoder.")):
        parameters = [p for name, p in module.named_parameters() if name.startswith(prefix)]
        a, b = (torch.cat([numerical_gradient(p, loss) for p in parameters]) for loss in (search, rec))
        row = rows[layer]
        assert row.num_parameters == len(a)
        assert row.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
        assert row.conflicting_share == pytest.approx(float((a * b < 0).double().mean()))
        assert row.search_norm == pytest.approx(float(a.norm()), rel=1e-6)
        assert row.rec_norm == pytest.approx(float(b.norm()), rel=1e-6)
        assert row.magnitude_ratio == pytest.approx(float(a.norm() / b.norm()), rel=1e-6)
        similarity = 2 * a.norm() * b.norm() / (a.norm() ** 2 + b.norm() ** 2)
        assert row.magnitude_similarity == pytest.approx(float(similarity), rel=1e-6)


def one_layer(search, rec):
    """The row of a layer whose two gradients are the given vectors."""
    module = nn.Linear(len(search), 1, bias=False).double()
    vectors = [torch.tensor(values, dtype=torch.float64) for values in (search, rec)]
    return compared(module, *(lambda v=v: module.weight[0] @ v for v in vectors))[0]


def test_by_hand():
    row = one_layer([3.0, 4.0, 0.0, 0.0], [3.0, -4.0, 1.0, 0.0])
    assert row.cosine == pytest.approx(-7 / (5 * math.sqrt(26)))
    assert row.conflicting_share == 0.5  # of the two parameters that both tasks move
    assert row.magnitude_ratio == pytest.approx(5 / math.sqrt(26))
    assert row.magnitude_similarity == pytest.approx(2 * 5 * math.sqrt(26) / 51)


def test_opposite_and_equal_gradients():
    assert one_layer([1.0, 2.0], [-2.0, -4.0]).cosine == pytest.approx(-1.0)
    same = one_layer([1.0, 2.0], [1.0, 2.0])
    found = (same.cosine, same.conflicting_share, same.magnitude_similarity)
    assert found == pytest.approx((1.0, 0.0, 1.0))


def test_tiny_derivatives_still_have_a_sign():
    assert one_layer([1e-200, 1e-200], [1e-200, -1e-200]).conflicting_share == 0.5


def test_a_gradient_of_zero_has_no_direction():
    row = one_layer([0.0, 0.0], [1.0, 1.0])
    assert (row.cosine, row.conflicting_share, row.magnitude_ratio) == (None, None, 0.0)
    assert row.magnitude_similarity == 0.0
    both = one_layer([0.0], [0.0])
    assert both.magnitude_ratio is None and both.magnitude_similarity is None


def test_sparse_embedding_gradients_and_rows_that_one_task_touches():
    module = nn.Embedding(10, 2, sparse=True)
    row = compared(
        module, lambda: module(torch.tensor([1, 2])).sum(), lambda: -module(torch.tensor([2, 3])).sum()
    )[0]
    assert row.cosine == pytest.approx(-0.5)
    assert row.conflicting_share == 1.0  # the one row that both touch


def test_gradients_of_the_module_stay_untouched_and_layers_can_be_merged():
    module = Shared().double()
    search, rec = losses(module)
    rows = compared(module, search, rec, layer=lambda name: name.split(".")[0])
    assert [row.layer for row in rows] == ["encoder", TOTAL]
    assert rows[0].cosine == rows[1].cosine
    assert all(p.grad is None for p in module.parameters())


def test_layer_of_a_parameter():
    assert layer_of("encoder.block.0.wq.weight") == "encoder.block.0.wq"
    assert layer_of("no_history") == "no_history"


def test_errors_say_what_is_wrong():
    module = Shared().double()
    search, _ = losses(module)
    with pytest.raises(DataError, match="share no parameter"):
        compared(module, lambda: module.search_head.bias.sum(), lambda: module.rec_head.bias.sum())
    with pytest.raises(DataError, match=r"encoder\.0\.weight: a gradient is not finite"):
        compared(module, search, lambda: search() * math.nan)
