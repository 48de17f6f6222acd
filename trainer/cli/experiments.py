"""Verbs about many runs: table, sweep, daily, runs."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.cli.base import (
    AsJson,
    GpusOfJobs,
    Jobs,
    MaybePreset,
    Overrides,
    answer,
    app,
    job_lines,
    next_steps,
    note,
    own_command,
    preset_and_settings,
    quoted,
    refuse_jobs_of_arrays,
    resumable,
    runs_app,
    submitted,
    verb,
)
from trainer.errors import ConfigError, RunError
from trainer.runtime.progress import waiting_for

if TYPE_CHECKING:
    from trainer.experiments.costs import Machine
    from trainer.experiments.table import Request

BOTH = "sampled,full"
Minutes = Annotated[
    float,
    typer.Option(
        metavar="MINUTES", help="for the whole table: no run trains longer than fits; 0 = no limit", min=0
    ),
]
PresetOfModels = Annotated[
    list[str] | None,
    typer.Option(metavar="MODEL=PRESET|FILE", help="settings for a model other than those of its preset"),
]
Recipe = Annotated[
    str, typer.Option(metavar="DATA_SET", help="gensr paper's settings of single systems for this data set")
]


@app.command(
    "table", epilog="Example: gensr table data/mine runs/table --models popularity,sasrec,gensr --seeds 3"
)
def table_of_systems(
    folder: Annotated[str, typer.Argument(metavar="OUT", help="prepared folder")],
    out: Annotated[Path, typer.Argument(metavar="TABLE", help="folder of the table and its runs")],
    overrides: Overrides = None,
    models: Annotated[str, typer.Option(help="comma-separated; empty = every model")] = "",
    seeds: Annotated[int, typer.Option(help="runs of each trained system", min=1)] = 3,
    trials: Annotated[int, typer.Option(help="tuning runs of each trained system", min=0)] = 0,
    epochs: Annotated[float, typer.Option(help="epochs of every run; 0 = those of its preset", min=0)] = 0.0,
    max_steps: Annotated[int, typer.Option(help="steps of every run; 0 = those of its preset", min=0)] = 0,
    budget: Minutes = 0.0,
    candidates: Annotated[str, typer.Option(help="sampled, hard, full; comma-separated")] = BOTH,
    events: Annotated[int, typer.Option(help="with full: events in a fixed sample, 0 = all", min=0)] = 2000,
    preset: PresetOfModels = None,
    recipe: Recipe = "",
    jobs: Jobs = 1,
    submit: Annotated[
        bool, typer.Option("--submit", help="submit the missing runs as SLURM arrays; write no table yet")
    ] = False,
    gpus_per_node: GpusOfJobs = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print runs, epochs and times; write nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train, tune, evaluate and compare systems on one prepared folder; writes TABLE/table.html, .md, .csv
    and .json.

    The same command resumes after an interruption. A failed run is named in the table; the others continue.
    """
    from trainer.experiments.table.plan import Request, overrides_of_systems

    refuse_jobs_of_arrays(jobs, submit)
    presets, own_overrides = overrides_of_systems(_names(models), preset or [], recipe)
    request = Request(
        folder=folder,
        out=out,
        models=_names(models),
        seeds=seeds,
        trials=trials,
        epochs=epochs,
        max_steps=max_steps,
        budget=budget,
        candidates=_names(candidates),
        events=events,
        presets=presets,
        overrides=tuple(overrides or []),
        own_overrides=own_overrides,
        jobs=jobs,
    )
    machine = _machine_of_jobs(gpus_per_node) if submit else None
    if dry_run:
        _say_times(request, machine, as_json)
    elif machine is not None:
        _submit_table(request, machine, gpus_per_node, as_json)
    else:
        _make_table(request, as_json)


def _say_times(request: "Request", machine: "Machine | None", as_json: bool) -> None:
    from trainer.experiments.table import dry_run

    times = dry_run(request, machine)
    answer(times.facts(), as_json, *times.lines())


def _make_table(request: "Request", as_json: bool) -> None:
    from trainer.experiments.table import make_table
    from trainer.experiments.table.render import markdown

    with resumable():
        document = make_table(request, notify=note)
    written = f"wrote {request.out / 'table.html'}, .md, .csv and .json"
    answer(document, as_json, *markdown(document), "", written)
    if not any(row["results"] for row in document["rows"] if "about" not in row):
        raise RunError(f"no run of the table has results: {request.out / 'table.md'} says what failed")


def _machine_of_jobs(gpus_per_node: int) -> "Machine":
    """What one job of an array gets: it may run on another node than this one."""
    from trainer.experiments.costs import Machine
    from trainer.runtime.launch import num_cores

    return Machine(num_cores(), gpus_per_node)


