"""Mixtures of negatives, on arrays."""

import numpy as np
import pytest

from trainer.configs import load_config
from trainer.data.negatives import NegativeSampler
from trainer.errors import ConfigError

EVENTS, WIDTH = 400, 6


def events(impressions: int) -> dict[str, np.ndarray]:
    """Positive 0, history 1 … 4; the impressions begin with the positive and one history item, which must not
    come back."""
    shown = np.concatenate(
        [
            np.zeros((EVENTS, 1), int),
            np.full((EVENTS, 1), 3),
            np.tile(np.arange(10, 10 + impressions), (EVENTS, 1)),
        ],
        axis=1,
    )
    shown[::2, 2:] = -1  # every other event has none of use
    return {
        "event_ids": np.arange(EVENTS),
        "epochs": np.zeros(EVENTS, int),
        "positives": np.zeros(EVENTS, int),
        "history": np.tile(np.arange(1, 5), (EVENTS, 1)),
        "history_mask": np.ones((EVENTS, 4), bool),
        "impressions": shown,
    }


def of_kind(kind: str, impressions: int = 8, mixture: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Items 0 … 99 are never clicked, 100 … 199 often."""
    clicks = np.repeat([0, 10_000], 100)
    return NegativeSampler(200, WIDTH, seed=1, kind=kind, clicks=clicks, alpha=1.0, mixture=mixture).draw(
        **events(impressions)
    )


@pytest.mark.parametrize("kind", ["uniform", "popularity", "impressions", "mixture"])
def test_negatives_are_distinct_and_never_the_positive_or_the_history(kind: str) -> None:
    negatives = of_kind(kind, mixture=(0.5, 0.3))
    assert negatives.shape == (EVENTS, WIDTH) and negatives.min() > 4
    assert all(len(set(row)) == WIDTH for row in negatives.tolist())


def test_impressions_come_first_and_the_rest_is_filled() -> None:
    enough, few = of_kind("impressions", impressions=8), of_kind("impressions", impressions=2)
    assert ((enough[1::2] >= 10) & (enough[1::2] < 18)).all()
    assert np.unique(enough[1::2]).size == 8  # not always the same of them
    assert (np.sort(few[1::2, :2], axis=1) == [10, 11]).all()
    assert (enough[::2] > 99).mean() > 0.4  # uniform where nothing was shown


def test_a_mixture_has_its_shares() -> None:
    negatives = of_kind("mixture", mixture=(0.5, 0.3))[1::2]
    shown = ((negatives >= 10) & (negatives < 18)).mean()
    popular = (negatives >= 100).mean()
    assert shown == pytest.approx(0.5 + 0.2 * 8 / 200, abs=0.04)
    assert popular == pytest.approx(0.3 + 0.2 / 2, abs=0.04)
    all_popular = of_kind("mixture", mixture=(0.0, 1.0))
    assert (all_popular >= 100).mean() > 0.99


def test_an_event_has_its_negatives_whatever_the_batch() -> None:
    sampler = NegativeSampler(
        200, WIDTH, seed=1, kind="mixture", clicks=np.repeat([0, 10_000], 100), mixture=(0.4, 0.3)
    )
    every = sampler.draw(**events(8))
    some = np.array([3, 4, 77, 301])
    assert (sampler.draw(**{name: values[some] for name, values in events(8).items()}) == every[some]).all()


def test_shares_above_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 1"):
        load_config(
            None, ["data.negatives=mixture", "data.mixture_popularity=0.7", "data.mixture_impressions=0.6"]
        )


def uniform(seed: int = 1, real: bool = True) -> np.ndarray:
    """Negatives without impressions; real=False: the history is padding."""
    given = events(0)
    given["history_mask"] = np.full((EVENTS, 4), real)
    return NegativeSampler(20, WIDTH, seed).draw(**given)


def test_padding_forbids_nothing() -> None:
    """The items 1 … 4 that stand under the mask are drawn as often as any other but the positive."""
    counts = np.bincount(uniform(real=False).ravel(), minlength=20)
    assert counts[0] == 0 and counts[1:5].min() > 0.7 * counts[5:].mean()
    assert not np.isin(uniform(), np.arange(5)).any()


def test_another_seed_draws_other_negatives() -> None:
    assert (uniform(seed=1) == uniform(seed=1)).all()
    assert (uniform(seed=1) != uniform(seed=2)).mean() > 0.8


def test_popularity_follows_its_power() -> None:
    """Items 10 … 19 have 15 clicks more than none: 16^α times as likely, which is 1 for α = 0 and 4 for ½."""
    given, clicks = events(0), np.repeat([0, 15], 10)
    given["history_mask"] = np.zeros((EVENTS, 4), bool)
    for alpha, times in ((0.0, 1.0), (0.5, 4.0)):
        sampler = NegativeSampler(20, 1, 1, kind="popularity", clicks=clicks, alpha=alpha)
        counts = np.bincount(sampler.draw(**given).ravel(), minlength=20)
        # the positive, item 0, is never drawn: 9 unpopular items stand against 10 popular ones
        share = counts[10:].sum() / counts.sum()
        assert share == pytest.approx(10 * times / (10 * times + 9), abs=0.07)
