"""The command `gensr`. Verbs are plain functions elsewhere; here are their arguments, their help and what is
printed.

Exit code 0, or 1 with what, where and the fix on stderr (75: training was stopped by a signal and saved, run
it again with --resume auto). Nothing heavy is imported before a verb needs it. Under a launcher only rank 0
prints.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.errors import ConfigError, GensrError, RequestError

SPLITS = ("train", "valid", "test")
RANK = int(os.environ.get("RANK", "0"))
Verb = Callable[..., Any]


class Commands(typer.Typer):
    """Verbs whose help is their docstring, less the line breaks of the source: a list of verbs would print
    them."""

    def command(self, name: str | None = None, **options: Any) -> Any:
        def add(function: Verb) -> Verb:
            paragraphs = cleandoc(function.__doc__ or "").split("\n\n")
            text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
            return super(Commands, self).command(name, help=text, **options)(function)

        return add


app = Commands(
    name="gensr",
    help="GenSR: one generative model for search and recommendation, from raw logs to a registered model.",
    epilog="Example: gensr demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = Commands(
    help="Look at configurations.", epilog="Example: gensr config show demo", no_args_is_help=True
)
app.add_typer(config_app, name="config")
runs_app = Commands(
    help="Several runs at once.", epilog="Example: gensr runs summarize runs/sweep", no_args_is_help=True
)
app.add_typer(runs_app, name="runs")
bench_app = Commands(
    help="Measure speed and memory against fair baselines.",
    epilog="Example: gensr bench data",
    no_args_is_help=True,
)
app.add_typer(bench_app, name="bench")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="settings; all of them: gensr config keys", show_default=False),
]
MaybePreset = Annotated[
    str | None, typer.Argument(metavar="[PRESET|FILE]", help="nothing: the defaults", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]


def main() -> None:
    """Entry point of `gensr` and `python -m trainer`. --debug anywhere keeps a user error's traceback."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name="gensr")
    except GensrError as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        if RANK == 0:
            typer.echo(f"gensr: {error}", err=True)
        elif not isinstance(error, ConfigError):
            # every rank finds the same mistakes in a configuration; other errors may be one rank's own
            typer.echo(f"gensr: rank {RANK}: {error}", err=True)
        sys.exit(1)
    except SystemExit as stop:  # click says 2 for wrong usage; here every failure is 1
        sys.exit(1 if stop.code == 2 else stop.code)


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="show the traceback of errors; may stand anywhere")
    ] = False,
) -> None:
    """Read by main(), before the verb."""


def verb(example: str) -> Callable[[Verb], Verb]:
    return app.command(epilog=f"Example: {example}")


def say(*lines: str) -> None:
    """Progress and answers for people."""
    if RANK == 0:
        for line in lines:
            typer.echo(line)


def note(line: str) -> None:
    """What a person may want to know on the way; stdout is for answers."""
    if RANK == 0:
        typer.echo(line, err=True)


def answer(document: Any, as_json: bool, *lines: str) -> None:
    """One JSON object for scripts, or lines for people."""
    if RANK == 0:
        typer.echo(json.dumps(document, ensure_ascii=False) if as_json else "\n".join(lines))


