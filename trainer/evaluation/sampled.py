"""`gensr evaluate`: rank every event's stored candidates once, over all processes, and write what came of it.

EvalStream (this rank's events) ─scorer─▶ scores_BC ─expected_ranks─▶ EventRanks ─gather─▶ EventRanks of all
    ─▶ evaluation-SPLIT.parquet, evaluation-SPLIT.json
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import trainer
from data_shards.schema import TASKS, Manifest
from data_shards.settings import to_dict
from trainer.analysis.figures import git_facts
from trainer.batch import Batch
from trainer.config import Config, DataConfig
from trainer.data import EvalStream, prefetched
from trainer.data.cf_table import cf_path
from trainer.data.node_cache import local_folder
from trainer.errors import RunError
from trainer.evaluation.metrics import METRICS, NUM_RESAMPLES, expected_ranks, metric_values, summarise
from trainer.models.baselines import BASELINES, Scorer
from trainer.runtime.device import autocast, has_gpu
from trainer.runtime.files import atomic
from trainer.runtime.launch import num_cores, read_launch, set_up_cpu

BASELINE_BATCH = 1024  # events; baselines need no accelerator memory
BOOTSTRAP_SEED = 0

# One value of this rank → the values of all ranks, in rank order, on every rank; for example
# partial(gather_objects, accelerator).
Gather = Callable[[Any], list[Any]]
CountProgress = Callable[[int, int], None]  # (batches done, batches in all) of this rank


@dataclass(frozen=True)
class EventRanks:
    """One row for each evaluated event, sorted by event_id; [n] each."""

    event_id: np.ndarray  # int64
    task: np.ndarray  # int64
    user: np.ndarray  # int64, row of the users table
    item: np.ndarray  # int64, the clicked item
    rank: np.ndarray  # float64, expected rank among the candidates, 1 = first
    tied: np.ndarray  # bool, another candidate has the clicked item's score
    num_nan: np.ndarray  # int64, candidates scored NaN (they rank last)

    def take(self, index: np.ndarray) -> "EventRanks":
        return EventRanks(**{name: column[index] for name, column in vars(self).items()})

    def of_task(self, task: int) -> "EventRanks":
        return self.take(self.task == task)

    @staticmethod
    def concatenate(parts: "list[EventRanks]") -> "EventRanks":
        return EventRanks(
            **{
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in EventRanks.__dataclass_fields__
            }
        )


# ---- ranking -----------------------------------------------------------------------------------------------


def rank_events(
    scorer: Scorer,
    stream: Iterable[Batch],
    gather: Gather | None = None,
    progress: CountProgress | None = None,
    task: int | None = None,
) -> EventRanks:
    """Score and rank this rank's batches, then gather all ranks' rows. Filler rows (event_id −1) are dropped.

    `task`: score the events of one task only. Every rank returns the same. Asserts that no event is lost or
    seen twice.
    """
    parts: list[EventRanks] = []
    num_skipped = 0
    num_batches = len(stream) if isinstance(stream, Sized) else 0
    with torch.no_grad():
        for number, batch in enumerate(prefetched(stream), start=1):
            if task is not None:
                num_skipped += int(((batch.event_id >= 0) & (batch.task != task)).sum())
                batch = batch.take(batch.task == task)
            # fillers are scored too, without a shortcut: under ZeRO-3 every rank must call the model equally
            # often
            parts.append(_rank_batch(scorer, batch))
            if progress is not None:
                progress(number, num_batches)
    assert parts, "every rank gets the same number of batches, at least one"
    mine = EventRanks.concatenate(parts)
    gathered = gather((mine, num_skipped)) if gather is not None else [(mine, num_skipped)]
    ranks = EventRanks.concatenate([rows for rows, _ in gathered])
    ranks = ranks.take(np.argsort(ranks.event_id, kind="stable"))
    assert len(np.unique(ranks.event_id)) == len(ranks.event_id), "an event was evaluated twice"
    expected = getattr(stream, "num_events", None)
    num_seen = len(ranks.event_id) + sum(skipped for _, skipped in gathered)
    assert expected is None or num_seen == expected, f"{num_seen} of {expected} events were evaluated"
    return ranks


def _rank_batch(scorer: Scorer, batch: Batch) -> EventRanks:
    scores_BC = scorer(batch).float().cpu()
    assert scores_BC.shape == batch.candidates.shape, (scores_BC.shape, batch.candidates.shape)
    rank, tied = expected_ranks(scores_BC, batch.labels)
    columns = {
        "event_id": batch.event_id,
        "task": batch.task,
        "user": batch.user,
        "item": batch.candidates.gather(1, batch.labels.argmax(1, keepdim=True))[:, 0],
        "rank": rank,
        "tied": tied,
        "num_nan": scores_BC.isnan().sum(1),
    }
    real = (batch.event_id >= 0).numpy()
    return EventRanks(**{name: column.numpy() for name, column in columns.items()}).take(real)


def validate(scorer: Scorer, stream: Iterable[Batch], gather: Gather | None = None) -> dict[str, float]:
    """Metrics during training, without intervals: {"rec/ndcg@10": …, "src/recall@5": …, "mean/mrr": …}.

    A task without events is left out; mean is over the tasks present.
    """
    ranks = rank_events(scorer, stream, gather)
    means = {
        name: metric_values(torch.from_numpy(ranks.of_task(task).rank)).mean(0)
        for task, name in enumerate(TASKS)
        if (ranks.task == task).any()
    }
    means["mean"] = torch.stack(list(means.values())).mean(0)
    return {
        f"{name}/{metric}": float(values[i])
        for name, values in means.items()
        for i, metric in enumerate(METRICS)
    }


# ---- the report --------------------------------------------------------------------------------------------


def task_reports(ranks: EventRanks, seed: int = BOOTSTRAP_SEED) -> dict[str, dict[str, Any]]:
    """{"rec": {"recall@5": …, "ci95": {…}, …}, "src": {…}}: the tasks that have events."""
    reports = {}
    for task, name in enumerate(TASKS):
        chosen = ranks.of_task(task)
        if len(chosen.rank):
            reports[name] = summarise(torch.from_numpy(chosen.rank), torch.from_numpy(chosen.tied), seed)
            reports[name]["num_nan_scores"] = int(chosen.num_nan.sum())
    return reports


def report(
    ranks: EventRanks,
    manifest: Manifest,
    split: str,
    config: Config | None = None,
    baselines: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of evaluation-SPLIT.json."""
    protocol = {
        "candidates": "sampled",
        "num_negatives": manifest.num_negatives,
        "ties": "expected",
        "scores": "fp32",
        "split": split,
        "split_fingerprint": manifest.fingerprint,
        "manifest_hash": manifest.hash,
        "intervals": f"95 % bootstrap over events, {NUM_RESAMPLES} resamples",
        "seed": BOOTSTRAP_SEED,
        "config_hash": config_hash(config) if config is not None else None,
        "precision": config.run.precision if config is not None else None,
        "gensr_version": trainer.__version__,
        "git_commit": git_commit(),
        "hardware": hardware(),
        "evaluated_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return {
        "protocol": protocol,
        **task_reports(ranks),
        **({"baselines": baselines} if baselines is not None else {}),
    }


