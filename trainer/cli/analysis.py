"""Verbs that analyse runs: analyse, paper."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.cli.base import (
    AsJson,
    GpusOfJobs,
    Jobs,
    Overrides,
    answer,
    app,
    job_lines,
    note,
    own_command,
    refuse_jobs_of_arrays,
    resumable,
)
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.experiments.paper import PaperRequest


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
        list[Path], typer.Argument(metavar="RUN... OUT", help="run folders, then the folder to write to")
    ],
    split: Annotated[str, typer.Option(help="valid or test, for analyses that run the model")] = "test",
    events: Annotated[
        int, typer.Option(help="events of each task, in a fixed sample, to run the model on; 0 = all", min=0)
    ] = 2000,
    candidates: Annotated[
        str, typer.Option(help="evaluations to compare runs by: sampled, hard or full")
    ] = "sampled",
    metric: Annotated[str, typer.Option(help="metric of bars and curves")] = "ndcg@10",
    seed: Annotated[int, typer.Option(help="seed of estimators and projections")] = 0,
    as_json: AsJson = False,
) -> None:
    """Analyse finished runs of any model: the paper's analyses, offline.

    Writes OUT/WHAT.json with every number, OUT/WHAT*.png and .svg, and the page OUT/WHAT.html. In ablations
    and sensitivity, the others are compared with the first RUN.
    """
    from trainer.evaluation.summary import check_candidates, check_split
    from trainer.experiments.analyses import Options
    from trainer.experiments.analyses import analyse as run
    from trainer.runs.run_folder import RunFolder

    check_split(split)
    check_candidates(candidates)
    if metric not in ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr"):
        raise ConfigError(f"--metric must be recall@5, recall@10, ndcg@5, ndcg@10 or mrr, got {metric}")
    *runs, out = paths
    if RunFolder(out).config.is_file():
        raise ConfigError(f"{out} is a run folder. After the runs, name the folder to write to")
    options = Options(split=split, candidates=candidates, num_events=events, seed=seed, metric=metric)
    document = run(what, runs, out, options, note)
    answer(document, as_json, f"wrote {out / what}.html, .json and pictures")


@app.command(epilog="Example: gensr paper demo --out runs/paper --dry-run")
def paper(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="demo, scientific, kindle, kuaisar or kuaisar-small")
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder for data, runs, analyses and report.html")
    ] = None,
    raw: Annotated[
        Path | None, typer.Option(metavar="RAW", help="existing folder of raw files; else DIR/raw")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="OUT", help="existing prepared folder; else DIR/data")
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLE", help="folder of a finished gensr table: only GenSR's variants are trained"
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="minutes, or paper: everything; empty: as in the data set's recipe")
    ] = "",
    jobs: Jobs = 1,
    submit: Annotated[
        bool, typer.Option("--submit", help="submit the missing runs as SLURM arrays; make no page yet")
    ] = False,
    gpus_per_node: GpusOfJobs = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print runs, hours and GB; write nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """The paper's whole evaluation: data, every run, Tables 1 to 3, Figures 3 to 5, in DIR/report.html.

    The same command continues after an interruption. A smaller budget takes fewer seeds, systems, variants
    and epochs, and the report says what that costs in reliability.
    """
    from trainer.experiments.paper import FinishedTable, PaperRequest, make_paper
    from trainer.experiments.paper import dry_run as estimate

    if out is None:
        raise ConfigError("--out is missing: the folder for data, runs and the report")
    refuse_jobs_of_arrays(jobs, submit)
    finished = FinishedTable(table) if table else None
    request = PaperRequest(name, out, raw, data, budget, tuple(overrides or []), finished, jobs)
    if dry_run:
        found = estimate(request)
        answer({key: value for key, value in found.items() if key != "lines"}, as_json, *found["lines"])
        return
    if submit:
        _submit_paper(request, gpus_per_node, as_json)
        return
    with resumable():
        page = make_paper(request, notify=note)
    answer({"page": str(page)}, as_json, f"wrote {page}")


def _submit_paper(request: "PaperRequest", gpus_per_node: int, as_json: bool) -> None:
    from trainer.experiments import submit as jobs
    from trainer.experiments.paper.run import submit_paper

    ids: list[str] = []
    lines: list[str] = []
    for submission in submit_paper(request, gpus_per_node, own_command(), note):
        made = jobs.submit(submission)
        ids += made
        lines += job_lines(submission, made)
    lines.append("when all have ended, the same command without --submit makes analyses and report")
    answer({"job_ids": ids}, as_json, *lines)
