"""Projections, densities and figures of overlap, on groups whose overlap is known."""

import math

import numpy as np
import pytest

from trainer.analysis.space import (
    Contours,
    Projection,
    _wilson,
    bhattacharyya_grid,
    density_contours,
    pca_projection,
    tsne_projection,
    two_sample_test,
)
from trainer.analysis.stored import load_arrays, save_arrays
from trainer.errors import DataError


def groups(apart, num_rows=400, num_dims=2, seed=0):
    """Two standard Gaussian groups whose means are `apart` along the first axis."""
    generator = np.random.default_rng(seed)
    first, second = generator.normal(size=(2, num_rows, num_dims))
    second[:, 0] += apart
    return first, second


def plane(apart, num_rows=1000, seed=0):
    first, second = groups(apart, num_rows, seed=seed)
    return Projection(first, second, "pca", None, seed)


# ---- projections -------------------------------------------------------------------------------------------


def test_pca_finds_the_axis_that_separates():
    first, second = groups(10.0, num_dims=6)
    found = pca_projection(first, second)
    assert found.first.shape == found.second.shape == (400, 2)
    assert abs(found.first[:, 0].mean() - found.second[:, 0].mean()) == pytest.approx(10, rel=0.02)
    assert found.explained is not None
    assert found.explained[0] > 0.8 > 0.1 > found.explained[1]


@pytest.mark.parametrize("project", [pca_projection, tsne_projection])
def test_a_seed_gives_one_projection(project):
    pair = groups(3.0, num_rows=60, num_dims=5)
    first, again = project(*pair, seed=1), project(*pair, seed=1)
    np.testing.assert_array_equal(first.first, again.first)
    np.testing.assert_array_equal(first.second, again.second)


def test_tsne_keeps_distant_groups_apart():
    found = tsne_projection(*groups(20.0, num_rows=80, num_dims=60))
    assert two_sample_test(found.first, found.second).accuracy == 1.0


def test_a_picture_holds_at_most_so_many_points(monkeypatch):
    monkeypatch.setattr("trainer.analysis.space.MAX_POINTS", 50)
    found = pca_projection(*groups(0.0))
    assert len(found.first) == len(found.second) == 50


# ---- densities ---------------------------------------------------------------------------------------------


def test_density_of_a_gaussian():
    """The region that holds the share m of a standard Gaussian in the plane has radius √(−2 log(1 − m))."""
    found = density_contours(plane(0.0, num_rows=2000))
    assert found.first.sum() == pytest.approx(1) and found.second.sum() == pytest.approx(1)
    cell = (found.x[1] - found.x[0]) * (found.y[1] - found.y[0])
    for mass, level in zip(found.masses, found.first_levels, strict=True):
        area = (found.first >= level).sum() * cell
        assert math.sqrt(area / math.pi) == pytest.approx(math.sqrt(-2 * math.log(1 - mass)), rel=0.1)


def test_rows_of_the_grid_are_y():
    points = np.random.default_rng(0).normal(size=(200, 2)) * [1.0, 0.1] + [5.0, -3.0]
    found = density_contours(Projection(points, points, "pca", None, 0))
    row, column = np.unravel_index(found.first.argmax(), found.first.shape)
    assert found.x[column] == pytest.approx(5, abs=0.5)
    assert found.y[row] == pytest.approx(-3, abs=0.1)


def test_points_on_a_line_have_no_density():
    line = np.linspace(0, 1, 50)[:, None] * [1.0, 1.0]
    with pytest.raises(DataError, match="on a line"):
        density_contours(Projection(line, line, "pca", None, 0))


def test_contours_of_few_points_are_not_cut_off():
    generator = np.random.default_rng(3)
    points = generator.uniform(size=(30, 2))
    found = density_contours(Projection(points, points + 0.1, "pca", None, 0))
    for density, levels in ((found.first, found.first_levels), (found.second, found.second_levels)):
        rim = max(density[[0, -1]].max(), density[:, [0, -1]].max())
        assert rim < min(levels)


def test_contours_and_projections_can_be_stored(tmp_path):
    made = plane(1.0, num_rows=50)
    projection = load_arrays(save_arrays(tmp_path / "projection.npz", made), Projection)
    np.testing.assert_array_equal(projection.second, made.second)
    contours = density_contours(made)
    found = load_arrays(save_arrays(tmp_path / "contours.npz", contours), Contours)
    np.testing.assert_array_equal(found.second, contours.second)
    assert (found.masses, found.first_levels) == (contours.masses, contours.first_levels)


