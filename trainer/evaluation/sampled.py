"""`gensr evaluate`: rank every event's stored candidates once, over all processes, and write what came of it:
evaluation-SPLIT.parquet, evaluation-SPLIT.json.

With --candidates hard: among the folder's hard_negatives, into evaluation-SPLIT-hard.*.
"""

import hashlib
import json
import time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import trainer
from data_shards.schema import TASKS, Manifest
from data_shards.settings import to_dict
from trainer.config import Config, DataConfig
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.evaluation.baselines import each_baseline
from trainer.evaluation.evaluated_weights import evaluated_weights
from trainer.evaluation.lists import write_lists
from trainer.evaluation.metrics import INTERVALS, summarise
from trainer.evaluation.ranking import (
    CountProgress,
    EventRanks,
    GatherObjects,
    autocast_scorer,
    gather_over_group,
    rank_events,
)
from trainer.evaluation.segments import Segments, segment_reports, segments_of
from trainer.evaluation.summary import check_split, evaluation_name
from trainer.models.contract import Ranker
from trainer.models.zoo import model_class
from trainer.runs.provenance import git_commit, hardware_line
from trainer.runs.run_folder import RunFolder
from trainer.runtime.device import has_gpu
from trainer.runtime.files import atomic, write_json
from trainer.runtime.launch import read_launch, set_up_cpu
from trainer.runtime.progress import report as report_stage

BASELINE_BATCH = 1024  # events; baselines need no accelerator memory
BOOTSTRAP_SEED = 0
STORED = {"sampled": "stored", "hard": "hard"}  # candidates of the protocol → of EvalStream


# ---- the report --------------------------------------------------------------------------------------------


def task_reports(ranks: EventRanks, num_beams: int | None = None) -> dict[str, dict[str, Any]]:
    """{"rec": {"recall@5": …, "ci95": {…}, …}, "src": {…}}: the tasks that have events. num_beams: of a model
    that decodes (Ranker.beams); each task has share_reached then, of the candidates that some beam spells, on
    average over events."""
    reports = {}
    for task, name in enumerate(TASKS):
        chosen = ranks.of_task(task)
        if len(chosen.rank):
            reports[name] = summarise(
                torch.from_numpy(chosen.rank), torch.from_numpy(chosen.num_tied), chosen.user, BOOTSTRAP_SEED
            )
            if num_beams is not None:
                reports[name]["share_reached"] = float(chosen.share_reached.mean())
    return reports


def report(
    tasks: dict[str, dict[str, Any]],
    folder: PreparedFolder,
    split: str,
    config: Config,
    baselines: dict[str, Any] | None = None,
    segments: dict[str, Any] | None = None,
    candidates: str = "sampled",
    num_beams: int | None = None,
) -> dict[str, Any]:
    """The content of evaluation-SPLIT.json. tasks, segments: what task_reports() and segment_reports() make;
    candidates: sampled, hard or full; num_beams: Ranker.beams of the model."""
    protocol = {
        "model": config.model.name,
        "model_title": model_class(config.model.name).title,
        "candidates": candidates,
        "num_negatives": num_negatives(folder.manifest, candidates),
        "ties": "expected",
        "scores": "fp32",
        "split": split,
        "split_fingerprint": folder.manifest.fingerprint,
        "manifest_hash": folder.manifest.hash,
        "intervals": INTERVALS,
        "seed": BOOTSTRAP_SEED,
        "config_hash": config_hash(config),
        "precision": config.run.precision,
        "gensr_version": trainer.__version__,
        "git_commit": git_commit(),
        "hardware": hardware_line(),
        "evaluated_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **({"num_beams": num_beams} if num_beams is not None else {}),
    }
    return {
        "protocol": protocol,
        **tasks,
        **({"segments": segments} if segments is not None else {}),
        **({"baselines": baselines} if baselines is not None else {}),
    }


def num_negatives(manifest: Manifest, candidates: str) -> int:
    """Stored negatives of an event, of that kind of candidates."""
    return manifest.num_hard_negatives if candidates == "hard" else manifest.num_negatives