def preset_and_settings(preset: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """Where the preset may be left out, the first word may be a setting."""
    settings = overrides or []
    return (None, [preset, *settings]) if preset is not None and "=" in preset else (preset, settings)


def stage_lines() -> Callable[[str, int, int], None]:
    from trainer.runtime.progress import StageLines

    return StageLines(enabled=RANK == 0)


# ---- data --------------------------------------------------------------------------------------------------


@verb("gensr simulate data/raw --users 2000 --items 5000 --seed 1")
def simulate(
    out: Annotated[Path, typer.Argument(help="new folder for the CSV files")],
    users: Annotated[int, typer.Option(help="users")] = 1000,
    items: Annotated[int, typer.Option(help="items in the catalogue")] = 4000,
    days: Annotated[int, typer.Option(help="days of logs")] = 14,
    seed: Annotated[int, typer.Option(help="the same seed gives the same bytes")] = 0,
    rows_per_day: Annotated[float, typer.Option(help="interactions of a user on a day, on average")] = 24.0,
    text: Annotated[
        str, typer.Option(help="anonymised (KuaiSAR's CSV schema) or natural (titles and queries in words)")
    ] = "anonymised",
    as_json: AsJson = False,
) -> None:
    """Write raw logs from a planted preference model, for gensr prepare kuaisar; those of --text natural for
    gensr prepare tables.

    KuaiSAR's own size: --users 25877 --items 6890707 --days 19 --rows-per-day 40 (19.6 M rows, under 400 MB
    of memory).
    """
    from data_shards.simulate import simulate as run

    sizes: dict[str, Any] = {"users": users, "items": items, "days": days, "rows_per_day": rows_per_day}
    rows = run(out, **sizes, seed=seed, text=text, progress=stage_lines())
    answer(
        {"out": str(out), "rows": rows},
        as_json,
        *(f"  {name:<22} {count:>12,} rows" for name, count in rows.items()),
        f"wrote {out}",
    )


@verb("gensr download kuaisar-small data/kuaisar")
def download(
    name: Annotated[str, typer.Argument(help="kuaisar, kuaisar-small or amazon-kindle")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder for the files")],
    as_json: AsJson = False,
) -> None:
    """Fetch a public data set, resumed where it broke off, with size and checksum checks."""
    from data_shards.download import download as run

    files = run(name, folder, progress=stage_lines())
    answer({"files": [str(path) for path in files]}, as_json, *(f"  {path}" for path in files))


@verb("gensr prepare kuaisar data/raw data/prepared history_max=20")
def prepare(
    source: Annotated[str, typer.Argument(help="kuaisar, amazon, jdsearch, or tables (your own logs)")],
    raw: Annotated[Path, typer.Argument(help="folder of raw files")],
    out: Annotated[Path, typer.Argument(help="prepared folder to write")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Turn raw logs into a prepared folder: splits, histories, negatives, text, shards, leak checks."""
    from data_shards.inspect import count_table, dropped_table
    from data_shards.prepare import prepare as run

    facts = run(source, raw, out, overrides or [], progress=stage_lines()).raw
    counts = facts["counts"]
    lines = [
        f"  {split:<6} {counts[split]['rec']:>12,} recommendation {counts[split]['src']:>12,} search"
        for split in SPLITS
    ]
    lines += ["", *count_table(facts), "", *(dropped_table(facts) if facts["dropped"] else [])]
    document = {
        "out": str(out),
        "counts": counts,
        "published": facts["published"],
        "dropped": facts["dropped"],
    }
    answer(document, as_json, *lines, f"wrote {out}; look at it: gensr inspect {out}")


@verb("gensr inspect data/prepared")
def inspect(out: Annotated[Path, typer.Argument(help="prepared folder")], as_json: AsJson = False) -> None:
    """Show counts, splits, shard sizes, leak checks and one decoded example."""
    from data_shards.inspect import describe
    from data_shards.inspect import inspect as run

    facts = run(out)
    answer(facts, as_json, *describe(facts))


@verb("gensr cf data/prepared cf.holdout=crossfit")
def cf(
    out: Annotated[Path, typer.Argument(help="prepared folder")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train the LightGCN table on the training split's recommendation clicks, into the prepared folder."""
    from trainer.cf.tables import train_cf

    path = train_cf(
        out, overrides or [], progress=lambda line: typer.echo(line, err=True) if RANK == 0 else None
    )
    answer({"path": str(path)}, as_json, f"CF table: {path}")


# ---- training and evaluation -------------------------------------------------------------------------------


@verb("gensr train demo data.dir=data/demo run.dir=runs/mine optim.lr=3e-4")
def train(
    preset: Annotated[
        str,
        typer.Argument(
            metavar="PRESET|FILE", help="a preset's name, or a YAML file (RUN/config.yaml repeats a run)"
        ),
    ],
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
    """Train. Also as: accelerate launch --config_file ds_configs/… -m trainer train …"""
    from trainer.configs import load_config

    if resume not in ("never", "auto"):
        raise ConfigError(f"--resume must be never or auto, got {resume}")
    config = load_config(preset, overrides or [])
    if dry_run:
        from trainer.training.plan import dry_run as check

        plan = check(config, preset)
        answer(plan.facts, as_json, *plan.lines)
        return
    from trainer.training.loop import train as run

    result = run(config, resume="auto" if resume == "auto" else "never")
    if as_json:
        answer(dataclasses.asdict(result), as_json)
    if result.status == "already_finished":
        note(
            f"{result.run_dir}: already finished at step {result.step:,}, nothing was trained. Train on with "
            "run.max_steps=N run.accept_changes=run.max_steps, or choose another run.dir."
        )
    if result.exit_code:
        raise typer.Exit(result.exit_code)


@app.command(
    epilog="Example: gensr submit demo --nodes 2 --gpus-per-node 8 data.dir=OUT run.dir=RUN",
    context_settings={"ignore_unknown_options": True},
)
def submit(
    preset: Annotated[str, typer.Argument(metavar="PRESET|FILE", help="a preset's name, or a YAML file")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE | --SBATCH-OPTION=VALUE",
            help="settings, and options of sbatch: --account=A --time=12:00:00",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(help="nodes", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each node; 0 trains on CPU", min=0)] = 1,
    processes_per_node: Annotated[int, typer.Option(help="0 = one a GPU (one on CPU)", min=0)] = 0,
    deepspeed: Annotated[str, typer.Option(help="one of ds_configs/, or a path")] = "zero2.json",
    sweep: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON list of settings: an array of runs below run.dir, their evaluation and a table"
        ),
    ] = None,
    parallel: Annotated[int, typer.Option(help="runs of a sweep at once; 0 = all", min=0)] = 0,
    show: Annotated[bool, typer.Option("--print", help="print the script, write and submit nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a training run for these nodes, write its script into the run folder and submit it to SLURM."""
    import shlex

    from data_shards.secrets import mask_secrets
    from trainer.experiments import submit as jobs
    from trainer.experiments.sweep import read_sweep

    options, settings = jobs.split_words(words or [])
    machines = jobs.Machines(nodes, gpus_per_node, processes_per_node, deepspeed)
    command = shlex.join(["gensr", *map(mask_secrets, sys.argv[1:])])
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
            *(f"job {job_id}  {path}" for job_id, path in zip(ids, paths, strict=True)),
        ]
    answer({"job_ids": ids, "runs": [str(path) for path in submission.run_dirs], **scripts}, as_json, *lines)


@verb("gensr evaluate runs/mine --split test")
def evaluate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    split: Annotated[str, typer.Option(help="valid or test")] = "test",
    baselines: Annotated[
        bool, typer.Option(help="rank the same candidates with popularity, LightGCN and BM25")
    ] = True,
    candidates: Annotated[
        str, typer.Option(help="sampled: the stored ones; full: the whole catalogue")
    ] = "sampled",
    events: Annotated[int, typer.Option(help="with full: events in a fixed sample, 0 = all", min=0)] = 2000,
    as_json: AsJson = False,
) -> None:
    """Rank the stored candidates of every event; writes RUN/evaluation-SPLIT.json and .parquet.

    With --candidates full: retrieve from the whole catalogue, then rank; writes
    RUN/evaluation-SPLIT-full.json and .parquet.
    """
    from trainer.evaluation.summary import full_lines, protocol_line, rows_of, table
    from trainer.registry.model_card import metrics_of
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
        )
    elif candidates == "sampled":
        from trainer.evaluation.sampled import evaluate_run

        document = evaluate_run(
            run_dir,
            split,
            with_baselines=baselines,
            progress=lambda done, total: progress("score", done, total),
        )
    else:
        raise ConfigError(f"--candidates must be sampled or full, got {candidates}")
    name = f"{split}-full" if candidates == "full" else split
    path = run_dir / f"evaluation-{name}.json"
    lines = [
        *table(rows_of(document)),
        *(full_lines(document) if candidates == "full" else []),
        protocol_line(document),
    ]
    if RANK == 0:
        log_evaluation(run_dir, name, metrics_of(document, name), lines)
    answer(document, as_json, *lines, f"wrote {path} and {path.with_suffix('.parquet').name}")


@verb("gensr report runs/mine")
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]) -> None:
    """Draw RUN/report/*.png and print the results of a run."""
    from trainer.analysis.figures import plot_run
    from trainer.evaluation.summary import protocol_line, read_evaluation, rows_of, table

    say(*(f"wrote {path}" for path in plot_run(run_dir)))
    for split in ("valid", "test"):
        if (run_dir / f"evaluation-{split}.json").is_file():
            document = read_evaluation(run_dir, split)
            say("", f"{split} split", *table(rows_of(document)), protocol_line(document))


@verb("gensr compare runs/a runs/b")
def compare(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="evaluated run folders")],
    split: Annotated[str, typer.Option(help="valid or test")] = "test",
    as_json: AsJson = False,
) -> None:
    """Put the results of runs side by side, with the settings that differ."""
    from trainer.evaluation.summary import compare as run
    from trainer.evaluation.summary import compare_lines

    comparison = run(run_dirs, split)
    answer(comparison, as_json, *compare_lines(comparison))


@runs_app.command(
    "import", epilog="Example: gensr runs import runs/mlflow.db --into http://mlflow.example.org"
)
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FROM",
            help="mlflow.db of an offline node, a tracking URI, a run folder, or a folder of them",
        ),
    ],
    into: Annotated[
        str,
        typer.Option(
            help="tracking URI of the target; default: the store that a run folder's own run belongs in"
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Bring runs that were tracked without a server into one. Repeated, it adds only what is new."""
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
    """Put the runs of a sweep into one table, SWEEP/sweep.txt and .json, and below one parent run in
    MLflow."""
    from trainer.experiments.sweep import lines_of
    from trainer.experiments.sweep import summarize as run

    document = run(folder)
    answer(document, as_json, *lines_of(document))


# ---- registry and serving ----------------------------------------------------------------------------------


@verb("gensr register runs/mine gensr-mine")
def register(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    name: Annotated[str, typer.Argument(help="registered model")],
    alias: Annotated[str, typer.Option(help="alias that moves to the new version")] = "candidate",
    as_json: AsJson = False,
) -> None:
    """Make a version of a registered model from a run, self-contained and checked."""
    from trainer.registry.versions import register as run

    version = run(run_dir, name, alias, notify=note)
    answer(
        {"name": name, "version": version, "alias": alias},
        as_json,
        f"registered models:/{name}/{version}, also models:/{name}@{alias}",
    )


@verb("gensr promote gensr-mine --dry-run")
def promote(
    name: Annotated[str, typer.Argument(help="registered model")],
    margin: Annotated[
        float, typer.Option(help="NDCG@10 that no task may lose, at the low end of its 95 % interval")
    ] = 0.01,
    back: Annotated[
        bool, typer.Option("--rollback", help="give the alias back to the champion before; compares nothing")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done, change nothing")
    ] = False,
    uri: Annotated[
        str, typer.Option(help="MLflow registry; default: MLFLOW_TRACKING_URI, else runs/mlflow.db")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Move the alias champion to the candidate if, on the same test events, one task gains and none falls by
    more than a margin.

    The decision and its figures become tags of the candidate's version. Exit code 0 also when it is refused:
    read "promoted".
    """
    from trainer.registry.promote import promote as run
    from trainer.registry.promote import rollback

    if back:
        left, now = rollback(name, uri, dry_run)
        line = (
            f"{name}: champion {'would go' if dry_run else 'went'} back from version {left} to version {now}"
        )
        answer({"name": name, "from": left, "champion": now, "dry_run": dry_run}, as_json, line)
        return
    decision = run(name, uri, margin, dry_run)
    dry_line = ["dry run: nothing was changed"] if dry_run else []
    answer({**dataclasses.asdict(decision), "dry_run": dry_run}, as_json, *decision.lines(), *dry_line)


@verb("gensr score models:/gensr-demo@candidate requests.jsonl")
def score(
    model: Annotated[str, typer.Argument(help="run folder, or models:/NAME@alias")],
    requests: Annotated[
        Path,
        typer.Argument(
            help=".jsonl or .parquet: history, task, query, candidates; "
            "without candidates the whole catalogue"
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help='new .jsonl or .parquet file; default: {"scores": […]} lines on stdout'),
    ] = None,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="only part I of N of the requests: for several jobs")
    ] = "1/1",
    keep_going: Annotated[
        bool, typer.Option(help="a bad request becomes an error in its row instead of ending the job")
    ] = False,
    uri: Annotated[
        str, typer.Option(help="MLflow registry; default: MLFLOW_TRACKING_URI, else runs/mlflow.db")
    ] = "",
) -> None:
    """Score given candidates from histories, one request or millions."""
    from trainer.serving.score_file import count_requests, read_requests, score_file

    try:
        number, of = (int(text) for text in part.split("/"))
    except ValueError:
        raise ConfigError(f"--part must be I/N, got {part}") from None
    count_requests(requests)  # says what is wrong with the file before a model is loaded
    from trainer.registry.versions import open_model

    recommender = open_model(model, uri)
    if out is None:
        for scores in recommender.score(list(read_requests(requests))):
            say(json.dumps({"scores": scores}))
        return
    progress = stage_lines()
    answered = score_file(
        recommender,
        requests,
        out,
        (number, of),
        keep_going,
        progress=lambda done, total: progress("score", done, total),
    )
    say(f"wrote {out}: {answered:,} requests")


