"""Do two groups of vectors, such as hidden states of search and recommendation, share a space? (Figure 3.)

    pca_projection, tsne_projection   both groups in one plane
    density_contours                  kernel density of each group on a common grid
    bhattacharyya_grid                ∫ √(p q) of two such densities: 1 for equal, 0 for disjoint groups
    two_sample_test                   how well a classifier tells them apart (C2ST, Lopez-Paz & Oquab 2017)

A picture of t-SNE can show gaps where there are none and no distance in it has a meaning, so a claim about
separation needs the last figure, which looks at the vectors themselves. All results can be stored
(analysis/stored.py) and depend on the seed alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trainer.errors import DataError

MAX_POINTS = 2000  # of each group in a picture; t-SNE of 4,000 points takes about half a minute
TSNE_INPUT_DIMS = 50  # PCA comes first, as van der Maaten & Hinton 2008 did
GRID_SIZE = 100
MASSES = (0.5, 0.8, 0.95)  # share of a group inside each contour
NUM_FOLDS = 5
MIN_ROWS = 20

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Projection:
    """Two groups of points in a plane."""

    first: Floats  # [n, 2]
    second: Floats  # [m, 2]
    method: str  # pca or tsne
    explained: tuple[float, ...] | None  # share of the variance along each axis; None for t-SNE
    seed: int


@dataclass(frozen=True)
class Contours:
    """Densities of two groups on one grid, each summing to 1 over its cells."""

    x: Floats  # [G] columns of the grid
    y: Floats  # [G] rows
    first: Floats  # [G, G], row y, column x
    second: Floats
    masses: tuple[float, ...]
    first_levels: tuple[float, ...]  # density at the edge of the smallest region with that mass
    second_levels: tuple[float, ...]


@dataclass(frozen=True)
class TwoSample:
    """Accuracy of a classifier that tells two groups of equal size apart. 0.5 is chance, and so is anything
    below: cross-validation errs to that side, since what a fold lacks of a group its training part has."""

    accuracy: float
    low: float  # 95 % Wilson interval
    high: float
    classifier: str  # logistic or knn
    num_rows: int  # both groups together
    num_independent: float  # rows that count in the interval: fewer where users have several


def pca_projection(first: ArrayLike, second: ArrayLike, seed: int = 0) -> Projection:
    """Both groups on the first two principal components of their union. first [n, d], second [m, d]."""
    groups = _sampled(first, second, seed)
    pca = PCA(n_components=2, svd_solver="full").fit(np.concatenate(groups))
    explained = tuple(float(share) for share in pca.explained_variance_ratio_)
    return Projection(pca.transform(groups[0]), pca.transform(groups[1]), "pca", explained, seed)


def tsne_projection(
    first: ArrayLike, second: ArrayLike, perplexity: float = 30.0, seed: int = 0
) -> Projection:
    """Both groups by t-SNE, started from PCA. With few points the perplexity falls to a quarter of them."""
    groups = _sampled(first, second, seed)
    both = np.concatenate(groups)
    if both.shape[1] > TSNE_INPUT_DIMS and len(both) > TSNE_INPUT_DIMS:
        both = PCA(n_components=TSNE_INPUT_DIMS, svd_solver="full").fit_transform(both)
    tsne = TSNE(perplexity=min(perplexity, len(both) / 4), init="pca", random_state=seed)
    points = tsne.fit_transform(both).astype(np.float64)
    return Projection(points[: len(groups[0])], points[len(groups[0]) :], "tsne", None, seed)


def density_contours(projection: Projection, masses: Sequence[float] = MASSES) -> Contours:
    """Gaussian kernel densities (Scott's bandwidth, for each group its own) on a grid around all points.

    Raises DataError for points on a line, which have no density in the plane.
    """
    groups = (projection.first, projection.second)
    low, high = (end(np.concatenate(groups), axis=0) for end in (np.min, np.max))
    try:
        kernels = [stats.gaussian_kde(points.T) for points in groups]
    except np.linalg.LinAlgError as error:
        raise DataError("the points of a group lie on a line: they have no density in the plane") from error
    deviations = [np.sqrt(np.diag(kernel.covariance)) for kernel in kernels]
    # about where the kernels of the outermost points end; those of few points are wide
    margin = np.maximum(0.15 * (high - low), 3 * np.max(deviations, axis=0))
    x, y = (np.linspace(low[i] - margin[i], high[i] + margin[i], GRID_SIZE) for i in (0, 1))
    grid = np.stack([axis.ravel() for axis in np.meshgrid(x, y)])
    densities = [kernel(grid).reshape(GRID_SIZE, GRID_SIZE) for kernel in kernels]
    first, second = (density / density.sum() for density in densities)
    levels = [tuple(_level(density, mass) for mass in masses) for density in (first, second)]
    return Contours(x, y, first, second, tuple(masses), *levels)


def bhattacharyya_grid(contours: Contours) -> float:
    """Bhattacharyya coefficient of the two densities on the grid, 0 to 1."""
    return min(1.0, float(np.sqrt(contours.first * contours.second).sum()))


def two_sample_test(
    first: ArrayLike,
    second: ArrayLike,
    first_users: ArrayLike | None = None,
    second_users: ArrayLike | None = None,
    classifier: str = "logistic",
    seed: int = 0,
) -> TwoSample:
    """Cross-validated accuracy of telling first [n, d] from second [m, d]; the larger group is thinned first.

    classifier: "logistic" finds a shift along a line, "knn" (k = √rows) also differences of shape. With
    users, [n] and [m], all rows of a user lie in one fold: a classifier that recognises users would say
    nothing about the groups. The interval then counts (Σ n_u)² / Σ n_u² rows, n_u those of user u, which is
    what remains if the rows of a user are all alike (Kish 1965).
    """
    groups = _checked(first, second)
    users = _users(groups, first_users, second_users)
    size = min(len(rows) for rows in groups)
    generator = np.random.default_rng(seed)
    kept = [generator.permutation(len(rows))[:size] for rows in groups]
    x = np.concatenate([rows[places] for rows, places in zip(groups, kept, strict=True)])
    owners = np.concatenate([owner[places] for owner, places in zip(users, kept, strict=True)])
    y = np.repeat([0, 1], size)
    right = np.zeros(len(y), dtype=bool)
    folds = StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    for train, test in folds.split(x, y, owners):
        model = make_pipeline(StandardScaler(), _classifier(classifier, len(train)))
        right[test] = model.fit(x[train], y[train]).predict(x[test]) == y[test]
    counts = np.unique(owners, return_counts=True)[1].astype(np.float64)
    independent = float(counts.sum() ** 2 / (counts**2).sum())
    low, high = _wilson(float(right.mean()), independent)
    return TwoSample(float(right.mean()), low, high, classifier, len(y), independent)


def _classifier(name: str, num_rows: int) -> LogisticRegression | KNeighborsClassifier:
    if name == "logistic":
        return LogisticRegression(max_iter=1000)
    if name == "knn":
        return KNeighborsClassifier(n_neighbors=max(1, int(num_rows**0.5)))
    raise DataError(f"there is no classifier {name}: logistic or knn")


def _users(
    groups: tuple[Floats, Floats], first: ArrayLike | None, second: ArrayLike | None
) -> list[NDArray[np.int64]]:
    """Numbers of the users of both groups; without users every row is one of its own."""
    if (first is None) != (second is None):
        raise DataError("users of one group alone: give those of both groups, or none")
    if first is None or second is None:
        return [np.arange(len(groups[0])), len(groups[0]) + np.arange(len(groups[1]))]
    names = [np.asarray(first), np.asarray(second)]
    if [len(users) for users in names] != [len(rows) for rows in groups]:
        raise DataError("users and rows differ in number: give one user a row")
    place = np.unique(np.concatenate(names), return_inverse=True)[1]
    if place.max() + 1 < MIN_ROWS:
        raise DataError(f"{place.max() + 1} users are too few to tell groups apart: at least {MIN_ROWS}")
    users = [place[: len(names[0])], place[len(names[0]) :]]
    if (fewest := min(len(np.unique(of_group)) for of_group in users)) < NUM_FOLDS:
        raise DataError(f"users of one group: {fewest}; to tell it from the other takes at least {NUM_FOLDS}")
    return users


def _wilson(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share of `count` independent trials; not empty at 0 and 1 (Wilson 1927)."""
    z = float(stats.norm.ppf(0.975))
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _level(density: Floats, mass: float) -> float:
    """The density at which the densest cells hold `mass` together."""
    cells = np.sort(density.ravel())[::-1]
    return float(cells[min(len(cells) - 1, int(np.searchsorted(np.cumsum(cells), mass)))])


def _sampled(first: ArrayLike, second: ArrayLike, seed: int) -> tuple[Floats, Floats]:
    """At most MAX_POINTS rows of each group, in their order."""
    generator = np.random.default_rng(seed)
    one, other = (
        rows[np.sort(generator.permutation(len(rows))[:MAX_POINTS])] for rows in _checked(first, second)
    )
    return one, other


def _checked(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    """Both groups as float64. Raises DataError when they cannot be compared."""
    groups = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if any(rows.ndim != 2 for rows in groups) or groups[0].shape[1] != groups[1].shape[1]:
        raise DataError(f"groups of shapes {groups[0].shape} and {groups[1].shape}: both must be [rows, d]")
    if min(len(rows) for rows in groups) < MIN_ROWS:
        raise DataError(
            f"groups of {len(groups[0])} and {len(groups[1])} rows: each needs at least {MIN_ROWS}"
        )
    if not all(np.isfinite(rows).all() for rows in groups):
        raise DataError("a group holds values that are not finite: drop those rows")
    return groups
