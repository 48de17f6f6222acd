"""RUN/metrics.jsonl → pictures and a summary. Also what a run records about the code and the machine it ran
on."""

import json
import shlex
from pathlib import Path
from typing import Any

from trainer.errors import RunError
from trainer.runs.checkpoint import Progress
from trainer.runs.run_folder import RunFolder, is_number
from trainer.runtime.files import atomic
from trainer.runtime.progress import clock


def read_records(run_dir: str | Path) -> list[dict[str, Any]]:
    """All records of RUN/metrics.jsonl, oldest first. Raises RunError when there are none."""
    path = RunFolder(run_dir).metrics
    if not path.is_file():
        raise RunError(
            f"{run_dir} is not a run folder: metrics.jsonl is missing. Train one with: gensr train"
        )
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a killed process's last line
            continue
        if isinstance(record, dict) and "kind" in record and is_number(record.get("step")):
            numbers = {key: value for key, value in record.items() if is_number(value)}
            records.append({"kind": record["kind"], **numbers})
    return records


def plot_run(run_dir: str | Path) -> list[Path]:
    """Write RUN/report/loss.png and metrics.png from metrics.jsonl; returns the files. A picture without data
    is left out."""
    records = read_records(run_dir)
    folder = RunFolder(run_dir).report
    train = [r for r in records if r["kind"] == "train"]
    valid = [r for r in records if r["kind"] == "valid"]
    written = []
    if train:
        losses = {
            name: [r.get(name) for r in train]
            for name in sorted({k for r in train for k in r if k.endswith("loss")})
        }
        steps = [r["step"] for r in train]
        written.append(
            _plot(
                folder / "loss.png",
                {name: (steps, values) for name, values in losses.items()},
                "loss",
                "training",
                log_scale=True,
            )
        )
    if valid:
        names = [
            n
            for n in sorted({k for r in valid for k in r})
            if n.rpartition("/")[2] in ("ndcg@10", "recall@10", "mrr")
        ]
        points = {n: ([r["step"] for r in valid if n in r], [r[n] for r in valid if n in r]) for n in names}
        written.append(
            _plot(folder / "metrics.png", points, "metric, sampled candidates", "validation", markers=True)
        )
    return written


def _plot(
    path: Path,
    curves: dict[str, tuple[list[int], list[Any]]],
    ylabel: str,
    title: str,
    log_scale: bool = False,
    markers: bool = False,
) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for name, (steps, values) in curves.items():
        points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None and v == v]
        if points:
            axes.plot(
                [s for s, _ in points],
                [v for _, v in points],
                label=name,
                marker="o" if markers else None,
                markersize=3,
                linewidth=1.3,
            )
    if log_scale and all(v is None or v > 0 for _, values in curves.values() for v in values):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))  # beside the lines, never on them
    figure.tight_layout()
    with atomic(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", format="png")
    pyplot.close(figure)
    return path


def metric_rows(metrics: dict[str, float]) -> list[str]:
    """A small table of the usual metrics: one line a task."""
    names = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr")
    lines = [f"{'':<6}" + "".join(f"{name:>11}" for name in names)]
    for task in ("rec", "src", "mean"):
        if any(f"{task}/{name}" in metrics for name in names):
            cells = (
                f"{metrics[f'{task}/{name}']:>11.4f}" if f"{task}/{name}" in metrics else f"{'–':>11}"
                for name in names
            )
            lines.append(f"{task:<6}" + "".join(cells))
    return lines


def last_screen(run_dir: str | Path, progress: Progress, num_valid_events: int) -> list[str]:
    """What a finished run says: the best step and its metrics, where things are, what to do next."""
    place = shlex.quote(str(run_dir))
    return [
        "",
        f"best step {progress.best_step:,} of {progress.step:,}, {clock(progress.train_s)} of training",
        f"validation on {num_valid_events:,} events, sampled candidates:",
        *metric_rows(progress.best_metrics),
        f"model     {Path(run_dir) / 'model'}",
        f"pictures  {Path(run_dir) / 'report'}",
        f"next      gensr evaluate {place} --split test",
        f"          gensr register {place} NAME",
    ]