User = Annotated[
    str,
    typer.Option("--user", help="user id: the history is all of the user's clicks in the prepared folder"),
]
History = Annotated[
    Path | None,
    typer.Option(
        "--history",
        help='JSON file: [{"item_id": …, "task": "rec"}, …] oldest first, or one such object a line',
    ),
]
HowMany = Annotated[int, typer.Option("-k", help="items to answer")]
Candidates = Annotated[int, typer.Option("--candidates", help="items that retrieval hands to the ranking")]
Seen = Annotated[bool, typer.Option("--seen", help="also answer items of the history")]
Registry = Annotated[
    str, typer.Option(help="MLflow registry; default: MLFLOW_TRACKING_URI, else runs/mlflow.db")
]
Prepared = Annotated[
    str,
    typer.Option(
        "--data", help="prepared folder for --user; default: where the model says it was trained from"
    ),
]


@verb("gensr recommend runs/mine --user u17 -k 10")
def recommend(
    model: Annotated[str, typer.Argument(help="run folder, or models:/NAME@alias")],
    user: User = "",
    history: History = None,
    k: HowMany = 10,
    candidates: Candidates = 400,
    seen: Seen = False,
    data: Prepared = "",
    uri: Registry = "",
    as_json: AsJson = False,
) -> None:
    """Find the best items of the whole catalogue for a user: candidates by vectors, then ranked by the
    model."""
    if not user and history is None:
        raise RequestError("whose recommendations? Give --user ID or --history FILE")
    request = {"task": "rec", "k": k, "num_candidates": candidates, "include_seen": seen}
    answer_request(model, request, user, history, data, uri, as_json)


