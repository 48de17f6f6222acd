"""Verbs about runs: train, submit, evaluate, report, compare, table, runs."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.cli import completion
from trainer.cli.base import (
    RANK,
    AsJson,
    Jobs,
    MaybePreset,
    Overrides,
    Preset,
    Retriever,
    answer,
    app,
    fitting,
    job_lines,
    next_steps,
    note,
    own_command,
    preset_and_settings,
    quoted,
    refuse_jobs_of_arrays,
    resumable,
    runs_app,
    say,
    stage_lines,
    verb,
)
from trainer.errors import ConfigError, RunError
from trainer.runtime.progress import waiting_for

if TYPE_CHECKING:
    from trainer.experiments.costs import Machine
    from trainer.experiments.table import Request


@verb("gensr train demo data.dir=data/demo run.dir=runs/mine optim.lr=3e-4")
def train(
    preset: Preset,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(help="never, or auto: resume from the newest checkpoint in run.dir, if there is one"),
    ] = "never",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="check everything, print batch arithmetic, memory and time, train nothing"
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train. On several processes: accelerate launch --config_file ds_configs/… -m trainer train …"""
    from trainer.runs.launch_config import load_launch_config

    if resume not in ("never", "auto"):
        raise ConfigError(f"--resume must be never or auto, got {resume}")
    waiting_for("loading PyTorch")
    from trainer.runtime.launch import read_launch

    config = load_launch_config(preset, overrides or [], read_launch().world_size, resume == "auto")
    if dry_run:
        from trainer.training.plan import NAME_WIDTH
        from trainer.training.plan import dry_run as check

        plan = check(config, preset)
        answer(plan.facts, as_json, *fitting(plan.lines, NAME_WIDTH))
        return
    waiting_for("starting")
    from trainer.training.loop import train as run

    result = run(config, resume="auto" if resume == "auto" else "never")
    if as_json:
        answer(dataclasses.asdict(result), as_json)
    if result.status == "already_finished":
        note(
            f"{result.run_dir}: already finished at step {result.step:,}, nothing was trained. Train on with "
            "run.max_steps=N run.accept_changes=run.max_steps, or choose another run.dir."
        )
    elif result.status == "finished" and not result.step:  # nothing else was said
        note(
            f"{result.run_dir}: ready in {result.train_s:.0f} s, without a step. Next: gensr evaluate "
            f"{quoted(result.run_dir)} --split test"
        )
    if result.exit_code:
        raise typer.Exit(result.exit_code)


