"""Norms of DIN, and what its oracles do not say: batches with empty histories and with queries."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_world import make_batch, make_world
from trainer.models.baselines.din import Din, DinSettings
from trainer.models.baselines.din_search import DinSearch, DinSearchSettings
from trainer.models.layers.batch_norm import BatchNorm

SIZES: dict[str, Any] = {"dim": 8, "attention_dims": (6, 4), "head_dims": (6, 4)}


def test_batch_norm_is_torchs():
    ours, theirs = BatchNorm(5), nn.BatchNorm1d(5)
    x = torch.randn(4, 3, 5, dtype=torch.float32) * 3 + 1
    for _ in range(3):
        mine, expected = ours(x), theirs(x.flatten(0, 1)).view_as(x)
        torch.testing.assert_close(mine, expected)
        x = x + 1
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x.flatten(0, 1)).view_as(x))


def test_what_does_not_count_does_not_move_the_statistics():
    x, counted = torch.randn(4, 3, 5), torch.tensor([True, True, False]).expand(4, 3)
    with_padding, without = BatchNorm(5), BatchNorm(5)

    left = with_padding(x, counted)[:, :2]

    torch.testing.assert_close(left, without(x[:, :2]))
    torch.testing.assert_close(with_padding.running_var, without.running_var)
    assert BatchNorm(5)(x, torch.zeros_like(counted)).isfinite().all()


def test_a_batch_that_overflows_does_not_stay_in_the_statistics():
    """run.on_nan=skip leaves it out; what evaluation reads must not remember it."""
    ours, undisturbed = BatchNorm(5), BatchNorm(5)
    x, bad = torch.randn(4, 5), torch.randn(4, 5)
    bad[1, 3] = torch.inf
    ours(x), undisturbed(x)
    ours(bad)
    assert ours.eval()(x).isfinite().all()
    assert ours.running_mean[3] == undisturbed.running_mean[3]
    assert ours.running_var[3] == undisturbed.running_var[3]


def test_ranks_share_their_statistics():
    x = torch.randn(8, 5)
    others: Iterator[Tensor] = iter([])

    def gather(row):  # the other rank's totals, which it computes in the same order
        return torch.cat([row, next(others)[None]]), 0

    whole, half = BatchNorm(5), BatchNorm(5, gather=gather)
    rest = x[4:]
    totals = torch.cat([rest.sum(0), torch.tensor([4.0])])
    others = iter([totals, (rest - x.mean(0)).square().sum(0)])

    torch.testing.assert_close(half(x[:4]), whole(x)[:4])
    torch.testing.assert_close(half.running_var, whole.running_var)


def make_events(width=None):
    return make_batch(
        [[3, 4, 5], [7, 8], []],
        torch.arange(9).view(3, 3),
        tasks=[[0, 1, 1], [0, 0], []],
        queries=[[-1, 2, -1], [-1, -1], []],
        width=width,
    )


def make_models():
    torch.manual_seed(0)
    world = make_world(num_words=12)
    yield Din(DinSettings(**SIZES), world)
    yield Din(DinSettings(variant="group", **SIZES), world)
    yield DinSearch(DinSearchSettings(**SIZES), world)


@pytest.mark.parametrize("number", range(3))
def test_padding_and_other_rows_do_not_matter(number):
    model = list(make_models())[number]
    loss, _ = model(make_events())  # moves the running statistics
    wide, _ = model(make_events(width=6))
    torch.testing.assert_close(loss, wide)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    model.eval()
    scores = model.score(make_events())

    assert scores.isfinite().all()
    alone = torch.cat([model.score(make_events().rows(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(alone, scores)
    torch.testing.assert_close(
        model.score_catalogue(make_events()).gather(1, make_events().candidates), scores
    )


def test_the_query_of_a_search_is_read():
    *_, model = make_models()
    before, after = make_events(), make_events()
    after.history_queries[0, 1] = 3

    changed = (model.eval().score(before) != model.score(after)).any(1)

    assert changed.tolist() == [True, False, False]
