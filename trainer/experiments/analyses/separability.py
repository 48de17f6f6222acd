"""Lemma 5.1 of the appendix as an experiment (trainer/analysis/separability.py). It reads no run."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.analysis.drawing import Curve, curves_with_intervals, write_figure
from trainer.analysis.pages import Picture, Section, Table, Text
from trainer.analysis.separability import separability
from trainer.experiments.analyses.options import Options
from trainer.runtime.progress import Notify

WHAT = "separability"
WORLDS = {"gaussian": "Gaussian classes, as in the lemma", "skewed": "skewed classes, which it excludes"}


def measure(runs: Sequence[Path], options: Options, notify: Notify) -> dict[str, Any]:
    notify("both estimates on samples of six sizes")
    return {"rows": [asdict(row) for row in separability(seed=options.seed)]}


def section(document: dict[str, Any], folder: Path) -> Section:
    rows = document["rows"]
    figures = {}
    for kind, title in (("error", "relative error of the estimate"), ("information", "nats about the label")):
        metrics = {
            f"{title}\n{text}": [_curve(rows, world, paradigm, kind) for paradigm in _paradigms(rows)]
            for world, text in WORLDS.items()
        }
        figure = curves_with_intervals(metrics, "samples", log_x=True)
        figures[kind] = write_figure(figure, folder / f"{WHAT}-{kind}")[1]
    table = [
        [row["world"], f"{row['num_samples']:,}", row["paradigm"], *(f"{row[key]:.3f}" for key in
         ("error", "information", "limit"))]
        for row in rows
    ]  # fmt: skip
    return Section(
        "Lemma 5.1: generative and discriminative estimates",
        [
            Text(
                "Both paradigms estimate the parameter of one logistic model: the generative one fits "
                "P(x | y) (discriminant analysis), the discriminative one fits P(y | x) (logistic "
                "regression). Means of 20 repeats with 95 % intervals."
            ),
            Picture(figures["error"], "Error of both estimates against the number of samples, two worlds."),
            Picture(figures["information"], "Information of both predictions against the samples."),
            Text(
                "Where the classes are Gaussian, the lemma's order holds: the generative estimate is better, "
                "most on few samples. Where they are not, the order turns with enough samples."
            ),
            Text(
                "This says nothing about GenSR itself: a model that answers Yes or No is trained on "
                "P(y | x), which in these terms is discriminative (footnote 6 of the paper).",
                warning=True,
            ),
            Table(["world", "samples", "paradigm", "relative error", "nats", "limit"], table),
        ],
    )


def _paradigms(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["paradigm"] for row in rows))


def _curve(rows: Sequence[dict[str, Any]], world: str, paradigm: str, kind: str) -> Curve:
    mine = [row for row in rows if row["world"] == world and row["paradigm"] == paradigm]
    y, low, high = ([row[key] for row in mine] for key in (kind, f"{kind}_low", f"{kind}_high"))
    return Curve(paradigm, [row["num_samples"] for row in mine], y, low, high)
