"""A run without steps: a model that is counted (popularity, item-kNN, BM25), or any other as it begins
(run.max_epochs=0). Measured once on validation, saved as one that was trained."""

import time
from pathlib import Path
from typing import Any

from data_shards.checksum import file_sha256
from trainer.config import Config
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.evaluation.ranking import autocast_scorer, validate
from trainer.models.zoo import model_class
from trainer.runs.checkpoint import Progress
from trainer.runs.claim import write_facts
from trainer.runs.provenance import environment_facts
from trainer.runs.run_folder import RunFolder
from trainer.runs.status import write_status
from trainer.runs.warm_start import start_weights
from trainer.runs.weights import WEIGHTS, build_model, learnable_tasks, save_model
from trainer.runtime.distributed import gather_objects, on_main
from trainer.runtime.launch import devices
from trainer.tracking.tracker import Tracker
from trainer.training import plan
from trainer.training.console import RunConsole


def count(config: Config, folder: PreparedFolder, accelerator: Any) -> tuple[dict[str, float], float]:
    """Writes RUN/model and what a trained run writes beside it → (validation metrics, seconds), on every
    process of a launch. Raises a GensrError for anything the user can mend."""
    from accelerate.utils import set_seed

    started = time.monotonic()
    folder.check_settings(config.data)
    kind = model_class(config.model.name)
    plan.check_metric(config, learnable_tasks(kind, folder))
    set_seed(config.run.seed)  # the same weights on every rank
    model = build_model(config, folder, folder.tables(kind.reads(config.model)).to(accelerator.device))
    taken = start_weights(model, config, folder)
    model.to(accelerator.device).eval()
    rank, world_size = accelerator.process_index, accelerator.num_processes
    valid = EvalStream(
        folder,
        "valid",
        config.data,
        config.run.eval_batch_size,
        rank,
        world_size,
        config.run.valid_events,
        tasks=model.tasks,
    )
    score = autocast_scorer(model, str(accelerator.device), config.run.precision)
    metrics = validate(score, valid, lambda rows: gather_objects(accelerator, rows), model=model.title)
    best = plan.selected(config, metrics)
    seconds = time.monotonic() - started
    where = devices(accelerator)
    on_main(accelerator, lambda: _write(config, folder, model, metrics, best, seconds, where, taken))
    return metrics, seconds


def _write(
    config: Config,
    folder: PreparedFolder,
    model: Any,
    metrics: dict[str, float],
    best: float,
    seconds: float,
    machine: str,
    taken: str,
) -> None:
    run_dir = Path(config.run.dir)
    size = plan.size_of(model)
    parameters = {"total": size.total, "trainable": size.trainable}
    facts = {**environment_facts(), "parameters": parameters, "devices": machine}
    write_facts(config, facts)
    started = config.run.init_from
    begun_with = file_sha256(RunFolder(started).model / WEIGHTS) if started else ""
    path = RunFolder(run_dir).model
    save_model(path, model, model.state_dict(), config, folder, begun_with=begun_with)
    with RunConsole(run_dir, num_steps=0) as console:
        console.say(*([f"init_from: {taken}"] if taken else []))
        console.record({"kind": "valid", "step": 0, **metrics})
    tracker = Tracker.start(config, run_dir, {**facts, "manifest": folder.manifest})
    tracker.log_metrics({f"valid/{name}": value for name, value in metrics.items()}, 0)
    tracker.finish("FINISHED")
    progress = Progress(best_value=best, best_metrics=dict(metrics), train_s=seconds)
    write_status(run_dir, "finished", progress)
