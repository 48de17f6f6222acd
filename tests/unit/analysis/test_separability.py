"""Lemma 5.1 as an experiment: estimates recover the truth, and the order that theory predicts is found."""

import numpy as np
import pytest

from trainer.analysis.separability import (
    SLOPE,
    discriminative,
    gaussian,
    generative,
    separability,
    skewed,
)


@pytest.fixture(scope="module")
def table():
    rows = separability(sample_sizes=(30, 2000), num_repeats=12)
    return {(row.world, row.paradigm, row.num_samples): row for row in rows}


def test_a_table_has_a_row_of_each_world_paradigm_and_size(table):
    assert len(table) == 2 * 2 * 2
    assert all(row.error_low < row.error < row.error_high for row in table.values())
    assert all(row.information <= row.limit for row in table.values())


def test_gaussian_classes_few_samples_the_generative_estimate_is_nearer_and_more_informative(table):
    few, many = (
        [table["gaussian", paradigm, size] for paradigm in ("generative", "discriminative")]
        for size in (30, 2000)
    )
    assert few[0].error_high < few[1].error_low
    assert few[0].information > few[1].information
    assert many[0].error == pytest.approx(many[1].error, rel=0.2)  # Efron 1975: both are consistent


def test_other_classes_many_samples_the_order_is_reversed(table):
    few, many = (
        [table["skewed", paradigm, size] for paradigm in ("generative", "discriminative")]
        for size in (30, 2000)
    )
    assert few[0].error < few[1].error
    assert many[0].error_low > many[1].error_high
    assert many[0].information_high < many[1].information_low


@pytest.mark.parametrize("fit", [generative, discriminative])
def test_both_paradigms_estimate_the_same_parameter(fit):
    theta, intercept = fit(*gaussian(np.random.default_rng(0), 50_000, 3))
    np.testing.assert_allclose(theta, [SLOPE, 0, 0], atol=0.05)
    assert intercept == pytest.approx(0, abs=0.05)


def test_information_of_the_gaussian_world_is_that_of_two_gaussians(table):
    """x ~ N(±1, 1): I(X; Y) = 0.3368 nats (tests/unit/analysis/test_mutual_information.py)."""
    assert table["gaussian", "generative", 30].limit == pytest.approx(0.3368, abs=0.01)


def test_a_seed_gives_one_table():
    first, again, other = (
        separability(sample_sizes=(20,), num_repeats=2, num_dims=4, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_draw_always_holds_both_classes():
    for draw in (gaussian, skewed):
        for seed in range(50):
            _, y = draw(np.random.default_rng(seed), 2, 1)
            assert set(y) == {0.0, 1.0}
