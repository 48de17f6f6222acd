"""The sections of a run's page. Each gives [] where the run holds nothing for it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_shards.secrets import mask_secrets, masked
from data_shards.settings import flatten, read_yaml
from trainer.analysis.drawing import Bar, Curve, bars_with_intervals, curves_with_intervals, write_figure
from trainer.analysis.pages import Fold, Part, Picture, Section, Table, Text
from trainer.analysis.report.asked import Asked, Example, Read
from trainer.evaluation.evaluated_weights import warnings_of
from trainer.evaluation.optimum import TITLE as OPTIMUM
from trainer.evaluation.optimum import optimum_of
from trainer.evaluation.segments import BUCKETS, METRIC
from trainer.evaluation.summary import (
    CANDIDATES,
    TASK_TITLES,
    evaluation_name,
    full_lines,
    protocol_line,
    read_evaluation,
    rows_of,
    short,
    title_of,
)
from trainer.runs.run_folder import RunFolder
from trainer.runtime.files import write_text
from trainer.runtime.progress import clock

METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr")
DRAWN = ("recall@10", "ndcg@10")


def results(run: RunFolder) -> list[Section]:
    """Metrics with intervals beside the baselines of each evaluation that the run has."""
    sections = []
    for split in ("test", "valid"):
        for candidates in CANDIDATES:
            name = evaluation_name(split, candidates)
            if run.evaluation(name).is_file():
                sections.append(_results(run, read_evaluation(run.path, split, candidates), split, name))
    return sections


def _results(run: RunFolder, document: dict[str, Any], split: str, name: str) -> Section:
    optimum = optimum_of(run.read_config().data.dir, document) if name == "test" else {}
    tasks = list(TASK_TITLES)
    rows = [*rows_of(document), *rows_of(optimum, OPTIMUM)]
    rows.sort(key=lambda row: tasks.index(row.task))
    metrics: dict[str, list[Bar]] = {}
    table = []
    for row in rows:
        cells = []
        for metric in METRICS:
            low, high = row.metrics.get("ci95", {}).get(metric, (None, None))
            if metric in DRAWN:
                bar = Bar(row.model, row.metrics[metric], low, high, row.task)
                metrics.setdefault(f"{TASK_TITLES[row.task]}: {metric}", []).append(bar)
            interval = "" if low is None else f" [{short(low)}, {short(high)}]"
            cells.append(short(row.metrics[metric]) + interval)
        table.append([TASK_TITLES[row.task], row.model, *cells, f"{row.metrics['num_events']:,}"])
    parts: list[Part] = [Text(protocol_line(document) + ".")]
    parts += [Text(line, warning=True) for line in warnings_of(run.path, name, document["protocol"])]
    for task, title in TASK_TITLES.items():
        if of_task := {panel: bars for panel, bars in metrics.items() if panel.startswith(title)}:
            path = write_figure(bars_with_intervals(of_task), run.report / f"results-{name}-{task}")[1]
            alt = f"{title}: bars of the model and its baselines for each metric, with intervals."
            parts.append(Picture(path, alt))
    parts += [
        Table(["task", "model", *METRICS, "events"], table),
    ]
    if optimum:
        parts.append(Text(f"The {OPTIMUM} ranks by what the simulator planted: no model should pass it."))
    if document["protocol"]["candidates"] == "full":
        parts += [Text(line.strip()) for line in full_lines(document)[1:]]
    return Section(f"Results, {split} split, {document['protocol']['candidates']} candidates", parts)


def training(run: RunFolder, records: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Validation by task with baselines as lines, losses, learning rate, throughput."""
    train = [record for record in records if record["kind"] == "train"]
    valid = [record for record in records if record["kind"] == "valid"]
    parts: list[Part] = []
    metrics = _validation(run, valid)
    for task, title in TASK_TITLES.items():
        if of_task := {panel: curves for panel, curves in metrics.items() if panel.startswith(title)}:
            figure = curves_with_intervals(of_task, "step")
            path = write_figure(figure, run.report / f"validation-{task}")[1]
            alt = f"{title}: validation metrics over training, a panel each, baselines as lines."
            parts.append(Picture(path, alt))
    if metrics:
        parts.append(
            Text(
                "Validation ranks sampled candidates. Baselines are flat lines; their names say of which "
                "split."
            )
        )
    losses = {
        name.replace("_", " "): [_curve(train, name, "")]
        for name in sorted({key for record in train for key in record if key.endswith("loss")})
    }
    if losses:
        path = write_figure(curves_with_intervals(losses, "step"), run.report / "losses")[1]
        parts.append(Picture(path, "Training losses over steps, a panel each.", "Training losses."))
    speed = {
        title: [_curve(train, name, "")]
        for name, title in (("lr", "learning rate"), ("events_per_s", "events per second"))
        if any(name in record for record in train)
    }
    if speed:
        path = write_figure(curves_with_intervals(speed, "step"), run.report / "speed")[1]
        parts.append(Picture(path, "Learning rate and events per second over steps."))
    return [Section("Training", parts)] if parts else []