@verb("gensr search runs/mine --query 'red lamp' --user u17")
def search(
    model: Annotated[str, typer.Argument(help="run folder, or models:/NAME@alias")],
    query: Annotated[str, typer.Option(help="text; for anonymised data word numbers separated by spaces")],
    user: User = "",
    history: History = None,
    k: HowMany = 10,
    candidates: Candidates = 400,
    seen: Seen = False,
    data: Prepared = "",
    uri: Registry = "",
    as_json: AsJson = False,
) -> None:
    """Find the best items of the whole catalogue for a query, and for a user if one is given."""
    if not query.strip():
        raise RequestError("--query is empty: give text, or word numbers for anonymised data")
    request = {"task": "src", "query": query, "k": k, "num_candidates": candidates, "include_seen": seen}
    answer_request(model, request, user, history, data, uri, as_json)


def answer_request(
    model: str, request: dict[str, Any], user: str, history: Path | None, data: str, uri: str, as_json: bool
) -> None:
    """Complete a request for the whole catalogue by its history, and print the answer."""
    if user and history is not None:
        raise RequestError("--user and --history both say whose history it is: give one of them")
    from trainer.registry.versions import open_model
    from trainer.serving.users import read_history

    given = {"user_id": user} if user else {"history": read_history(history) if history is not None else []}
    document = open_model(model, uri, data, notify=note).recommend({**request, **given, "with_text": True})
    width = max((len(str(item["item_id"])) for item in document["items"]), default=0)
    lines = [
        f"{place:>4}  {item['item_id']!s:<{width}}  {item['score']:.4f}  {item['text'][:100]}"
        for place, item in enumerate(document["items"], start=1)
    ]
    answer(
        document,
        as_json,
        *(lines or ["nothing that the history does not hold already: --seen shows that, too"]),
    )


