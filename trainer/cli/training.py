"""Verbs about a run: train, submit, evaluate, report, compare."""

import dataclasses
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.cli import completion
from trainer.cli.base import (
    RANK,
    AsJson,
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
    quoted,
    say,
    stage_lines,
    submitted,
    verb,
)
from trainer.errors import ConfigError
from trainer.runtime.progress import waiting_for

if TYPE_CHECKING:
    from trainer.experiments.submit import Submission


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
    stage_lines()  # what the model counts first
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
    gpus_per_node: Annotated[
        str,
        typer.Option(
            metavar="[TYPE:]N", help="GPUs per node, such as 8 or a100:8; 0 trains on CPU", show_default=True
        ),
    ] = "1",
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
    from trainer.experiments import submit as jobs
    from trainer.experiments.sweep import read_sweep

    options, settings = jobs.split_words(words or [])
    gpu_type, num_gpus = jobs.read_gpus(gpus_per_node)
    machines = jobs.Machines(nodes, num_gpus, processes_per_node, deepspeed, gpu_type)
    command = own_command()
    if sweep is None:
        submission = jobs.plan_run(preset, settings, machines, options, command)
    else:
        submission = jobs.plan_sweep(
            preset, settings, read_sweep(sweep), machines, options, command, parallel
        )
    if show:
        answer(scripts_of(submission), as_json, *script_lines(submission))
    else:
        ids = jobs.submit(submission)
        answer(submitted(submission, ids), as_json, *submission.plan_lines, "", *job_lines(submission, ids))


def scripts_of(submission: "Submission") -> dict[str, Any]:
    """submitted() of what is only shown: scripts with their text."""
    return {**submitted(submission, []), "scripts": {str(job.path): job.text for job in submission.jobs}}


def script_lines(submission: "Submission") -> list[str]:
    return [
        line
        for job in submission.jobs
        for line in (f"# ---- {job.path}: {shlex.join(job.command(['JOB', 'JOB']))}", job.text)
    ]


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
    lists: Annotated[
        int,
        typer.Option(
            help="also keep this many of each event's best candidates with their scores; writes "
            "RUN/lists-SPLIT.parquet",
            min=0,
        ),
    ] = 0,
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

    if candidates == "full":
        from trainer.evaluation.full import evaluate_full  # and faiss, which given candidates do not need

        document = evaluate_full(
            run_dir,
            split,
            max_events=events,
            with_baselines=baselines,
            progress=partial(stage_lines(), "rank"),
            notify=note,
            retriever=retriever,
            num_best=lists,
        )
    else:
        from trainer.evaluation.sampled import evaluate_run

        document = evaluate_run(
            run_dir,
            split,
            with_baselines=baselines,
            progress=partial(stage_lines(), "score"),
            candidates=candidates,
            num_best=lists,
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
    wrote = [f"wrote {path} and {path.with_suffix('.parquet').name}"]
    if lists:
        wrote.append(f"wrote {RunFolder(run_dir).lists(name)}")
    answer(document, as_json, *fitting(lines, 4), *wrote, *after)


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
