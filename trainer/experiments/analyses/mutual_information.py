"""Table 1: how much does a model's output say about its input?  I(X; Y) in nats.

X is what the model knows of an event and an item (Ranker.representations: "input"), by its first principal
components; the rows are events with the clicked item, and as many with a stored negative. Y is one of

    answer   Yes or No, drawn with the model's P(click). Its information about everything the model knows is
             H(E[p]) − E[H(p)] (`plug_in`), at most log 2; the estimators are lower bounds of it
    score    the log-odds. It is a function of X: the true value has no limit, and what an estimator finds
             says as much about the estimator and the number of samples as about the model
    click    what the score says about the click itself, at most log 2
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from trainer.analysis.drawing import Bar, bars_with_intervals, write_figure
from trainer.analysis.mutual_information import MIN_SAMPLES, Estimate, info_nce, mine
from trainer.analysis.mutual_information_knn import ksg, ross
from trainer.analysis.pages import Picture, Section, Table, Text
from trainer.analysis.vectors import Vectors, load_vectors
from trainer.evaluation.bootstrap import cluster_means, interval_ends
from trainer.experiments.analyses.options import EVENTS, TASK_TITLES, Options, name_of, need_runs, titled
from trainer.runtime.progress import Notify

WHAT = "mutual-information"
CRITIC_DIMS, NEIGHBOUR_DIMS = 16, 8  # principal components of X that a critic reads, that distances are of
PUBLISHED = {  # Table 1 of the paper, "Amazon" and "KuaiSAR"; it names no unit
    "kindle": {"unisar": {"src": 0.9003, "rec": 0.8739}, "gensr": {"src": 0.9378, "rec": 0.9217}},
    "kuaisar": {"unisar": {"src": 0.8514, "rec": 0.8475}, "gensr": {"src": 0.9251, "rec": 0.9168}},
}
DATA_TITLES = {"kindle": "Amazon Kindle Store", "kuaisar": "KuaiSAR"}
ESTIMATORS = {
    "plug_in": "exact",
    "mine": "MINE",
    "info_nce": "InfoNCE",
    "ksg": "neighbours (KSG)",
    "ross": "neighbours (Ross)",
}
TITLES = {"answer": "answer (Yes or No)", "score": "score (log-odds)", "click": "score and click"}


def measure(runs: Sequence[Path], options: Options, notify: Notify) -> dict[str, Any]:
    need_runs(runs, WHAT)
    found = []
    for run in runs:
        notify(f"{run}: vectors of {EVENTS[options.split]}")
        vectors = load_vectors(run, options.split, options.num_events, MIN_SAMPLES)
        tasks = {}
        for task in vectors.tasks:
            notify(f"{run}: {task}, estimators")
            tasks[task] = _task(vectors.of(task), options.seed)
        found.append({**name_of(run), "recorded": vectors.recorded, "tasks": tasks})
    dims = {"critics": CRITIC_DIMS, "neighbours": NEIGHBOUR_DIMS}
    return {"unit": "nats", "dims": dims, "published": PUBLISHED, "runs": found}


def _task(vectors: Vectors, seed: int) -> dict[str, Any]:
    users = vectors.user
    wide, narrow = (_components(vectors.input, dims) for dims in (CRITIC_DIMS, NEIGHBOUR_DIMS))
    score = torch.from_numpy(vectors.score)
    drawn = np.random.default_rng(seed).random(len(users)) < vectors.probability
    answer, click = torch.from_numpy(drawn.astype(np.int64)), torch.from_numpy(vectors.label)
    estimates: dict[str, list[Estimate]] = {
        "answer": [answer_information(vectors.probability, users, seed)],
        "score": [mine(wide, score, users, seed=seed), info_nce(wide, score, users, seed=seed)],
        "click": [],
    }
    estimates["score"].append(ksg(narrow, score, users, seed=seed))
    if 1 < drawn.sum() < len(drawn) - 1:  # else the answers are all alike, and say nothing
        estimates["answer"] += [
            mine(wide, answer, users, seed=seed),
            info_nce(wide, answer, users, seed=seed),
        ]
        estimates["answer"].append(ross(narrow, answer, users, seed=seed))
    if 0 < vectors.label.sum() < len(users):
        estimates["click"].append(ross(score, click, users, seed=seed))
    return {
        "num_rows": len(users),
        "num_users": len(np.unique(users)),
        **{name: [vars(estimate) for estimate in of_name] for name, of_name in estimates.items()},
    }


def answer_information(probability: NDArray[Any], users: NDArray[Any], seed: int = 0) -> Estimate:
    """I(X; answer) = H(E[p]) − E[H(p)] over the rows [n]: exact for a given sample, whatever X is, with a
    bootstrap interval over users."""
    p = probability.astype(np.float64)
    terms = np.column_stack([p, _entropy(p)])

    def value(means: NDArray[Any]) -> NDArray[Any]:
        return _entropy(means[..., 0]) - means[..., 1]

    found, resampled = value(terms.mean(0)), value(cluster_means(terms, users, seed=seed))
    low, high = interval_ends(found, resampled, len(np.unique(users)), (0.0, np.log(2)))
    return Estimate(float(found), float(low), float(high), "plug_in", len(p), float(np.log(2)))


def _entropy(p: NDArray[Any]) -> NDArray[Any]:
    """Of Yes and No, in nats."""
    inside = np.clip(p, 1e-12, 1 - 1e-12)
    entropy: NDArray[Any] = -inside * np.log(inside) - (1 - inside) * np.log1p(-inside)
    return entropy


def _components(vectors: NDArray[Any], dims: int) -> torch.Tensor:
    """The first principal components of standardised columns, [n, ≤ dims]: a map of X can only lower
    I(X; Y)."""
    scale = vectors.std(0)
    columns = (vectors - vectors.mean(0))[:, scale > 0] / scale[scale > 0]
    if columns.shape[1] > dims:
        columns = PCA(n_components=dims, random_state=0).fit_transform(columns)
    return torch.from_numpy(np.ascontiguousarray(columns, dtype=np.float32))


# ---- page --------------------------------------------------------------------------------------------------


def section(document: dict[str, Any], folder: Path) -> Section:
    names = titled(document["runs"])
    panels = {
        "I(input; answer), exact": ("answer", "plug_in"),
        "I(input; answer), MINE": ("answer", "mine"),
        "I(score; click), neighbours": ("click", "ross"),
    }
    metrics: dict[str, list[Bar]] = {}
    rows = []
    for name, run in zip(names, document["runs"], strict=True):
        for task in (task for task in TASK_TITLES if task in run["tasks"]):
            of_task = run["tasks"][task]
            for title, (kind, estimator) in panels.items():
                for e in of_task[kind]:
                    if e["estimator"] == estimator:
                        bar = Bar(name, e["value"], e["low"], e["high"], TASK_TITLES[task].lower())
                        metrics.setdefault(title, []).append(bar)
            for kind, title in TITLES.items():
                rows += [[name, TASK_TITLES[task], title, *_cells(e)] for e in of_task[kind]]
    picture = write_figure(bars_with_intervals(metrics), folder / WHAT)[1]
    head = ["model", "task", "Y", "estimator", "nats", "95 % interval", "at most", "restarts"]
    recorded = {run["title"]: run["recorded"] for run in document["runs"] if run["recorded"]}
    notes = [
        Text(f"{title} shows no input of its own; the input of its layer {layer} stands for it.", True)
        for title, layer in recorded.items()
    ]
    published = [
        [DATA_TITLES[data], title, f"{values['src']:.4f}", f"{values['rec']:.4f}"]
        for data, models in document["published"].items()
        for title, values in (("UniSAR", models["unisar"]), ("GenSR", models["gensr"]))
    ]
    return Section(
        "Mutual information of input and output (Table 1)",
        [
            Text(
                "How much the output says about what the model knows of an event and an item. The rows are "
                f"{EVENTS[document['split']]} with the clicked item and as many with a stored negative. "
                "Units are nats; Yes and No hold at most log 2 = 0.693 of them, which is 1 bit."
            ),
            Picture(picture, "Bars of mutual information for each model and task, with intervals."),
            Table(head, rows),
            Text(
                "MINE and InfoNCE are lower bounds from a network, on held-out users. Spread of the restarts "
                "shows how far to trust one. A bound near its limit says only that the information is at "
                "least about that. Neighbours (KSG, Ross) need no network and fall short in many dimensions. "
                "The score is a function of the input, so its row has no true value to approach."
            ),
            *notes,
            Table(["data", "model", "search", "recommendation"], published, "Published, Table 1:"),
            Text(
                "The paper names no unit, no output and no sample size for its numbers, so they can be "
                "compared in their order only. A higher value does not mean a better ranking.",
                warning=True,
            ),
        ],
    )


def _cells(e: dict[str, Any]) -> list[str]:
    ceiling = "" if e["ceiling"] is None else f"{e['ceiling']:.2f}"
    restarts = ", ".join(f"{value:.3f}" for value in e["restarts"])
    return [
        ESTIMATORS[e["estimator"]],
        f"{e['value']:.3f}",
        f"{e['low']:.3f} to {e['high']:.3f}",
        ceiling,
        restarts,
    ]
