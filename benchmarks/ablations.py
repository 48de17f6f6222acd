"""What each part of a training recipe is worth: the preset and the preset with one thing changed, the same
steps and seeds, on validation.

    python -m benchmarks.ablations FOLDER OUT [--preset scientific_small] [--steps 645] [--seeds 3] [--jobs 2]
        [VARIANT:KEY=VALUE,KEY=VALUE ...]

FOLDER is a prepared folder. Without VARIANTs those of docs/RESULTS.md are run. Prints NDCG@10 of the last
validation (sampled, run.valid_events events): mean and half of the 95 % t interval over seeds, and the
difference from the preset, paired by seed. Interrupted, the same command goes on.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from data_shards.settings import to_yaml
from trainer.analysis.figures import read_records
from trainer.analysis.significance import seed_interval
from trainer.bench.data import hardware
from trainer.configs import load_config
from trainer.evaluation.bootstrap import ANY
from trainer.evaluation.summary import short, signed
from trainer.experiments.cells import Cell, run_cells
from trainer.experiments.pool import interruptible
from trainer.runs.provenance import git_commit
from trainer.runtime.files import atomic

PRESET = "as the preset"
METRICS = {"rec/ndcg@10": "recommendation", "src/ndcg@10": "search"}
VARIANTS = (
    "no evidence:model.evidence=false",
    "no mined negatives:model.mined_negatives=0",
    "no listwise loss:model.listwise_weight=0",
    "more negatives:data.num_negatives=9,model.mined_negatives=4",
    "no dropout:model.dropout=0",
)


def cells_of(args: argparse.Namespace, settings: Path) -> dict[str, list[Cell]]:
    """Variant → a run for each seed."""
    found = {}
    for variant in (f"{PRESET}:", *(args.variants or VARIANTS)):
        title, _, overrides = variant.partition(":")
        name = title.replace(" ", "-")
        found[title] = [
            Cell(
                model="gensr",
                name=f"{name}-seed-{seed}",
                run_dir=args.out / name / f"seed-{seed}",
                settings_file=settings,
                overrides=(f"run.seed={seed}", *filter(None, overrides.split(","))),
                log=args.out / "logs" / f"{name}-seed-{seed}.log",
            )
            for seed in range(args.seeds)
        ]
    return found


def last_validation(run_dir: Path, metric: str) -> float:
    return float([record for record in read_records(run_dir) if record["kind"] == "valid"][-1][metric])


def half_interval(values: np.ndarray) -> float:
    """Of the mean, 95 %, t distribution; nan for one value."""
    if len(values) < 2:
        return float("nan")
    found = seed_interval(values.tolist(), ANY)
    return (found.high - found.low) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="scientific_small")
    parser.add_argument("--steps", type=int, default=645)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("variants", nargs="*", metavar="VARIANT:KEY=VALUE,…")
    args = parser.parse_intermixed_args()  # VARIANTS may follow options
    overrides = [
        f"data.dir={args.folder}",
        f"run.max_steps={args.steps}",
        "run.threads=1",
        "tracking.enabled=false",
    ]
    config = load_config(args.preset, overrides)
    with atomic(args.out / "settings.yaml") as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")
    cells = cells_of(args, args.out / "settings.yaml")
    every = {cells[title][seed].name: cells[title][seed] for seed in range(args.seeds) for title in cells}
    with interruptible():
        errors = run_cells(every, (), 0, args.jobs, lambda line: print(line, file=sys.stderr, flush=True))
    if errors:
        sys.exit("\n".join(f"{name}: {error}" for name, error in errors.items()))
    events = config.run.valid_events
    print(
        f"{args.preset}, {args.steps} steps, {args.seeds} seeds, {events} validation events, sampled NDCG@10"
    )
    print("commit {}; {cpu}, {cores} cores\n".format(git_commit(), **hardware()))
    print("| | " + " | ".join(f"{title} | difference" for title in METRICS.values()) + " |")
    print("|---|" + "---|" * 2 * len(METRICS))
    base = {metric: values_of(cells[PRESET], metric) for metric in METRICS}
    for title, of_variant in cells.items():
        row = [title]
        for metric in METRICS:
            values = values_of(of_variant, metric)
            row.append(f"{short(values.mean())} ± {short(half_interval(values))}")
            apart = values - base[metric]
            row.append("" if title == PRESET else f"{signed(apart.mean())} ± {short(half_interval(apart))}")
        print("| " + " | ".join(row) + " |")


def values_of(cells: list[Cell], metric: str) -> np.ndarray:
    return np.array([last_validation(cell.run_dir, metric) for cell in cells])


if __name__ == "__main__":
    main()