def config_hash(config: Config) -> str:
    """sha256 of the configuration without folders and tracking: two runs of one experiment share it."""
    tree = to_dict(config)
    del tree["tracking"], tree["data"]["dir"], tree["data"]["cache_dir"], tree["run"]["dir"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def git_commit() -> str | None:
    """Commit of the checkout this code lies in, with "-dirty" when files differ; None outside a checkout."""
    facts = git_facts()
    return f"{facts['commit']}{'-dirty' if facts['dirty'] else ''}" if facts else None


def hardware() -> str:
    """Such as "NVIDIA H200" or "x86_64, 2 cores"."""
    return torch.cuda.get_device_name() if has_gpu() else f"{platform.machine()}, {num_cores()} cores"


def write_evaluation(
    run_dir: str | Path, folder: str | Path, split: str, ranks: EventRanks, document: dict[str, Any]
) -> Path:
    """RUN/evaluation-SPLIT.parquet (one row an event, original ids), then RUN/evaluation-SPLIT.json; returns
    the latter's path."""
    catalog = Path(folder) / "catalog"
    table = pa.table(
        {
            "task": pa.array(np.array(TASKS)[ranks.task.astype(np.int64)]),
            "user_id": pq.read_table(catalog / "users.parquet", columns=["user_id"])["user_id"].take(
                pa.array(ranks.user)
            ),
            "item_id": pq.read_table(catalog / "items.parquet", columns=["item_id"])["item_id"].take(
                pa.array(ranks.item)
            ),
            "rank": ranks.rank,
            "event_id": ranks.event_id,
        }
    )
    with atomic(Path(run_dir) / f"evaluation-{split}.parquet") as temporary:
        pq.write_table(table, temporary)
    path = Path(run_dir) / f"evaluation-{split}.json"
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def baseline_reports(
    folder: str | Path,
    manifest: Manifest,
    split: str,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
) -> dict[str, dict[str, Any]]:
    """{"popularity": {"rec": {…}}, "lightgcn": {"rec": {…}}, "bm25": {"src": {…}}} on the stored candidates.

    Left out: a baseline whose task has no events, and LightGCN in a folder without a CF table.
    """
    stream = EvalStream(folder, manifest, split, DataConfig(history_max=1), BASELINE_BATCH, rank, world_size)
    reports = {}
    for name, (task, build) in BASELINES.items():
        if not stream.has_task(task) or (name == "lightgcn" and not cf_path(folder).is_file()):
            continue
        reports[name] = task_reports(rank_events(build(folder, manifest), stream, gather, task=task))
    return reports


# ---- the verb ----------------------------------------------------------------------------------------------


def evaluate_run(
    run_dir: str | Path,
    split: str = "test",
    with_baselines: bool = True,
    progress: CountProgress | None = None,
) -> dict[str, Any]:
    """Evaluate RUN/model on a split of its prepared folder; rank 0 writes
    RUN/evaluation-SPLIT.{json,parquet}. → the document, on every rank.

    Runs alone, or on every process of accelerate launch or torchrun. Raises RunError for an unknown split or
    a run without a model.
    """
    from trainer.runs.weights import load_run_config, load_run_model  # transformers: seconds to import

    if split not in ("valid", "test"):
        raise RunError(f"split must be valid or test, got {split!r}")
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
        model, _, config, manifest = load_run_model(run_dir, device)
        folder = local_folder(config.data)
        stream = EvalStream(
            folder, manifest, split, config.data, config.run.eval_batch_size, launch.rank, launch.world_size
        )
        gather = gather_over_group if launch.world_size > 1 else None
        started = time.monotonic()
        ranks = rank_events(autocast_scorer(model, device, config.run.precision), stream, gather, progress)
        seconds = time.monotonic() - started
        baselines = (
            baseline_reports(folder, manifest, split, launch.rank, launch.world_size, gather)
            if with_baselines
            else None
        )
        document = report(ranks, manifest, split, config, baselines)
        document["protocol"]["num_processes"] = launch.world_size
        document["protocol"]["candidates_per_s"] = round(
            len(ranks.rank) * (1 + manifest.num_negatives) / max(seconds, 1e-9), 1
        )
        if launch.rank == 0:
            write_evaluation(run_dir, folder, split, ranks, document)
    finally:
        if started_group:
            torch.distributed.destroy_process_group()
    return document


def autocast_scorer(model: Any, device: str, precision: str) -> Scorer:
    """Batches to the device of a GenSR, scoring under the run's precision. Scores themselves come back as
    float32."""

    def scorer(batch: Batch) -> torch.Tensor:
        with autocast(device, precision):
            scores: torch.Tensor = model.score(model.grouped(batch).to(device))
        return scores

    return scorer


def gather_over_group(value: Any) -> list[Any]:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