@app.command(
    epilog="Example: gensr submit kuaisar_flan_t5_base --nodes 2 --gpus-per-node 8 data.dir=OUT run.dir=RUN",
    context_settings={"ignore_unknown_options": True},
)
def submit(
    preset: Preset,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE | --SBATCH-OPTION=VALUE",
            help="settings, and options of sbatch: --account=A --time=12:00:00",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(help="nodes", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs per node; 0 trains on CPU", min=0)] = 1,
    processes_per_node: Annotated[int, typer.Option(help="0 = one per GPU (one on CPU)", min=0)] = 0,
    deepspeed: Annotated[str, typer.Option(help="a file of ds_configs/, or a path")] = "zero2.json",
    sweep: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON list of settings: an array of runs in run.dir, their evaluation and a table"
        ),
    ] = None,
    parallel: Annotated[int, typer.Option(help="runs of a sweep at once; 0 = all", min=0)] = 0,
    show: Annotated[bool, typer.Option("--print", help="print the script, write and submit nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a training run for these nodes, write its script into the run folder and submit it to SLURM."""
    import shlex

    from trainer.experiments import submit as jobs
    from trainer.experiments.sweep import read_sweep

    options, settings = jobs.split_words(words or [])
    machines = jobs.Machines(nodes, gpus_per_node, processes_per_node, deepspeed)
    command = own_command()
    if sweep is None:
        submission = jobs.plan_run(preset, settings, machines, options, command)
    else:
        submission = jobs.plan_sweep(
            preset, settings, read_sweep(sweep), machines, options, command, parallel
        )
    ids = [] if show else jobs.submit(submission)
    paths = [str(job.path) for job in submission.jobs]
    scripts = (
        {"scripts": {str(job.path): job.text for job in submission.jobs}} if show else {"scripts": paths}
    )
    if show:
        lines = [
            line
            for job in submission.jobs
            for line in (f"# ---- {job.path}: {shlex.join(job.command(['JOB', 'JOB']))}", job.text)
        ]
    else:
        lines = [
            *submission.plan_lines,
            "",
            *job_lines(ids, (job.path for job in submission.jobs)),
        ]
    answer({"job_ids": ids, "runs": [str(path) for path in submission.run_dirs], **scripts}, as_json, *lines)


@verb("gensr evaluate runs/mine --split test")
def evaluate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    split: Annotated[str, typer.Option(help="valid or test", autocompletion=completion.splits)] = "test",
    baselines: Annotated[
        bool, typer.Option(help="rank the same candidates with popularity, LightGCN and BM25")
    ] = True,
    candidates: Annotated[
        str,
        typer.Option(
            help="sampled: the stored ones; hard: the mined ones, if the folder has them; "
            "full: the whole catalogue",
            autocompletion=completion.candidates,
        ),
    ] = "sampled",
    events: Annotated[int, typer.Option(help="with full: events in a fixed sample, 0 = all", min=0)] = 2000,
    retriever: Retriever = None,
    as_json: AsJson = False,
) -> None:
    """Rank the stored candidates of every event; writes RUN/evaluation-SPLIT.json and .parquet.

    With --candidates hard: among mined negatives (gensr prepare … hard_negatives=99); writes
    RUN/evaluation-SPLIT-hard.json and .parquet. With --candidates full: retrieve from the whole catalogue,
    then rank; writes RUN/evaluation-SPLIT-full.json and .parquet.
    """
    from trainer.evaluation.summary import check_candidates

    check_candidates(candidates, retriever)
    waiting_for("loading PyTorch and the model")
    from trainer.evaluation.evaluated_weights import warnings_of
    from trainer.evaluation.summary import evaluation_name, full_lines, protocol_line, rows_of, table
    from trainer.registry.model_card import metrics_of
    from trainer.runs.run_folder import RunFolder
    from trainer.tracking.tracker import log_evaluation

    progress = stage_lines()
    if candidates == "full":
        from trainer.evaluation.full import evaluate_full

        document = evaluate_full(
            run_dir,
            split,
            events,
            baselines,
            progress=lambda done, total: progress("rank", done, total),
            notify=note,
            retriever=retriever,
        )
    else:
        from trainer.evaluation.sampled import evaluate_run

        document = evaluate_run(
            run_dir,
            split,
            with_baselines=baselines,
            progress=lambda done, total: progress("score", done, total),
            candidates=candidates,
        )
    name = evaluation_name(split, candidates)
    path = RunFolder(run_dir).evaluation(name)
    lines = [
        *table(rows_of(document)),
        *(full_lines(document) if candidates == "full" else []),
        protocol_line(document),
    ]
    if RANK == 0:
        log_evaluation(run_dir, name, metrics_of(document, name), lines)
    for warning in warnings_of(run_dir, name, document["protocol"]):
        note(warning)
    place = quoted(run_dir)
    after = next_steps(
        f"gensr report {place}", f"gensr register {place} NAME", f"gensr compare {place} OTHER_RUN"
    )
    wrote = f"wrote {path} and {path.with_suffix('.parquet').name}"
    answer(document, as_json, *fitting(lines, 4), wrote, *after)


@verb("gensr report runs/mine")
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    events: Annotated[
        int,
        typer.Option(
            help="events of each task for calibration and examples, which run the model; 0 = none", min=0
        ),
    ] = 200,
) -> None:
    """Write RUN/report/report.html, one page that needs no network, with its pictures as PNG and SVG, and
    print the results of the run."""
    waiting_for("loading PyTorch and the model")
    from trainer.analysis.report import write_report
    from trainer.evaluation.evaluated_weights import warnings_of
    from trainer.evaluation.summary import evaluation_name, protocol_line, read_evaluation, rows_of, table
    from trainer.runs.run_folder import RunFolder

    say(f"wrote {write_report(run_dir, events)} and pictures next to it")
    for split in ("valid", "test"):
        for candidates in ("sampled", "hard"):
            name = evaluation_name(split, candidates)
            if RunFolder(run_dir).evaluation(name).is_file():
                document = read_evaluation(run_dir, split, candidates)
                lines = [protocol_line(document), *warnings_of(run_dir, name, document["protocol"])]
                say("", f"{split} split", *table(rows_of(document)), *fitting(lines, 2))
    say("", *next_steps(f"gensr register {quoted(run_dir)} NAME", f"gensr ui {quoted(run_dir)}"))