def _curve(records: Sequence[Mapping[str, Any]], name: str, label: str, task: str = "") -> Curve:
    having = [record for record in records if record.get(name) is not None]
    return Curve(label, [record["step"] for record in having], [record[name] for record in having], task=task)


def _validation(run: RunFolder, valid: Sequence[Mapping[str, Any]]) -> dict[str, list[Curve]]:
    split = next((name for name in ("valid", "test") if run.evaluation(name).is_file()), "")
    document = read_evaluation(run.path, split) if split else {}
    rows = rows_of(document) if split else []
    baselines = [row for row in rows if row.model != title_of(document)]
    metrics: dict[str, list[Curve]] = {}
    for task, title in TASK_TITLES.items():
        for metric in DRAWN[::-1]:
            name = f"{task}/{metric}"
            if not any(name in record for record in valid):
                continue
            curve = _curve(valid, name, "this run", task)
            ends = [curve.x[0], curve.x[-1]] if len(curve.x) > 1 else [curve.x[0]]
            lines = [
                Curve(f"{row.model} ({split})", ends, [row.metrics[metric]] * len(ends))
                for row in baselines
                if row.task == task
            ]
            metrics[f"{title}: {metric}"] = [curve, *lines]
    return metrics


def segments(run: RunFolder) -> list[Section]:
    """NDCG@10 of parts of the test events."""
    if not run.evaluation("test").is_file():
        return []
    found = read_evaluation(run.path).get("segments", {})
    parts: list[Part] = []
    for segment, buckets in BUCKETS.items():
        bars, rows = [], []
        for task in TASK_TITLES:
            of_task = found.get(task, {}).get(segment, {})
            for bucket in (bucket for bucket in buckets if bucket in of_task):
                value, (low, high) = of_task[bucket][METRIC], of_task[bucket]["ci95"][METRIC]
                bars.append(Bar(bucket, value, low, high, TASK_TITLES[task].lower()))
                cells = [
                    f"{short(value)} [{short(low)}, {short(high)}]",
                    f"{of_task[bucket]['num_events']:,}",
                ]
                rows.append([TASK_TITLES[task], bucket, *cells])
        if bars:
            title = segment.replace("_", " ")
            order = {bucket: place for place, bucket in enumerate(buckets)}
            bars.sort(key=lambda bar: (order[bar.label], bar.task))
            figure = bars_with_intervals({f"{METRIC} by {title}": bars})
            path = write_figure(figure, run.report / f"segment-{segment.replace('_', '-')}")[1]
            parts += [Picture(path, f"Bars of {METRIC} for each bucket of {title}, both tasks.")]
            parts += [Table(["task", title, METRIC, "events"], rows)]
    return [Section("By segment, test split, sampled candidates", parts)] if parts else []


def calibration(run: RunFolder, asked: Mapping[str, Asked]) -> list[Section]:
    """The reliability diagram of P(Yes)."""
    metrics, rows = {}, []
    for task in (task for task in TASK_TITLES if task in asked):
        found = asked[task].reliability
        if found is None:
            continue
        p, y, low, high = (
            [getattr(one, name) for one in found.bins] for name in ("probability", "share", "low", "high")
        )
        end = max(*p, *y)
        metrics[f"{TASK_TITLES[task]}: share clicked"] = [
            Curve("this run", p, y, low, high, task),
            Curve("calibrated", [0.0, end], [0.0, end]),
        ]
        constant = found.base_rate * (1 - found.base_rate)
        numbers = [found.error, found.brier, constant, found.base_rate]
        rows.append([TASK_TITLES[task], *(f"{value:.3f}" for value in numbers), f"{found.num_pairs:,}"])
    if not metrics:
        return []
    negatives = next(iter(asked.values())).num_negatives
    path = write_figure(curves_with_intervals(metrics, "P(click) of the model"), run.report / "calibration")[
        1
    ]
    return [
        Section(
            "Calibration of P(click)",
            [
                Text(
                    f"Each clicked item with {negatives} negatives of its event, as in training: with "
                    "other base rates the probabilities mean something else. Points hold equally many "
                    "pairs, intervals resample users. The Brier score of a constant is what knowing the "
                    "base rate alone gives."
                ),
                Picture(path, "Share of clicks against the model's probability, with the diagonal."),
                Table(
                    ["task", "calibration error", "Brier", "Brier of a constant", "base rate", "pairs"], rows
                ),
            ],
        )
    ]