Host = Annotated[
    str, typer.Option(help="address to listen on; the default cannot be reached from other machines")
]
Port = Annotated[int, typer.Option(help="port to listen on")]


@verb("gensr serve models:/gensr-demo@candidate --port 8000")
def serve(
    model: Annotated[str, typer.Argument(help="run folder, or models:/NAME@alias")],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_batch: Annotated[int, typer.Option(help="requests ranked together")] = 16,
    max_waiting: Annotated[int, typer.Option(help="requests in the queue; more are refused with 503")] = 256,
    timeout: Annotated[float, typer.Option(help="seconds until a request is answered with 504")] = 30.0,
    data: Prepared = "",
    uri: Registry = "",
) -> None:
    """Answer /recommend, /search and /score over HTTP, several requests at once; shows a page to look at,
    too."""
    from trainer.registry.versions import open_model
    from trainer.serving.app import Limits, run

    limits = Limits(max_batch=max_batch, max_waiting=max_waiting, timeout_s=timeout)
    recommender = open_model(model, uri, data, notify=note)
    note(f"serving {model} at http://{host}:{port}/ (Ctrl-C ends it)")
    run(recommender, host, port, limits)


@verb("gensr ui runs/demo")
def ui(
    model: Annotated[str, typer.Argument(help="run folder, or models:/NAME@alias")],
    port: Port = 8000,
    data: Prepared = "",
    uri: Registry = "",
    browser: Annotated[bool, typer.Option(help="open the page in a browser")] = True,
) -> None:
    """Look at a model: a user's two histories, a query, ranked items and the soft-filter weights that explain
    them."""
    import threading
    import webbrowser

    if browser:
        threading.Timer(2.0, webbrowser.open, [f"http://127.0.0.1:{port}/"]).start()
    serve(model, port=port, data=data, uri=uri)


