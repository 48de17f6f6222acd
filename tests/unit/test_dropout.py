"""Our dropout is dropout: shares, scale, gradient, determinism."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.models.layers.dropout import Dropout, dropout


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_of_p_is_dropped_and_the_rest_scaled(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 501, dtype=dtype)
    y = dropout(x, p, True)
    assert y.dtype == dtype and y.shape == x.shape
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
    # p to the next 1/65,536
    torch.testing.assert_close(
        y[y != 0].unique(), torch.tensor([1 / (1 - p)], dtype=dtype), rtol=1e-4, atol=0
    )


def test_neighbours_rows_and_draws_are_independent() -> None:
    """Four elements share a draw of 64 bits: none of them may tell about another."""
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(250_000, 8), 0.3, True) == 0).float()
    correlation = torch.corrcoef(dropped.T) - torch.eye(8)
    assert correlation.abs().max() < 4 / 250_000**0.5
    assert abs(torch.corrcoef(torch.stack([dropped[:-1, 0], dropped[1:, 0]]))[0, 1]) < 4 / 250_000**0.5


def test_the_gradient_passes_where_the_value_did() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 9, requires_grad=True)
    y = dropout(x, 0.4, True)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(y == 0, 0.0, 1 / 0.6), rtol=1e-4, atol=0)


def test_the_seed_decides() -> None:
    x, draws = torch.ones(3, 5), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.5, True))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_nothing_everything_and_evaluation_are_those_of_torch() -> None:
    x = torch.randn(5, 3)
    for p, training in ((0.0, True), (0.3, False), (1.0, True)):
        assert torch.equal(dropout(x, p, training), F.dropout(x, p, training))
    assert dropout(torch.empty(0, 4), 0.1, True).shape == (0, 4)
    module = Dropout(0.5)
    assert isinstance(module, nn.Dropout) and torch.equal(module.eval()(x), x)