def examples(asked: Mapping[str, Asked]) -> list[Section]:
    """The best and the worst answers among the events that were asked."""
    parts: list[Part] = []
    for task in (task for task in TASK_TITLES if task in asked):
        for title, found in (("best", asked[task].best), ("worst", asked[task].worst)):
            head = [
                "user",
                "query",
                "clicked item",
                "its rank",
                "P",
                "ranked first",
                "P",
                "read of the history",
            ]
            if task == "rec":
                head.remove("query")
            rows = [_example(one, task) for one in found]
            caption = f"{TASK_TITLES[task]}: {title} answers among {asked[task].num_events:,} test events"
            parts.append(Table(head, rows, caption, words=True))
    if not parts:
        return []
    note = Text(
        "Of the history, the items that weigh most for the clicked item: weights of the soft filters where "
        "the model has them (Eq. 5), else the newest."
    )
    return [Section("Best and worst answers", [note, *parts])]


def _example(one: Example, task: str) -> list[str]:
    cells = [
        one.user,
        *([one.query] if task == "src" else []),
        one.clicked,
        f"{one.rank:g} of {one.num_candidates}",
    ]
    read = "; ".join(map(_read, one.history))
    rest = "" if one.num_history <= len(one.history) else f"; and {one.num_history - len(one.history)} more"
    first = "the clicked item" if one.rank == 1 else one.first
    return [
        *cells,
        short(one.probability),
        first,
        short(one.first_probability),
        (read + rest) or "no history",
    ]


def _read(one: Read) -> str:
    """`Red lamp, 30 cm (searched, cf .119, semantic .052)`: titles have commas of their own."""
    facts = [*(["searched"] if one.searched else []), *(f"{k} {short(v)}" for k, v in one.weights.items())]
    return f"{one.item} ({', '.join(facts)})" if facts else one.item


def provenance(run: RunFolder) -> list[Section]:
    """Status, code, machine, and the whole configuration."""
    status, environment = run.read_status(), masked(run.read_environment())
    progress = status.get("progress", {})
    git = environment.get("git", {})
    machine = [
        f"{environment[key]}{unit}"
        for key, unit in (("devices", ""), ("cpu_cores", " cores"), ("memory_gb", " GB"), ("platform", ""))
        if environment.get(key)
    ]
    rows = [
        ["status", str(status.get("status", "unknown"))],
        ["steps", f"{progress.get('step', 0):,}, best {progress.get('best_step', 0):,}"],
        ["training time", clock(float(progress.get("train_s", 0.0)))],
        ["commit", f"{git.get('commit', 'unknown')}{' with changes' if git.get('dirty') else ''}"],
        ["machine", ", ".join(machine) or "unknown"],
    ]
    parts: list[Part] = [Table([], rows, words=True)]
    if run.config.is_file():
        settings = flatten(masked(read_yaml(run.config)))
        text = "\n".join(
            f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()
        )
        parts.append(Fold("Configuration: RUN/config.yaml", mask_secrets(text)))
    parts.append(
        Fold("Environment: RUN/environment.json", json.dumps(environment, indent=1, ensure_ascii=False))
    )
    return [Section("Configuration and provenance", parts)]


def left_out(reason: str) -> list[Section]:
    return [Section("Calibration and examples", [Text(f"Left out: {reason}", warning=True)])]


def write_asked(asked: Mapping[str, Asked], path: Path) -> None:
    """The numbers behind calibration and examples."""
    document = {task: asdict(found) for task, found in asked.items()}
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
