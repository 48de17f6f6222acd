"""Gradient conflict: layer by layer and over training, do search and recommendation pull the shared
parameters apart? From the checkpoints of a run, of any ZeRO stage, in one process.

The losses are the model's own, without dropout, on the same training events for every checkpoint: each event
reads the CF table that never saw its click, as in training. As many other events of one task give the cosine
that noise leaves: a task against itself, on the parameters that both share. On fewer it would be smaller.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards.schema import REC, SRC, TASKS
from trainer.analysis.drawing import Curve, curves_with_intervals, heat_map, write_figure
from trainer.analysis.gradients import TOTAL, compare, gradients_of
from trainer.analysis.pages import Part, Picture, Section, Table, Text
from trainer.batch import Batch
from trainer.data import TrainStream
from trainer.data.folder import PreparedFolder
from trainer.errors import DataError, RunError
from trainer.experiments.analyses.options import Options, name_of, need_runs, titled
from trainer.models.contract import Ranker
from trainer.models.zoo import model_class
from trainer.runs.checkpoint import listed, read_checkpoint
from trainer.runs.checkpoint_convert import trained_weights
from trainer.runs.run_folder import RunFolder
from trainer.runtime.progress import Notify

WHAT = "gradients"
BATCH_EVENTS = 64
COSINE_SPAN = 0.2  # that a picture shows at least: hundredths are noise
MAX_EVENTS = 512  # whose mean a gradient is


def measure(runs: Sequence[Path], options: Options, notify: Notify) -> dict[str, Any]:
    need_runs(runs, WHAT)
    most = min(options.num_events or MAX_EVENTS, MAX_EVENTS)
    return {"split": "train", "runs": [_run(Path(run), most, notify) for run in runs]}


def _run(run_dir: Path, most: int, notify: Notify) -> dict[str, Any]:
    from trainer.runs.weights import load_run_config, load_run_model

    name = name_of(run_dir)
    if set(model_class(name["model"]).tasks) != {REC, SRC}:
        raise RunError(f"{run_dir}: {name['title']} serves one task, so no gradients can conflict")
    model, _, folder = load_run_model(run_dir)
    config = load_run_config(run_dir)
    if getattr(getattr(config.model, "lora", None), "rank", 0):
        raise RunError(f"{run_dir} trains adapters, which RUN/model holds merged: gradients are not shown")
    # only the folds that training read: a model without a hold-out saw the full table there, too
    with_folds = getattr(config.model, "cf_holdout", "none") != "none"
    model.set_tables(folder.tables(model.needs, with_folds=with_folds))
    # The model alone, not its parts: in evaluation it would read the full CF table, which has seen these
    # very clicks. Its parts stay without dropout.
    model.training = True
    num_events = _events_of_a_gradient(run_dir, folder, most)
    batches = {task: _batches(folder, config, task, num_events) for task in (SRC, REC)}
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    best = int(RunFolder(run_dir).read_progress().get("best_step", 0))
    notify(f"{run_dir}: gradients of the best weights, step {best:,}")
    points = [_point(model, batches, best, is_best=True)]
    for step_name in reversed(listed(run_dir)):
        found = read_checkpoint(RunFolder(run_dir).checkpoints / step_name)
        if found.progress.step == best:
            continue
        notify(f"{run_dir}: gradients at step {found.progress.step:,}")
        model.load_state_dict(trained_weights(found, shapes), strict=False)
        points.append(_point(model, batches, found.progress.step, is_best=False))
    points.sort(key=lambda point: point["step"])
    return {**name, "num_events": num_events, "points": points}


def _events_of_a_gradient(run_dir: Path, folder: PreparedFolder, most: int) -> int:
    """Of whole batches, where there are as many: two gradients of each task must have no event in common."""
    counts = folder.manifest.raw["counts"]["train"]
    events = min(most, *(counts[TASKS[task]] // 2 for task in (SRC, REC)))
    if not events:
        raise DataError(f"{run_dir}: the training split has fewer than two events of one of the two tasks")
    return events // BATCH_EVENTS * BATCH_EVENTS or events


def _batches(folder: PreparedFolder, config: Any, task: int, num_events: int) -> tuple[list[Batch], ...]:
    """The first training events of a task, and as many others; the same in every call."""
    num_folds = folder.cf(users=False).num_folds if folder.has_cf else 0
    size = min(BATCH_EVENTS, num_events)
    stream = TrainStream(
        folder, config.data, 0, size, size, num_folds=num_folds, clicks=folder.item_clicks(), tasks=(task,)
    )
    found = list(islice(iter(stream), 2 * num_events // size))
    return found[0::2], found[1::2]


def _point(
    model: Ranker, batches: dict[int, tuple[list[Batch], ...]], step: int, is_best: bool
) -> dict[str, Any]:
    src, rec = ([gradients_of(model, _loss(model, part)) for part in batches[task]] for task in (SRC, REC))
    layers = compare(src[0], rec[0], layer=block_of)
    itself = {
        name: compare({key: one[key] for key in one if key in of_other[0]}, again)[-1].cosine
        for name, (one, again), of_other in (("src", src, rec), ("rec", rec, src))
    }
    return {"step": step, "best": is_best, "layers": [asdict(row) for row in layers], "itself": itself}


def _loss(model: Ranker, batches: Sequence[Batch]) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        torch.manual_seed(0)  # of models that draw negatives
        parts = [model(model.prepare(batch.to(model.device)))[0] for batch in batches]
        return torch.stack(parts).mean()

    return loss


def block_of(name: str) -> str:
    """The block that a parameter belongs to: encoder.block.0.layer.1.wo.weight → encoder.block.0."""
    parts = name.split(".")[:-1] or [name]
    for place, part in enumerate(parts):
        if part.isdigit() and place:
            return ".".join(parts[: place + 1])
    return ".".join(parts[:2])


# ---- page --------------------------------------------------------------------------------------------------


def section(document: dict[str, Any], folder: Path) -> Section:
    names = titled(document["runs"])
    sizes = " or ".join(str(number) for number in sorted({run["num_events"] for run in document["runs"]}))
    parts: list[Part] = [
        Text(
            "Cosine of the gradients of the search loss and the recommendation loss: below 0 the tasks pull "
            f"a layer apart. Each gradient is a mean over {sizes} training events. Beside it stands the "
            "cosine of one task's gradient with that of as many other events of the same task, which is what "
            "noise leaves of 1."
        )
    ]
    curves, rows = [], []
    for name, run in zip(names, document["runs"], strict=True):
        totals = [(point["step"], _total(point)) for point in run["points"]]
        shown = [(step, total["cosine"]) for step, total in totals if total["cosine"] is not None]
        if len(shown) > 1:
            curves.append(Curve(name, [step for step, _ in shown], [cosine for _, cosine in shown]))
        for point in run["points"]:
            total = _total(point)
            numbers = [total["cosine"], point["itself"]["src"], point["itself"]["rec"]]
            numbers += [total["conflicting_share"], total["magnitude_ratio"]]
            label = f"{point['step']:,}{' (best)' if point['best'] else ''}"
            rows.append([name, label, *(_number(value) for value in numbers)])
    if curves:
        title = "cosine of the two gradients, all layers"
        figure = curves_with_intervals({title: curves}, "step", least_span=COSINE_SPAN)
        path = write_figure(figure, folder / f"{WHAT}-training")[1]
        parts.append(Picture(path, "The cosine of both tasks' gradients over training, a line for each run."))
    head = ["model", "step", "cosine", "search with itself", "rec. with itself", "conflicting share"]
    parts.append(Table([*head, "‖search‖ / ‖rec.‖"], rows))
    for number, (name, run) in enumerate(zip(names, document["runs"], strict=True)):
        layers = [row["layer"] for row in run["points"][-1]["layers"]]
        values = [[_cosine(point, layer) for point in run["points"]] for layer in layers]
        steps = [f"{point['step']:,}" for point in run["points"]]
        figure = heat_map(values, layers, steps, f"{name}: cosine by layer and step", centre=0.0)
        path = write_figure(figure, folder / f"{WHAT}-layers-{number}")[1]
        parts.append(Picture(path, f"{name}: the cosine for each layer (rows) and step (columns)."))
    return Section("Gradient conflict", parts)


def _total(point: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in point["layers"] if row["layer"] == TOTAL)


def _cosine(point: dict[str, Any], layer: str) -> float:
    value = next((row["cosine"] for row in point["layers"] if row["layer"] == layer), None)
    return float("nan") if value is None else float(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
