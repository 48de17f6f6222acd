"""Figure 3: do search and recommendation share a space?

(a) the input's distributions: what the model reads of the history, [f_c; f_s] of a GenSR, by t-SNE, with
    kernel densities
(b), (c) hidden states of each model before its score, by PCA

Beside each picture stands a figure: the accuracy of a classifier that tells the two tasks apart, .5 where
they share one space, 1 where they are apart, and the overlap of the densities.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from trainer.analysis.drawing import kde_contours, scatter_two_groups, write_figure
from trainer.analysis.pages import Part, Picture, Section, Table, Text
from trainer.analysis.space import (
    Contours,
    Projection,
    bhattacharyya_grid,
    density_contours,
    pca_projection,
    tsne_projection,
    two_sample_test,
)
from trainer.analysis.stored import load_arrays, save_arrays
from trainer.analysis.vectors import Vectors, load_vectors
from trainer.errors import DataError, RunError
from trainer.experiments.analyses.options import EVENTS, Options, name_of, need_runs, titled
from trainer.runtime.progress import Notify

WHAT = "space"
NAMES = ("search", "recommendation")


def measure(runs: Sequence[Path], options: Options, notify: Notify) -> dict[str, Any]:
    """Points of the pictures come under "arrays", for files beside the document."""
    need_runs(runs, WHAT)
    found, arrays = [], {}
    for number, run in enumerate(runs):
        notify(f"{run}: vectors of {EVENTS[options.split]}")
        vectors = load_vectors(run, options.split, options.num_events)
        if set(vectors.tasks) != {"rec", "src"}:
            raise RunError(f"{run} serves one task: there are not two groups to compare")
        figures: dict[str, Any] = {}
        for kind in ("history", "hidden"):
            notify(f"{run}: {kind}")
            figures[kind] = _compare(vectors, kind, options.seed)
            for name, array in figures[kind].pop("arrays").items():
                arrays[f"{number}-{kind}-{name}"] = array
        found.append({**name_of(run), "recorded": vectors.recorded, **figures})
    return {"runs": found, "arrays": arrays}


def _compare(vectors: Vectors, kind: str, seed: int) -> dict[str, Any]:
    groups = [vectors.of(task, label=1) for task in ("src", "rec")]
    first, second = (getattr(group, kind) for group in groups)
    users, others = (group.user for group in groups)
    tests = [two_sample_test(first, second, users, others, name, seed) for name in ("logistic", "knn")]
    projected = (tsne_projection if kind == "history" else pca_projection)(first, second, seed=seed)
    arrays: dict[str, Any] = {"points": projected}
    overlap = None
    try:
        arrays["density"] = density_contours(projected)
        overlap = bhattacharyya_grid(arrays["density"])
    except DataError:  # points on a line
        pass
    spread = [float(np.linalg.norm(group - group.mean(0), axis=1).mean()) for group in (first, second)]
    return {
        "num_points": [len(first), len(second)],
        "method": projected.method,
        "overlap": overlap,
        "tests": [asdict(test) for test in tests],
        "spread": spread,
        "arrays": arrays,
    }


def save(arrays: dict[str, Any], folder: Path) -> None:
    for name, array in arrays.items():
        save_arrays(folder / f"{WHAT}-{name}.npz", array)


# ---- page --------------------------------------------------------------------------------------------------


def section(document: dict[str, Any], folder: Path) -> Section:
    names = titled(document["runs"])
    parts: list[Part] = [
        Text(
            f"Points are {EVENTS[document['split']]} with their clicked item. A classifier that tells the "
            "tasks apart is right in half of the cases where both share one space. Its interval counts "
            "users, not events, and all events of a user lie in one fold."
        )
    ]
    rows = []
    for name, run in zip(names, document["runs"], strict=True):
        for kind in ("history", "hidden"):
            found = run[kind]
            overlap = "–" if found["overlap"] is None else f"{found['overlap']:.3f}"
            cells = [f"{t['accuracy']:.3f} [{t['low']:.3f}, {t['high']:.3f}]" for t in found["tests"]]
            where = {"history": "history (a)", "hidden": "hidden (b, c)"}[kind]
            rows.append([name, where, *cells, overlap, " + ".join(map(str, found["num_points"]))])
    head = ["model", "vectors", "logistic accuracy", "neighbour accuracy", "overlap in the picture"]
    parts.append(Table([*head, "points"], rows))
    densities, scatters = {}, {}
    for number, name in enumerate(names):
        density = folder / f"{WHAT}-{number}-history-density.npz"
        if density.is_file():
            densities[f"{name}: what is read of the history"] = load_arrays(density, Contours)
        points = folder / f"{WHAT}-{number}-hidden-points.npz"
        scatters[f"{name}: hidden states"] = load_arrays(points, Projection)
    if densities:
        path = write_figure(kde_contours(densities, NAMES), folder / f"{WHAT}-history")[1]
        parts.append(
            Picture(
                path,
                "Contours of the densities of search and recommendation after t-SNE, a panel a model.",
                "Figure 3 (a). t-SNE keeps neighbours, not distances: gaps may be its own.",
            )
        )
    path = write_figure(scatter_two_groups(scatters, NAMES), folder / f"{WHAT}-hidden")[1]
    parts.append(
        Picture(
            path,
            "Hidden states of search and recommendation on two principal components, a panel a model.",
            "Figure 3 (b), (c).",
        )
    )
    parts.append(
        Text(
            "A prompt that differs between the tasks makes them separable for a trivial reason: the query "
            "and the wording reach the hidden states. Separation is therefore no proof that tasks disturb "
            "each other less; the gradients say more about that.",
            warning=True,
        )
    )
    return Section("The space of both tasks (Figure 3)", parts)
