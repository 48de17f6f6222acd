"""Verbs about data: simulate, download, prepare, inspect, optimum, cf."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.cli import completion
from trainer.cli.base import (
    SPLITS,
    AsJson,
    Command,
    Overrides,
    answer,
    fitting,
    next_steps,
    note,
    quoted,
    resumable,
    stage_lines,
    verb,
)
from trainer.runtime.progress import waiting_for


@verb("gensr simulate data/raw --users 2000 --items 5000 --seed 1")
def simulate(
    out: Annotated[Path, typer.Argument(help="new folder for the CSV files")],
    users: Annotated[int, typer.Option(help="users")] = 1000,
    items: Annotated[int, typer.Option(help="items in the catalogue")] = 4000,
    days: Annotated[int, typer.Option(help="days of logs")] = 14,
    seed: Annotated[int, typer.Option(help="the same seed gives the same bytes")] = 0,
    rows_per_day: Annotated[float, typer.Option(help="average interactions of a user per day")] = 24.0,
    text: Annotated[
        str, typer.Option(help="anonymised (KuaiSAR's CSV schema) or natural (titles and queries in words)")
    ] = "anonymised",
    as_json: AsJson = False,
) -> None:
    """Write raw logs from a planted preference model, for gensr prepare kuaisar, or with --text natural for
    gensr prepare tables.

    KuaiSAR's own size: --users 25877 --items 6890707 --days 19 --rows-per-day 40 (19.6 M rows, under 400 MB
    of memory).
    """
    from data_shards.simulate import simulate as run

    sizes: dict[str, Any] = {"users": users, "items": items, "days": days, "rows_per_day": rows_per_day}
    source = "tables" if text == "natural" else "kuaisar"
    rows = run(out, **sizes, seed=seed, text=text, progress=stage_lines())
    answer(
        {"out": str(out), "rows": rows},
        as_json,
        *(f"  {name:<22} {count:>12,} rows" for name, count in rows.items()),
        f"wrote {out}",
        *next_steps(f"gensr prepare {source} {quoted(out)} data/prepared"),
    )


@verb("gensr download kuaisar-small data/kuaisar")
def download(
    name: Annotated[str, typer.Argument(help="kuaisar, kuaisar-small or amazon-kindle")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder for the files")],
    as_json: AsJson = False,
) -> None:
    """Fetch a public data set, with size and checksum checks; resumes interrupted downloads."""
    from data_shards.download import download as run

    files = run(name, folder, progress=stage_lines())
    lines = [f"  {path}" for path in files]
    source = "amazon" if name.startswith("amazon") else "kuaisar"
    lines += next_steps(f"gensr prepare {source} {quoted(folder)} data/prepared")
    answer({"files": [str(path) for path in files]}, as_json, *lines)


class PrepareCommand(Command):
    """`gensr prepare SOURCE --help` adds the settings of that source."""

    def parse_args(self, ctx: Any, args: Any) -> Any:
        ctx.meta["words"] = list(args)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from data_shards.options import SOURCE_DEFAULTS, source_keys
        from trainer.cli.help import key_lines

        super().format_help(ctx, formatter)
        for source in SOURCE_DEFAULTS:
            if source in ctx.meta.get("words", []):
                typer.echo(f"Settings of {source} (KEY=VALUE)")
                typer.echo("\n".join(key_lines(source_keys(source))))


@verb("gensr prepare kuaisar data/raw data/prepared history_max=20", cls=PrepareCommand)
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="kuaisar, amazon, jdsearch, unisar or tables (your own logs)",
            autocompletion=completion.sources,
        ),
    ],
    raw: Annotated[Path, typer.Argument(help="folder of raw files")],
    out: Annotated[Path, typer.Argument(help="prepared folder to write")],
    overrides: Overrides = None,
    append: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="prepared folder that the logs extend; rows keep their numbers"),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Turn raw logs into a prepared folder: splits, histories, negatives, text, shards, leak checks.

    gensr prepare SOURCE --help lists the settings of a source.
    """
    from data_shards.inspect import tables
    from data_shards.prepare import prepare as run

    with resumable():
        facts = run(source, raw, out, overrides or [], progress=stage_lines(), append=append).raw
    counts = facts["counts"]
    lines = [
        f"  {split:<6} {counts[split]['rec']:>12,} recommendation {counts[split]['src']:>12,} search"
        for split in SPLITS
    ]
    lines += tables(facts)
    document = {
        "out": str(out),
        "counts": counts,
        "published": facts["published"],
        "dropped": facts["dropped"],
        "removed": facts["removed"],
    }
    after = next_steps(f"gensr inspect {quoted(out)}", f"gensr cf {quoted(out)}")
    answer(document, as_json, *fitting(lines, 6), f"wrote {out}", *after)


@verb("gensr inspect data/prepared")
def inspect(out: Annotated[Path, typer.Argument(help="prepared folder")], as_json: AsJson = False) -> None:
    """Show counts, splits, shard sizes, leak checks and one decoded example."""
    from data_shards.inspect import describe
    from data_shards.inspect import inspect as run

    facts = run(out)
    has_table = (out / "cf" / "lightgcn.safetensors").is_file()
    after = next_steps(
        "" if has_table else f"gensr cf {quoted(out)}",
        f"gensr train demo data.dir={quoted(out)} run.dir=runs/mine",
    )
    answer(facts, as_json, *fitting(describe(facts), 6), "", *after)


@verb("gensr optimum data/prepared data/raw")
def optimum(
    out: Annotated[Path, typer.Argument(help="prepared folder")],
    raw: Annotated[Path, typer.Argument(help="logs of gensr simulate from which it was prepared")],
    as_json: AsJson = False,
) -> None:
    """Rank the test candidates by the preferences that gensr simulate planted; writes OUT/optimum.json.

    No model can be expected to do better. gensr table shows it as a row.
    """
    waiting_for("loading PyTorch")
    from data_shards.simulate.oracle import OPTIMUM_FILE
    from trainer.data.folder import PreparedFolder
    from trainer.evaluation.optimum import TITLE, write_optimum
    from trainer.evaluation.summary import rows_of, table

    report = write_optimum(PreparedFolder.at(out), raw)
    answer(report, as_json, *table(rows_of(report, TITLE)), "", f"wrote {out / OPTIMUM_FILE}")


@verb("gensr cf data/prepared cf.holdout=crossfit")
def cf(
    out: Annotated[Path, typer.Argument(help="prepared folder")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train the LightGCN table on the training split's recommendation clicks, into the prepared folder."""
    waiting_for("loading PyTorch")
    from trainer.cf.build import train_cf

    stage_lines()
    path = train_cf(
        out, overrides or [], progress=lambda line: note("\n".join(fitting([line], 2, sys.stderr)))
    )
    after = next_steps(f"gensr train demo data.dir={quoted(out)} run.dir=runs/mine")
    answer({"path": str(path)}, as_json, f"CF table: {path}", *after)