def config_hash(config: Config) -> str:
    """sha256 of the configuration without folders, tracking and serving: two runs of one experiment share
    it."""
    tree = to_dict(config)
    del tree["tracking"], tree["serving"], tree["data"]["dir"], tree["data"]["cache_dir"], tree["run"]["dir"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_evaluation(
    run_dir: str | Path,
    folder: PreparedFolder,
    name: str,
    ranks: EventRanks,
    document: dict[str, Any],
    segments: Segments | None = None,
    num_best: int = 0,
) -> Path:
    """RUN/evaluation-NAME.parquet (one row an event: original ids, rank, num_tied, its bucket in each
    segment), where num_best > 0 RUN/lists-NAME.parquet, then RUN/evaluation-NAME.json; returns the latter's
    path."""
    users = pq.read_table(folder.catalog / "users.parquet", columns=["user_id"])["user_id"]
    item_ids = folder.items("item_id")["item_id"]
    table = pa.table(
        {
            "task": pa.array(np.array(TASKS)[ranks.task.astype(np.int64)]),
            "user_id": users.take(pa.array(ranks.user)),
            "item_id": item_ids.take(pa.array(ranks.item)),
            "rank": ranks.rank,
            "num_tied": ranks.num_tied,
            "event_id": ranks.event_id,
            **{segment: pa.array(buckets, pa.string()) for segment, buckets in (segments or {}).items()},
        }
    )
    with atomic(RunFolder(run_dir).ranks(name)) as temporary:
        pq.write_table(table, temporary)
    if num_best:
        write_lists(RunFolder(run_dir).lists(name), ranks, num_best, table, item_ids, document["protocol"])
    path = RunFolder(run_dir).evaluation(name)
    write_json(path, document, allow_nan=False)
    return path


def baseline_reports(
    folder: PreparedFolder,
    split: str,
    rank: int = 0,
    world_size: int = 1,
    gather: GatherObjects | None = None,
    candidates: str = "sampled",
) -> dict[str, dict[str, Any]]:
    """{"popularity": {"rec": {…}}, "lightgcn": {"rec": {…}}, "bm25": {"src": {…}}} on the stored candidates.

    Left out: a baseline whose task has no events, and LightGCN in a folder without a CF table.
    """
    data = DataConfig(history_max=folder.manifest.history_max)
    stream = EvalStream(folder, split, data, BASELINE_BATCH, rank, world_size, candidates=STORED[candidates])

    def measure(name: str, baseline: Ranker) -> dict[str, Any]:
        ranks = rank_events(
            baseline.score,
            stream,
            gather,
            partial(report_stage, name),
            task=baseline.tasks[0],
            model=name,
        )
        return task_reports(ranks)

    return each_baseline(folder, set(folder.tasks(split)), measure)


# ---- the verb ----------------------------------------------------------------------------------------------


def evaluate_run(
    run_dir: str | Path,
    split: str = "test",
    with_baselines: bool = True,
    progress: CountProgress | None = None,
    candidates: str = "sampled",
    num_best: int = 0,
) -> dict[str, Any]:
    """Evaluate RUN/model on a split of its prepared folder; rank 0 writes
    RUN/evaluation-SPLIT.{json,parquet} (candidates="hard": evaluation-SPLIT-hard.*). → the document, on every
    rank. num_best: also RUN/lists-SPLIT.parquet, the best candidates of each event (write_lists).

    Runs alone, or on every process of accelerate launch or torchrun. Raises RunError for an unknown split or
    a run without a model, DataError for a folder without hard candidates.
    """
    from trainer.runs.weights import load_run_config, load_run_model  # transformers: seconds to import

    check_split(split)
    launch = read_launch()
    set_up_cpu(load_run_config(run_dir), launch)
    device = "cpu"
    if has_gpu():
        # a scheduler may show each process its own GPU only
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
        device = f"cuda:{torch.cuda.current_device()}"
    started_group = launch.world_size > 1 and not torch.distributed.is_initialized()
    if started_group:
        torch.distributed.init_process_group("gloo")  # rows are gathered as Python objects: gloo, on GPUs too
    try:
        stood = evaluated_weights(run_dir)
        model, config, folder = load_run_model(run_dir, device)
        stream = EvalStream(
            folder,
            split,
            config.data,
            config.run.eval_batch_size,
            launch.rank,
            launch.world_size,
            tasks=model.tasks,
            candidates=STORED[candidates],
        )
        gather = gather_over_group if launch.world_size > 1 else None
        started = time.monotonic()
        scorer = autocast_scorer(model, device, config.run.precision)
        num_best = min(num_best, 1 + num_negatives(folder.manifest, candidates))
        ranks = rank_events(scorer, stream, gather, progress, model=model.title, num_best=num_best)
        seconds = time.monotonic() - started
        baselines = None
        if with_baselines:
            baselines = baseline_reports(folder, split, launch.rank, launch.world_size, gather, candidates)
        report_stage("intervals", 0)
        segments = segments_of(folder, split, ranks) if launch.rank == 0 else {}  # it reads the split again
        segments = gather(segments)[0] if gather is not None else segments
        tasks, parts = task_reports(ranks, num_beams=model.beams()), segment_reports(ranks, segments)
        document = report(tasks, folder, split, config, baselines, parts, candidates, model.beams())
        num_pairs = len(ranks.rank) * (1 + document["protocol"]["num_negatives"])
        document["protocol"] |= {**stood, "num_processes": launch.world_size}
        document["protocol"]["candidates_per_s"] = round(num_pairs / max(seconds, 1e-9), 1)
        if launch.rank == 0:
            name = evaluation_name(split, candidates)
            write_evaluation(run_dir, folder, name, ranks, document, segments, num_best)
    finally:
        if started_group:
            torch.distributed.destroy_process_group()
    return document
