"""Estimators of mutual information on data whose information is known."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from trainer.analysis.mutual_information import (
    CriticSettings,
    DonskerVaradhan,
    InfoNCE,
    _split,
    info_nce,
    mine,
)
from trainer.analysis.mutual_information_knn import ksg, ross
from trainer.errors import DataError

QUICK = CriticSettings(steps=200, restarts=1)
NEURAL = {"mine": mine, "info_nce": info_nce}


def gaussian(num_dims, rho, num_samples=2000, seed=0):
    """x, y whose pairs of columns have correlation rho, and their information −d/2 · log(1 − ρ²)."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, num_samples, num_dims, generator=generator)
    return x, rho * x + math.sqrt(1 - rho**2) * noise, -num_dims / 2 * math.log(1 - rho**2)


# (dimensions, ρ, smallest and largest error): what 2,000 samples and 200 steps are good for. The table in
# mutual_information.py holds what the default settings reach.
MINE_ERRORS = [
    *((1, 0.1, -0.02, 0.02), (1, 0.5, -0.05, 0.05), (1, 0.9, -0.12, 0.1)),
    *((5, 0.1, -0.04, 0.02), (5, 0.5, -0.2, 0.1), (5, 0.9, -1.6, 0.3)),
    *((20, 0.1, -0.12, 0.02), (20, 0.5, -2.4, 0.1), (20, 0.9, -14.0, 0.5)),
]
INFO_NCE_ERRORS = [
    *((1, 0.1, -0.02, 0.02), (1, 0.5, -0.05, 0.05), (1, 0.9, -0.12, 0.1)),
    *((5, 0.1, -0.04, 0.02), (5, 0.5, -0.2, 0.1), (5, 0.9, -0.9, 0.3)),
    *((20, 0.1, -0.12, 0.02), (20, 0.5, -1.8, 0.1), (20, 0.9, -11.5, -9.5)),  # log 600 = 6.4 of 16.6
]
KSG_ERRORS = [
    *((1, 0.1, -0.08, 0.08), (1, 0.5, -0.08, 0.08), (1, 0.9, -0.08, 0.08)),
    *((5, 0.1, -0.05, 0.05), (5, 0.5, -0.3, 0.0), (5, 0.9, -1.5, -0.8)),
    *((20, 0.1, -0.15, 0.0), (20, 0.5, -2.6, -1.8), (20, 0.9, -14.0, -12.0)),
]


@pytest.mark.parametrize(
    ("name", "num_dims", "rho", "low", "high"),
    [("mine", *row) for row in MINE_ERRORS] + [("info_nce", *row) for row in INFO_NCE_ERRORS],
)
def test_neural_bounds_on_gaussians(name, num_dims, rho, low, high):
    x, y, truth = gaussian(num_dims, rho)
    assert low <= NEURAL[name](x, y, settings=QUICK).value - truth <= high


@pytest.mark.parametrize(("num_dims", "rho", "low", "high"), KSG_ERRORS)
def test_ksg_on_gaussians(num_dims, rho, low, high):
    x, y, truth = gaussian(num_dims, rho, num_samples=1000 if num_dims == 20 else 2000)
    assert low <= ksg(x, y).value - truth <= high


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("estimator", [*NEURAL, "ksg"])
def test_independent_data_hold_no_information(estimator, seed):
    x, y, _ = gaussian(5, 0.0, num_samples=1000, seed=seed)
    found = NEURAL[estimator](x, y, settings=QUICK, seed=seed) if estimator in NEURAL else ksg(x, y)
    assert found.low <= 0 <= found.high
    assert abs(found.value) < 0.05


def test_ksg_and_ross_are_right_on_average_for_independent_data():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 200, 2))).float()
    labels = torch.arange(200) % 2
    assert abs(np.mean([ksg(one[:, 0], one[:, 1]).value for one in x])) < 0.02
    assert abs(np.mean([ross(one, labels).value for one in x])) < 0.02


def test_ross_on_a_label():
    """x ~ N(±1, 1): I(X; Y) = log 2 − E[H(Y | X)] = 0.3368 nats, by numerical integration."""
    labels = torch.arange(4000) % 2
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) + 2.0 * labels - 1.0
    grid = np.linspace(-8, 8, 20_001)
    density = (np.exp(-((grid - 1) ** 2) / 2) + np.exp(-((grid + 1) ** 2) / 2)) / math.sqrt(8 * math.pi)
    yes = 1 / (1 + np.exp(-2 * grid))
    entropy = -(yes * np.log(yes) + (1 - yes) * np.log(1 - yes))
    truth = math.log(2) - np.trapezoid(density * entropy, grid)
    found = ross(x, labels)
    assert found.low <= truth <= found.high
    assert abs(found.value - truth) < 0.03
    assert mine(x, labels, settings=QUICK).value == pytest.approx(truth, abs=0.06)


def test_ross_is_bounded_by_the_entropy_of_the_labels():
    labels = torch.tensor([0, 1, 1, 1] * 100)
    found = ross(labels + 0.01 * torch.rand(400), labels)  # x tells the label
    assert found.value == pytest.approx(found.ceiling)
    assert found.ceiling == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75), abs=0.01)