# ---- measurements ------------------------------------------------------------------------------------------


@bench_app.command(epilog="Example: gensr bench data --rows 200000,2000000 --json")
def data(
    rows: Annotated[
        str,
        typer.Option(
            help="log rows of each row of the scaling table, comma-separated; "
            "the figures are those of the last"
        ),
    ] = "200000",
    turns: Annotated[int, typer.Option(help="measurements of each side; the sides alternate", min=1)] = 2,
    seconds: Annotated[float, typer.Option(help="CPU seconds of one loader measurement")] = 5.0,
    threads: Annotated[int, typer.Option(help="threads of both preparations", min=1)] = 2,
    memory_limit: Annotated[str, typer.Option(help="duckdb's memory in both preparations")] = "1000MB",
    folder: Annotated[
        Path | None,
        typer.Option(help="where logs and prepared folders lie and are kept; default: a temporary folder"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Preparation against a bare duckdb script, and the loader against a per-example collator, on simulated
    logs."""
    from trainer.bench.data import bench_data, bench_lines

    try:
        sizes = [int(size.replace("_", "")) for size in rows.split(",")]
    except ValueError:
        raise ConfigError(f"--rows must be integers, comma-separated, got {rows}") from None
    document = bench_data(sizes, turns, seconds, threads, memory_limit, folder=folder, progress=stage_lines())
    answer(document, as_json, *bench_lines(document))


Pairs = Annotated[
    int | None,
    typer.Option(
        help="(history, candidate) pairs of a step, on either side; else 20, or on a GPU what fills it and "
        "the paper's 200 for the reference",
        min=1,
    ),
]
Steps = Annotated[int, typer.Option(help="measured steps of a turn, after three to warm up", min=1)]
Turns = Annotated[int, typer.Option(help="measurements of each side; the sides alternate", min=1)]
Threads = Annotated[int, typer.Option(help="CPU threads of both sides", min=1)]
Profile = Annotated[
    Path | None,
    typer.Option(help="file for a torch profiler trace (chrome://tracing, perfetto) of one more turn"),
]


@bench_app.command(name="train", epilog="Example: gensr bench train model.prompt=compact --json")
def bench_train(
    overrides: Overrides = None,
    pairs: Pairs = None,
    steps: Steps = 2,
    turns: Turns = 2,
    threads: Threads = 2,
    profile: Profile = None,
    as_json: AsJson = False,
) -> None:
    """Training steps against a reference written straight from the paper; flan-t5-base's shape with random
    weights unless settings say otherwise."""
    from trainer.bench.model import bench_model, bench_model_lines

    document = bench_model(
        "train", overrides or [], pairs, steps, turns, threads, profile, progress=stage_lines()
    )
    answer(document, as_json, *bench_model_lines(document))


@bench_app.command(name="evaluate", epilog="Example: gensr bench evaluate data.dir=data/prepared --pairs 100")
def bench_evaluate(
    overrides: Overrides = None,
    pairs: Pairs = None,
    steps: Steps = 2,
    turns: Turns = 2,
    threads: Threads = 2,
    profile: Profile = None,
    as_json: AsJson = False,
) -> None:
    """Scoring the candidates of events against the reference, which encodes every pair by itself and calls
    generate()."""
    from trainer.bench.model import bench_model, bench_model_lines

    document = bench_model(
        "evaluate", overrides or [], pairs, steps, turns, threads, profile, progress=stage_lines()
    )
    answer(document, as_json, *bench_model_lines(document))


@bench_app.command(
    name="micro-batch", epilog="Example: gensr bench micro-batch scientific_small data.dir=data/scientific"
)
def bench_micro_batch(
    preset: MaybePreset = None,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="micro-batches that are timed, after one to warm up", min=1)] = 4,
    threads: Threads = 2,
    as_json: AsJson = False,
) -> None:
    """The fastest optim.micro_batch_size on this device, found by training with each, and what each takes of
    its memory."""
    from trainer.bench import micro_batch as bench

    preset, settings = preset_and_settings(preset, overrides)
    document = bench.bench_micro_batch(preset, settings, steps, threads, progress=stage_lines())
    answer(document, as_json, *bench.bench_micro_batch_lines(document))


# ---- help for people ---------------------------------------------------------------------------------------


@verb("gensr doctor")
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: packages, compiler, GPUs, processes, disk, MLflow's database, SLURM. Exit code 1
    when something is missing."""
    from trainer.doctor import run_checks

    checks = run_checks()
    lines = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<20} {check.detail}")
        lines += [f"      fix: {check.fix}"] if check.fix and check.status != "OK" else []
    answer([dataclasses.asdict(check) for check in checks], as_json, *lines)
    if any(check.status == "MISS" for check in checks):
        raise typer.Exit(1)


@config_app.command(epilog="Example: gensr config show demo optim.lr=3e-4")
def show(
    preset: MaybePreset = None,
    overrides: Overrides = None,
) -> None:
    """Print the effective configuration as YAML; secrets in URLs are hidden."""
    from data_shards.secrets import mask_secrets
    from data_shards.settings import to_yaml
    from trainer.configs import load_config

    preset, settings = preset_and_settings(preset, overrides)
    say(mask_secrets(to_yaml(load_config(preset, settings)).rstrip()))


@config_app.command(epilog="Example: gensr config keys train")
def keys(
    of: Annotated[
        str | None, typer.Argument(metavar="[train|cf|prepare]", help="nothing: all", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every key with its default and meaning."""
    from data_shards.settings import key_help

    trees = settings_trees()
    if of is not None and of not in trees:
        raise ConfigError(f"no keys of {of!r}. There are: {', '.join(trees)}")
    rows = {name: list(key_help(tree)) for name, tree in trees.items() if of in (None, name)}
    document = {
        name: [{"key": key, "default": default, "help": text} for key, default, text in of_verb]
        for name, of_verb in rows.items()
    }
    lines = []
    for name, of_verb in document.items():
        settings = []
        for row in of_verb:
            default = row["default"]
            settings.append(f"{row['key']}={default if isinstance(default, str) else json.dumps(default)}")
        width = max(map(len, settings))
        lines += [
            f"gensr {name}",
            *(f"  {setting:<{width}}  {row['help']}" for setting, row in zip(settings, of_verb, strict=True)),
            "",
        ]
    answer(document, as_json, *lines)


@config_app.command(epilog="Example: gensr config schema > gensr.schema.json")
def schema() -> None:
    """Print the JSON schema of a training configuration, for editors."""
    from pydantic import TypeAdapter

    from trainer.config import Config

    say(json.dumps(TypeAdapter(Config).json_schema(), indent=2))


def settings_trees() -> dict[str, Any]:
    from data_shards.options import PrepareSettings
    from trainer.config import CfRoot, Config

    return {"train": Config, "cf": CfRoot, "prepare": PrepareSettings}


@verb("gensr demo")
def demo(
    data_dir: Annotated[Path, typer.Option(help="prepared folder; raw logs go to DATA_DIR-raw")] = Path(
        "data/demo"
    ),
    run_dir: Annotated[Path, typer.Option(help="run folder; MLflow's database goes beside it")] = Path(
        "runs/demo"
    ),
) -> None:
    """The whole way, offline: simulate, prepare, cf, train, evaluate, register, and a summary."""
    from trainer.demo import run_demo

    run_demo(data_dir, run_dir)
