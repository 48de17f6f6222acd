"""Measurements: bench data, train, evaluate, micro-batch."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from trainer.cli.base import (
    AsJson,
    MaybePreset,
    Overrides,
    answer,
    bench_app,
    preset_and_settings,
    stage_lines,
)
from trainer.errors import ConfigError


@bench_app.command(epilog="Example: gensr bench data --rows 200000,2000000 --json")
def data(
    rows: Annotated[
        str,
        typer.Option(
            help="log rows for each row of the scaling table, comma-separated; "
            "the figures are those of the last"
        ),
    ] = "200000",
    turns: Annotated[int, typer.Option(help="measurements of each side; the sides alternate", min=1)] = 2,
    seconds: Annotated[float, typer.Option(help="CPU seconds of one loader measurement")] = 5.0,
    threads: Annotated[int, typer.Option(help="threads of both preparations", min=1)] = 2,
    memory_limit: Annotated[str, typer.Option(help="duckdb's memory in both preparations")] = "1000MB",
    folder: Annotated[
        Path | None,
        typer.Option(help="where logs and prepared folders are kept; default: a temporary folder"),
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
        help="(history, candidate) pairs per step, on either side; else 20, or on a GPU as many as fill it, "
        "and the paper's 200 for the reference",
        min=1,
    ),
]
Steps = Annotated[int, typer.Option(help="measured steps per turn, after three to warm up", min=1)]
Turns = Annotated[int, typer.Option(help="measurements of each side; the sides alternate", min=1)]
Threads = Annotated[int, typer.Option(help="CPU threads of both sides", min=1)]
Profile = Annotated[
    Path | None,
    typer.Option(help="file for a torch profiler trace (chrome://tracing, perfetto) of one more turn"),
]


def bench_of_model(mode: Literal["train", "evaluate"], example: str, text: str) -> None:
    """Declares `gensr bench MODE`. text: its help."""

    def bench(
        overrides: Overrides = None,
        pairs: Pairs = None,
        steps: Steps = 2,
        turns: Turns = 2,
        threads: Threads = 2,
        profile: Profile = None,
        as_json: AsJson = False,
    ) -> None:
        from trainer.bench.model import bench_model, bench_model_lines

        numbers = (pairs, steps, turns, threads)
        document = bench_model(mode, overrides or [], *numbers, trace=profile, progress=stage_lines())
        answer(document, as_json, *bench_model_lines(document))

    bench.__doc__ = text
    bench_app.command(name=mode, epilog=f"Example: {example}")(bench)


bench_of_model(
    "train",
    "gensr bench train model.prompt=compact --json",
    "Training steps against a reference written straight from the paper; flan-t5-base's shape with random "
    "weights unless settings say otherwise.",
)
bench_of_model(
    "evaluate",
    "gensr bench evaluate data.dir=data/prepared --pairs 100",
    "Scoring the candidates of events against the reference, which encodes every pair separately and calls "
    "generate().",
)


@bench_app.command(
    name="micro-batch", epilog="Example: gensr bench micro-batch scientific_small data.dir=data/scientific"
)
def bench_micro_batch(
    preset: MaybePreset = None,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="timed micro-batches, after one to warm up", min=1)] = 4,
    threads: Threads = 2,
    as_json: AsJson = False,
) -> None:
    """The fastest optim.micro_batch_size on this device, found by training with each, and how much of its
    memory each takes."""
    from trainer.bench import micro_batch as bench

    preset, settings = preset_and_settings(preset, overrides)
    document = bench.bench_micro_batch(preset, settings, steps, threads, progress=stage_lines())
    answer(document, as_json, *bench.bench_micro_batch_lines(document))