@verb("gensr compare runs/a runs/b")
def compare(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="evaluated run folders")],
    split: Annotated[str, typer.Option(help="valid or test", autocompletion=completion.splits)] = "test",
    candidates: Annotated[
        str,
        typer.Option(help="which evaluation: sampled, hard or full", autocompletion=completion.candidates),
    ] = "sampled",
    segments: Annotated[
        bool, typer.Option("--segments", help="also NDCG@10 by history, popularity, query and time of day")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the results of runs side by side, with their difference from the first run, event by event, and
    the settings that differ. Runs that did not rank the same candidates are refused."""
    from trainer.evaluation.compare import compare as run
    from trainer.evaluation.compare import compare_lines

    comparison = run(run_dirs, split, candidates)
    answer(comparison, as_json, *compare_lines(comparison, segments))


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
    budget: Annotated[
        float,
        typer.Option(
            metavar="MINUTES", help="for the whole table: no run trains longer than fits; 0 = no limit", min=0
        ),
    ] = 0.0,
    candidates: Annotated[str, typer.Option(help="sampled, hard, full; comma-separated")] = "sampled,full",
    events: Annotated[int, typer.Option(help="with full: events in a fixed sample, 0 = all", min=0)] = 2000,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL=PRESET|FILE", help="settings for a model other than the preset of its name"
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(metavar="DATA_SET", help="gensr paper's settings of single systems for this data set"),
    ] = "",
    jobs: Jobs = 1,
    submit: Annotated[
        bool, typer.Option("--submit", help="submit the missing runs as SLURM arrays; write no table yet")
    ] = False,
    gpus_per_node: Annotated[int, typer.Option(help="with --submit; 0 trains on CPU", min=0)] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print runs, epochs and times; write nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train, tune, evaluate and compare systems on one prepared folder; writes TABLE/table.html, .md, .csv
    and .json.

    The same command resumes after an interruption. A failed run is named in the table; the others continue.
    """
    from trainer.experiments.table import Request, make_table
    from trainer.experiments.table import dry_run as plan
    from trainer.experiments.table.render import markdown

    refuse_jobs_of_arrays(jobs, submit)
    presets = dict(word.partition("=")[::2] for word in preset or [])
    if wrong := [word for word in preset or [] if "=" not in word]:
        raise ConfigError(f"--preset is written MODEL=PRESET, got {', '.join(wrong)}")
    own_settings: dict[str, list[str]] = {}
    if recipe:
        from trainer.experiments.paper.plan import recipe_of
        from trainer.models.zoo import GENSR

        known = recipe_of(recipe)
        if not models or GENSR in _names(models):
            presets = {GENSR: known["preset"], **presets}
        own_settings = {name: words for name, words in known["own_settings"].items() if name not in presets}
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
        settings=tuple(overrides or []),
        own_settings=own_settings,
        jobs=jobs,
    )
    machine = _machine_of_jobs(gpus_per_node) if submit else None
    if dry_run:
        times = plan(request, machine)
        answer(times.facts(), as_json, *times.lines())
        return
    if machine is not None:
        _submit_table(request, machine, gpus_per_node, as_json)
        return
    with resumable():
        document = make_table(request, notify=note)
    answer(document, as_json, *markdown(document), "", f"wrote {out / 'table.html'}, .md, .csv and .json")
    if not any(row["results"] for row in document["rows"] if "about" not in row):
        raise RunError(f"no run of the table has results: {out / 'table.md'} says what failed")


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
    scripts = [str(job.path) for job in submission.jobs]
    lines = job_lines(ids, (job.path for job in submission.jobs))
    lines.append("when all have ended, the same command without --submit writes the table")
    runs = [str(path) for path in submission.run_dirs]
    answer({"job_ids": ids, "runs": runs, "scripts": scripts}, as_json, *submission.plan_lines, "", *lines)


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
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="YAML; docs/continue.md has an example"),
    ],
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
    from trainer.registry.versions import uri_option

    plan = read(file, overrides or [])
    if dry_run:
        days, late = plan.waiting()
        lines = commands(plan)
        answer({"days": days, "late": late, "commands": lines}, as_json, *(lines or ["no new day"]))
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
