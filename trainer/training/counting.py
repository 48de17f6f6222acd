"""A model without steps (popularity, item-kNN, BM25): counted once, measured on validation, saved as any
other."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from trainer.batch import Batch
from trainer.config import Config
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.evaluation.ranking import validate
from trainer.models.zoo import model_class
from trainer.runs import folder as runfolder
from trainer.runs.checkpoint import Progress
from trainer.runs.provenance import environment_facts
from trainer.runs.run_folder import RunFolder
from trainer.runs.weights import build_model, learnable_tasks, save_model
from trainer.runtime.distributed import gather_objects, on_main
from trainer.runtime.launch import devices
from trainer.tracking.tracker import Tracker
from trainer.training import plan


def count(config: Config, folder: PreparedFolder, accelerator: Any) -> tuple[dict[str, float], float]:
    """Writes RUN/model and what a trained run writes beside it → (validation metrics, seconds), on every
    process of a launch. Raises a GensrError for anything the user can mend."""
    started = time.monotonic()
    folder.check_settings(config.data)
    kind = model_class(config.model.name)
    plan.check_metric(config, learnable_tasks(kind, folder))
    model = build_model(config, folder, folder.tables(kind.reads(config.model)).to(accelerator.device))
    model.fit()
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

    def score(batch: Batch) -> torch.Tensor:
        return model.score(model.prepare(batch).to(accelerator.device))

    metrics = validate(score, valid, lambda rows: gather_objects(accelerator, rows))
    best = plan.selected(config, metrics)
    seconds = time.monotonic() - started
    on_main(accelerator, lambda: _write(config, folder, model, metrics, best, seconds, devices(accelerator)))
    return metrics, seconds


def _write(
    config: Config,
    folder: PreparedFolder,
    model: Any,
    metrics: dict[str, float],
    best: float,
    seconds: float,
    machine: str,
) -> None:
    run_dir = Path(config.run.dir)
    facts = {**environment_facts(), "parameters": {"total": 0, "trainable": 0}, "devices": machine}
    runfolder.write_facts(config, facts)
    save_model(RunFolder(run_dir).model, model, model.state_dict(), config, folder)
    record = {"kind": "valid", "step": 0, **metrics}
    RunFolder(run_dir).metrics.write_text(json.dumps(record) + "\n", encoding="utf-8")
    tracker = Tracker.start(config, run_dir, {**facts, "manifest": folder.manifest})
    tracker.log_metrics({f"valid/{name}": value for name, value in metrics.items()}, 0)
    tracker.finish("FINISHED")
    progress = Progress(best_value=best, best_metrics=dict(metrics), train_s=seconds)
    runfolder.write_status(run_dir, "finished", progress)