def _submit_table(request: "Request", machine: "Machine", gpus_per_node: int, as_json: bool) -> None:
    from trainer.experiments import submit as jobs
    from trainer.experiments.table.plan import make_plan
    from trainer.experiments.table.submission import plan_submission

    plan = make_plan(request, machine)
    for line in plan.times.lines() if plan.times else ():
        note(line)
    submission = plan_submission(plan, jobs.Machines(gpus_per_node=gpus_per_node), own_command())
    ids = jobs.submit(submission)
    lines = [*submission.plan_lines, "", *job_lines(submission, ids)]
    lines.append("when all have ended, the same command without --submit writes the table")
    answer(submitted(submission, ids), as_json, *lines)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@verb("gensr sweep sweep.yaml data.dir=data/mine run.dir=runs/sweep")
def sweep(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="YAML: preset, settings, space, search (grid, random or tpe), trials, seed; or a list of "
            "settings, which needs PRESET",
        ),
    ],
    preset: MaybePreset = None,
    overrides: Overrides = None,
    evaluate: Annotated[
        str, typer.Option(help="best, all or none: runs to evaluate on the test split at the end")
    ] = "best",
    jobs: Jobs = 1,
    as_json: AsJson = False,
) -> None:
    """Train several settings on this machine, one after the other or --jobs at once, and compare them by
    validation; writes SWEEP/sweep.txt and .json.

    The same command resumes after an interruption. A failed run is named; the others are trained. On a
    cluster, use gensr submit --sweep. docs/table.md shows a file. With --jobs N, search: tpe draws a run
    before the last N - 1 have ended, so another N gives other settings; the same N always gives the same.
    """
    from trainer.experiments import local_sweep
    from trainer.experiments.sweep import lines_of

    if evaluate not in ("best", "all", "none"):
        raise ConfigError(f"--evaluate must be best, all or none, got {evaluate}")
    name, settings = preset_and_settings(preset, overrides)
    planned = local_sweep.read(file, name, settings)
    note(f"{planned.num_runs} runs in {planned.folder}; output of each: {planned.folder}/RUN.out")
    with resumable():
        document = local_sweep.run(planned, evaluate, note, jobs)
    best = planned.folder / document["runs"][0]["run"]
    after = next_steps(f"gensr report {quoted(best)}", f"gensr register {quoted(best)} NAME")
    answer(document, as_json, *lines_of(document), "", *after)


@verb("gensr daily daily.yaml")
def daily(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML; docs/continue.md has an example")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="override FILE's settings", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the commands for the waiting days, run nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take every new day of a log from raw files to the registry: prepare, cf, train starting from the
    champion, evaluate both on the new day, register, promote.

    The same command resumes after an interruption, and does nothing without a new day: it is made for cron.
    The exit code is 0 even if no new model was better.

    FILE must have logs, run, name and out; it may have settings, prepare, cf, candidates, events, margin,
    gain, min_events, launch, done_file and keep.
    """
    waiting_for("loading PyTorch and MLflow")
    from trainer.experiments.daily.plan import read
    from trainer.experiments.daily.report import commands, lines_of
    from trainer.experiments.daily.run import run
    from trainer.registry.store import uri_option

    plan = read(file, overrides or [])
    if dry_run:
        days, late = plan.waiting()
        lines = commands(plan)
        answer(
            {"days": days, "late": late, "commands": lines},
            as_json,
            *(lines or [f"no new day in {plan.settings.logs}"]),
        )
        return
    with resumable():
        document = run(plan, note)
    after = next_steps(f"gensr serve models:/{plan.settings.name}@champion{uri_option(plan.uri)}")
    answer(document, as_json, *lines_of(document["days"]), "", *after)


@runs_app.command(
    "import", epilog="Example: gensr runs import runs/mlflow.db --into http://mlflow.example.org"
)
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FROM",
            help="mlflow.db of an offline node, a tracking URI, a run folder, or a folder of run folders",
        ),
    ],
    into: Annotated[
        str,
        typer.Option(
            help="tracking URI of the target; default: the store that a run folder's run belongs to"
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Copy runs that were tracked without a server to one. Repeated, it adds only what is new."""
    from trainer.experiments.import_runs import import_runs, target_of

    done = import_runs(source, into or target_of(source), progress=lambda line: typer.echo(line, err=True))
    new = sum(run.new for run in done)
    summary = f"{len(done)} runs, {new} of them new, {sum(run.added for run in done):,} points added"
    answer({"runs": [dataclasses.asdict(run) for run in done]}, as_json, summary)


@runs_app.command(epilog="Example: gensr runs summarize runs/sweep")
def summarize(
    folder: Annotated[Path, typer.Argument(metavar="SWEEP", help="folder of a sweep's run folders")],
    as_json: AsJson = False,
) -> None:
    """Collect the runs of a sweep in one table, SWEEP/sweep.txt and .json, and under one parent run in
    MLflow."""
    from trainer.experiments.sweep import lines_of
    from trainer.experiments.sweep import summarize as run

    document = run(folder)
    answer(document, as_json, *lines_of(document))