def test_ksg_reaches_its_ceiling_when_y_is_x():
    x = torch.rand(500, generator=torch.Generator().manual_seed(0))
    found: Any = ksg(x, x)
    assert found.ceiling - 0.4 < found.value <= found.ceiling  # jitter can add one neighbour: 1 / 3
    assert found.ceiling == pytest.approx(math.log(500 / 3), abs=0.2)


def test_info_nce_saturates_at_its_ceiling():
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    found: Any = info_nce(x, x, settings=QUICK)
    assert found.ceiling == pytest.approx(math.log(found.num_samples))
    assert found.ceiling - 0.8 < found.value <= found.ceiling


def test_ceiling_is_that_of_the_largest_block():
    """5,000 held-out samples make three blocks of at most 1,667."""
    assert InfoNCE.ceiling(5000) == pytest.approx(math.log(1667))
    bound = InfoNCE(2, 2, 4)
    with torch.no_grad():
        terms = bound.terms(torch.randn(5000, 2), torch.randn(5000, 2))
    assert terms.shape == (5000, 1)


def test_the_gradient_of_mine_is_that_of_equation_12():
    """In a single batch the moving average is the batch's own mean, and the gradients agree."""
    torch.manual_seed(0)
    bound = DonskerVaradhan(2, 1, 8)
    torch.nn.init.normal_(list(bound.critic.parameters())[-2])  # the last weight, 0 at the start
    x, y = torch.randn(32, 2), torch.randn(32, 1)
    torch.manual_seed(1)
    loss = bound.loss(x, y)
    torch.manual_seed(1)
    shift = 1 + int(torch.randint(31, (1,)))
    plain = bound(x, y.roll(shift, 0)).exp().mean().log() - bound(x, y).mean()
    ours = torch.autograd.grad(loss, list(bound.parameters()))
    theirs = torch.autograd.grad(plain, list(bound.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_moving_average_moves_by_its_rate():
    bound: Any = DonskerVaradhan(1, 1, 4)
    x = torch.zeros(8, 1)
    bound.loss(x, x)  # T = 0: the mean of e^T is 1
    assert float(bound.log_mean_exp) == pytest.approx(0.0, abs=1e-6)
    torch.nn.init.constant_(list(bound.critic.parameters())[-1], math.log(3.0))
    bound.loss(x, x)
    assert float(bound.log_mean_exp) == pytest.approx(math.log(0.99 * 1 + 0.01 * 3), abs=1e-6)


def test_no_user_is_in_two_parts():
    users = np.random.default_rng(0).integers(150, size=1000)
    parts = _split(users, seed=0)
    owners = [set(users[part.numpy()]) for part in parts]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    assert sorted(torch.cat(list(parts)).tolist()) == list(range(1000))
    assert [len(part) for part in parts] == pytest.approx([500, 200, 300], abs=30)


def test_events_of_one_user_widen_the_interval():
    x, y, _ = gaussian(1, 0.5, num_samples=400)
    alone = ksg(x, y)
    copies, owners = (x.repeat(10, 1), y.repeat(10, 1)), np.tile(np.arange(400), 10)
    together = ksg(*copies, users=owners, k=15)
    apart = ksg(*copies, k=15)
    assert together.high - together.low > 2 * (apart.high - apart.low)
    assert alone.num_samples == 400


def test_a_seed_gives_one_answer_and_leaves_the_callers_random_numbers():
    x, y, _ = gaussian(2, 0.5, num_samples=300)
    settings = CriticSettings(steps=20, restarts=2)
    torch.manual_seed(5)
    first = mine(x, y, settings=settings, seed=3)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert mine(x, y, settings=settings, seed=3) == first
    assert len(first.restarts) == 2 and first.value in first.restarts
    assert first.num_samples == 90


@pytest.mark.parametrize("estimator", [mine, info_nce, ksg])
def test_scale_and_a_constant_column_change_nothing_much(estimator):
    x, y, truth = gaussian(1, 0.9, num_samples=1000)
    settings = {} if estimator is ksg else {"settings": QUICK}
    found = estimator(torch.cat([1e6 * x, torch.full_like(x, 3.0)], dim=1), 1e-6 * y, **settings)
    assert found.value == pytest.approx(truth, abs=0.15)


@pytest.mark.parametrize("estimator", [mine, info_nce, ksg])
def test_errors_say_what_is_wrong(estimator):
    x = torch.randn(200, 2)
    with pytest.raises(DataError, match="same events"):
        estimator(x, x[:100])
    with pytest.raises(DataError, match="at least 100"):
        estimator(x, x, users=np.arange(200) // 4)
    with pytest.raises(DataError, match="not finite"):
        estimator(x, torch.where(x > 2, torch.nan, x))


@pytest.mark.parametrize("estimator", [mine, info_nce])
def test_a_user_with_most_samples_leaves_none_to_measure_by(estimator):
    """All of that user's samples are in one part. Without others no critic is selected: the value was 0."""
    users = np.maximum(np.arange(1000) - 699, 0)
    with pytest.raises(DataError, match="one user has 700 of 1000 samples"):
        estimator(torch.randn(1000), torch.randn(1000), users=users)


def test_ross_wants_labels():
    x = torch.randn(200)
    with pytest.raises(DataError, match="whole numbers"):
        ross(x, x)
    with pytest.raises(DataError, match="nothing to inform about"):
        ross(x, torch.zeros(200, dtype=torch.int64))