# ---- overlap -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [0.0, 1.0, 2.0, 4.0])
def test_bhattacharyya_of_two_gaussians(apart):
    """exp(−apart² / 8) for equal, unit covariances."""
    found = plane(apart, num_rows=3000)
    truth = math.exp(-(apart**2) / 8)
    # Kernels widen both groups, so the grid's overlap is a little larger.
    assert bhattacharyya_grid(density_contours(found)) == pytest.approx(truth, abs=0.06)


def test_bhattacharyya_of_a_group_with_itself_is_one():
    first, _ = groups(0.0, num_dims=5)
    assert bhattacharyya_grid(density_contours(Projection(first[:, :2], first[:, :2], "pca", None, 0))) == (
        pytest.approx(1)
    )


@pytest.mark.parametrize("classifier", ["logistic", "knn"])
def test_equal_groups_cannot_be_told_apart(classifier):
    found = []
    for seed in range(6):
        first, second = groups(0.0, seed=seed)
        found.append(two_sample_test(first, second, classifier=classifier))
    assert sum(one.low <= 0.5 <= one.high for one in found) >= 5
    assert np.mean([one.accuracy for one in found]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("classifier", ["logistic", "knn"])
def test_accuracy_reaches_that_of_the_best_classifier(classifier):
    """Φ(apart / 2) = .8413 for groups two deviations apart."""
    first, second = groups(2.0, num_rows=2000)
    found = two_sample_test(first, second, classifier=classifier)
    assert found.low <= 0.8413 <= found.high
    assert (found.num_rows, found.num_independent, found.classifier) == (4000, 4000.0, classifier)


def test_only_neighbours_see_a_difference_of_shape():
    generator = np.random.default_rng(0)
    ball, shell = generator.normal(size=(2, 500, 2))
    shell *= 3 / np.linalg.norm(shell, axis=1, keepdims=True)
    assert two_sample_test(ball, shell).low < 0.52
    assert two_sample_test(ball, shell, classifier="knn").low > 0.8


def test_the_larger_group_is_thinned_so_that_chance_is_one_half():
    first, second = groups(0.0, num_rows=1000)
    found = two_sample_test(first, second[:100])
    assert found.num_rows == 200
    assert found.low < 0.5


def test_users_are_not_recognised():
    """Each user belongs to one group by chance and has twenty nearly equal rows, which neighbours find."""
    generator = np.random.default_rng(0)
    homes = generator.normal(size=(60, 3))
    users = np.repeat(np.arange(60), 20)
    rows = homes[users] + 0.01 * generator.normal(size=(1200, 3))
    first, second = users < 30, users >= 30
    naive = two_sample_test(rows[first], rows[second], classifier="knn")
    fair = two_sample_test(rows[first], rows[second], users[first], users[second], classifier="knn")
    assert naive.low > 0.7
    assert fair.low < 0.5 < fair.high
    assert fair.num_independent == pytest.approx(60)


def test_wilson_by_hand():
    """8 of 10: Wilson's 95 % interval is .4902 to .9433; 10 of 10 has .7225 to 1."""
    assert _wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert _wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_a_seed_gives_one_answer():
    first, second = groups(0.5)
    assert two_sample_test(first, second, seed=4) == two_sample_test(first, second, seed=4)


def test_errors_say_what_is_wrong():
    first, second = groups(0.0)
    with pytest.raises(DataError, match="both must be"):
        two_sample_test(first, second[:, :1])
    with pytest.raises(DataError, match="at least 20"):
        pca_projection(first[:5], second)
    with pytest.raises(DataError, match="not finite"):
        pca_projection(first, np.where(second > 2, np.nan, second))
    with pytest.raises(DataError, match="logistic or knn"):
        two_sample_test(first, second, classifier="forest")
    with pytest.raises(DataError, match="both groups, or none"):
        two_sample_test(first, second, first_users=np.arange(400))
    with pytest.raises(DataError, match="one user a row"):
        two_sample_test(first, second, np.arange(3), np.arange(400))
    with pytest.raises(DataError, match="users of one group: 1"):
        two_sample_test(first, second, np.arange(400), np.zeros(400))
    with pytest.raises(DataError, match="too few"):
        two_sample_test(first, second, np.zeros(400), np.arange(400) % 2)
