"""Verbs that look at runs: analyse, paper."""

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.base import AsJson, answer, app, note
from trainer.errors import ConfigError


@app.command(epilog="Example: gensr analyse mutual-information runs/gensr runs/unisar analyses/")
def analyse(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="mutual-information, gradients, space, ablations, sensitivity, transfer or separability",
        ),
    ],
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="RUN... OUT", help="run folders, then the folder to write to"),
    ],
    split: Annotated[str, typer.Option(help="valid or test, of those that ask the model")] = "test",
    events: Annotated[
        int, typer.Option(help="of each task, in a fixed sample that a model is asked about; 0 = all", min=0)
    ] = 2000,
    candidates: Annotated[
        str, typer.Option(help="of the evaluations that runs are compared by: sampled or full")
    ] = "sampled",
    metric: Annotated[str, typer.Option(help="that bars and curves show")] = "ndcg@10",
    seed: Annotated[int, typer.Option(help="of estimators and projections")] = 0,
    as_json: AsJson = False,
) -> None:
    """Look into finished runs of any model: the paper's analyses, offline.

    Writes OUT/WHAT.json with every number, OUT/WHAT*.png and .svg, and the page OUT/WHAT.html. The first RUN
    of ablations and sensitivity is what the others are compared with.
    """
    from trainer.experiments.analyses import Options
    from trainer.experiments.analyses import analyse as run

    if split not in ("valid", "test"):
        raise ConfigError(f"--split must be valid or test, got {split}")
    if candidates not in ("sampled", "full"):
        raise ConfigError(f"--candidates must be sampled or full, got {candidates}")
    if metric not in ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr"):
        raise ConfigError(f"--metric must be recall@5, recall@10, ndcg@5, ndcg@10 or mrr, got {metric}")
    *runs, out = paths
    options = Options(split=split, candidates=candidates, num_events=events, seed=seed, metric=metric)
    document = run(what, runs, out, options, note)
    answer(document, as_json, f"wrote {out / what}.html, .json and pictures")
