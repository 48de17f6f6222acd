"""`gensr evaluate RUN --candidates full`: a ranking of the whole catalogue. Never mixed with the sampled
metrics: files of its own.

models with views     retrieval, with a retriever if one is given, finds NUM_CANDIDATES items, the model
                      ranks them, as its service does; a clicked item that it misses counts 0 in every
                      metric
others, baselines     score and rank every item
Both leave out what the user had clicked strictly before the event (in either task, all of it), but never the
clicked item itself.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.schema import TASKS
from trainer.batch import Batch
from trainer.config import DataConfig
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.errors import RunError
from trainer.evaluation.baselines import each_baseline
from trainer.evaluation.evaluated_weights import evaluated_weights
from trainer.evaluation.ranking import (
    CountProgress,
    EventRanks,
    ScoreFunction,
    autocast_scorer,
    rank_events,
    ranks_of,
    refuse_nan,
)
from trainer.evaluation.sampled import report, task_reports, write_evaluation
from trainer.evaluation.segments import segment_reports, segments_of
from trainer.evaluation.summary import check_split, evaluation_name
from trainer.models.contract import Ranker, task_names
from trainer.runs.retriever_facts import RETRIEVER
from trainer.runs.run_folder import RunFolder
from trainer.runs.weights import load_run_config, load_run_model
from trainer.runtime.device import autocast, default_device
from trainer.runtime.launch import read_launch, set_up_cpu
from trainer.runtime.progress import Notify, silent
from trainer.serving.recommend import NUM_CANDIDATES
from trainer.serving.retrieval import NO_ROWS, Retrieval, describe, questions_of, run_retrieval
from trainer.serving.retriever import Retriever, chosen_retriever, open_retriever
from trainer.serving.users import ClickLog, read_clicks

MAX_EVENTS = 2000
RETRIEVAL_CUTOFFS = (100, NUM_CANDIDATES)
TOP = 10  # of each list, for coverage and popularity
BATCH_SCORES = 2**22  # scores of the whole catalogue held at once: 16 MiB


def evaluate_full(
    run_dir: str | Path,
    split: str = "test",
    max_events: int = MAX_EVENTS,
    with_baselines: bool = True,
    progress: CountProgress | None = None,
    notify: Notify = silent,
    retriever: str | Path | None = None,
    num_best: int = 0,
) -> dict[str, Any]:
    """Writes RUN/evaluation-SPLIT-full.{json,parquet} → the document. max_events: a fixed hashed sample of
    the split; 0 = all. One process. retriever: a run folder, "" for none; default: the run's
    serving.retriever. num_best: as evaluate_run().

    Raises RunError for an unknown split, a run without a model, or several processes, and what
    open_retriever() raises.
    """
    run_dir = Path(run_dir)
    check_split(split)
    launch = read_launch()
    if launch.world_size > 1:
        raise RunError("--candidates full runs in one process: start it without a launcher")
    set_up_cpu(load_run_config(run_dir), launch)
    device = default_device()
    stood = evaluated_weights(run_dir)
    model, config, folder = load_run_model(run_dir, device)
    retrieval = run_retrieval(run_dir, model, notify)
    manifest = folder.manifest
    # as many pairs at once as on sampled candidates
    batch_size = max(1, config.run.eval_batch_size * (1 + manifest.num_negatives) // NUM_CANDIDATES)
    stream = EvalStream(folder, split, config.data, batch_size, max_events=max_events, tasks=model.tasks)
    chosen = chosen_retriever(config, retriever)
    other = open_retriever(
        chosen,
        model_dir=RunFolder(run_dir).model,
        tasks=task_names(model),
        item_ids=folder.item_ids(),
        retrieval=retrieval,
        device=device,
        notify=notify,
    )
    clicks = read_clicks(folder)
    started = time.monotonic()
    places: np.ndarray | None = None
    num_best = min(num_best, NUM_CANDIDATES if retrieval is not None else manifest.num_items)
    if retrieval is not None:
        scorer = autocast_scorer(model, device, config.run.precision)
        ours, places = rank_retrieved(scorer, model, retrieval, stream, clicks, progress, other, num_best)
    else:
        ours = rank_everything(model, stream, clicks, config.run.precision, progress, num_best)
    seconds = time.monotonic() - started
    popularity = folder.items("train_rec_clicks")["train_rec_clicks"].to_numpy()
    baselines = None
    if with_baselines:
        baselines = baseline_reports(folder, split, max_events, model.tasks, clicks, popularity, notify)
    segments = segments_of(folder, split, ours)
    num_beams = model.beams(catalogue=retrieval is None)
    tasks = reports(ours, popularity, num_beams)
    if places is not None:
        for task, facts in tasks.items():
            facts["retrieval"] = retrieval_recall(places, ours, TASKS.index(task))
    parts = segment_reports(ours, segments)
    document = report(tasks, folder, split, config, baselines, parts, "full", num_beams)
    del document["protocol"]["num_negatives"]
    document["protocol"] |= {**stood, **protocol_of(split, stream, clicks, retrieval, other, seconds)}
    write_evaluation(run_dir, folder, evaluation_name(split, "full"), ours, document, segments, num_best)
    return document


def protocol_of(
    split: str,
    stream: EvalStream,
    clicks: ClickLog,
    retrieval: Retrieval | None,
    retriever: Retriever | None,
    seconds: float,
) -> dict[str, Any]:
    """How the events of `stream` were ranked in `seconds`."""
    manifest = stream.folder.manifest
    clicked_before = (
        item in clicks.before(event)
        for event, item in zip(stream.column("event_id"), stream.column("item"), strict=True)
    )
    return {
        "num_items": manifest.num_items,
        "num_events": stream.num_events,
        "num_events_of_split": manifest.num_events(split),
        "ranked_by_model": NUM_CANDIDATES if retrieval is not None else manifest.num_items,
        "left_out": "all items clicked strictly before the event by its user, in either task; "
        "never the clicked item itself",
        "missed_by_retrieval": "counts 0",
        "clicked_before": int(sum(clicked_before)),
        "indexes": describe(retrieval) if retrieval is not None else {},
        **({RETRIEVER: dict(retriever.facts)} if retriever is not None else {}),
        "events_per_s": round(stream.num_events / max(seconds, 1e-9), 2),
    }


def baseline_reports(
    folder: PreparedFolder,
    split: str,
    max_events: int,
    tasks: tuple[int, ...],
    clicks: ClickLog,
    popularity: np.ndarray,
    notify: Notify,
) -> dict[str, dict[str, Any]]:
    """The same events, every item scored, with histories as long as the folder holds them."""
    data = DataConfig(history_max=folder.manifest.history_max)
    stream = EvalStream(folder, split, data, batch_size=256, max_events=max_events, tasks=tasks)

    def measure(name: str, baseline: Ranker) -> dict[str, Any]:
        notify(f"{name}: every item")
        return reports(rank_everything(baseline, stream, clicks), popularity)

    present = set(np.unique(stream.column("task")).tolist())
    return each_baseline(folder, present, measure)


# ---- models with views: retrieve, then rank ----------------------------------------------------------------


def rank_retrieved(
    scorer: ScoreFunction,
    model: Ranker,
    retrieval: Retrieval,
    stream: EvalStream,
    clicks: ClickLog,
    progress: CountProgress | None = None,
    retriever: Retriever | None = None,
    num_best: int = 0,
) -> tuple[EventRanks, np.ndarray]:
    """→ what the model makes of the first NUM_CANDIDATES retrieved items, with at least TOP best ones; and
    the clicked item's place in retrieval, [n] float64, 1 = first, inf = missed."""
    parts, places = [], []
    whole_histories = stream.read_as(DataConfig(history_max=stream.folder.manifest.history_max))
    batches = zip(stream, whole_histories, read_by(retriever, stream), strict=True)
    for number, (batch, whole, same_events) in enumerate(batches, start=1):
        batch = batch.take(batch.event_id >= 0)
        clicked: np.ndarray = batch.clicked.numpy()
        lists = retrieved(model, retrieval, batch, whole, clicked, clicks, retriever, same_events)
        places += [place_of(int(item), rows) for item, rows in zip(clicked, lists, strict=True)]
        scores_BC, candidates_BC = score_lists(scorer, batch, [rows[:NUM_CANDIDATES] for rows in lists])
        parts.append(ranks_among(scores_BC, candidates_BC, batch, clicked, max(TOP, num_best)))
        if progress is not None:
            progress(number, len(stream))
    ranks = EventRanks.concatenate(parts)
    refuse_nan(model.title, ranks.event_id, ranks.num_nan)
    return ranks, np.array(places)


def read_by(retriever: Retriever | None, stream: EvalStream) -> Iterable[Batch | None]:
    """The batches of a stream as a retriever reads them, with its own length of histories; None for each
    without one."""
    if retriever is None:
        return [None] * len(stream)
    return stream.read_as(retriever.scorer.model.world.data)


def retrieved(
    model: Ranker,
    retrieval: Retrieval,
    batch: Batch,
    whole: Batch,
    clicked: np.ndarray,
    clicks: ClickLog,
    retriever: Retriever | None = None,
    same_events: Batch | None = None,
) -> list[np.ndarray]:
    """Rows of the items that retrieval finds for each event, as many as the deepest cutoff needs. The same
    events (filler rows are dropped) with longer histories: whole, as a request has them; same_events, as the
    retriever reads them."""
    whole = whole.take(whole.event_id >= 0)
    seen = [
        np.setdiff1d(clicks.before(event), [item]).tolist()
        for event, item in zip(batch.event_id.tolist(), clicked.tolist(), strict=True)
    ]
    beside = [NO_ROWS] * batch.num_events
    if retriever is not None and same_events is not None:
        same_events = same_events.take(same_events.event_id >= 0)
        assert same_events.event_id.tolist() == batch.event_id.tolist()
        beside = retriever.best_of_events(same_events, whole, NUM_CANDIDATES, seen)
    with torch.inference_mode():
        on_device = batch.to(model.device)
        asked = questions_of(model, retrieval, on_device, whole.to(model.device))
        lists = []
        for row in range(batch.num_events):
            questions = {name: vectors_BW[row] for name, vectors_BW in asked.items()}
            event = nullcontext(on_device.rows(row, row + 1))
            lists.append(
                retrieval.pre_ranked(
                    questions,
                    task=int(batch.task[row]),
                    asking=event,
                    num_candidates=NUM_CANDIDATES,
                    exclude=seen[row],
                    beside=beside[row],
                )
            )
    return lists


def place_of(item: int, rows: np.ndarray) -> float:
    at = np.flatnonzero(rows == item)
    return float(at[0] + 1) if len(at) else np.inf


def score_lists(scorer: ScoreFunction, batch: Batch, lists: list[np.ndarray]) -> tuple[Tensor, np.ndarray]:
    """Lists of items of different lengths, one an event → scores [B, C] (−inf for padding) and items [B, C]
    (−1 for padding)."""
    items_BC = np.full((len(lists), max(1, *map(len, lists))), -1, np.int64)
    for row, rows in enumerate(lists):
        items_BC[row, : len(rows)] = rows
    candidates_BC = torch.from_numpy(np.maximum(items_BC, 0))
    with torch.no_grad():
        scores_BC = scorer(batch.with_candidates(candidates_BC, torch.zeros(candidates_BC.shape)))
    scores_BC = scores_BC.float().cpu()
    return scores_BC.masked_fill(torch.from_numpy(items_BC < 0), -torch.inf), items_BC


def ranks_among(
    scores_BC: Tensor, items_BC: np.ndarray, batch: Batch, clicked: np.ndarray, num_best: int
) -> EventRanks:
    """Expected rank of the clicked item among the scored ones; infinite where it is not among them."""
    labels_BC = torch.from_numpy((items_BC == clicked[:, None]).astype(np.float32))
    candidates_BC, clicked_B = torch.from_numpy(items_BC), torch.from_numpy(clicked)
    ranks = ranks_of(scores_BC, candidates_BC, labels_BC, batch, clicked_B, num_best)
    there = labels_BC.any(1).numpy()
    return replace(
        ranks, rank=np.where(there, ranks.rank, np.inf), num_tied=np.where(there, ranks.num_tied, 1)
    )


# ---- every item --------------------------------------------------------------------------------------------


def rank_everything(
    model: Ranker,
    stream: EvalStream,
    clicks: ClickLog,
    precision: str = "fp32",
    progress: CountProgress | None = None,
    num_best: int = 0,
) -> EventRanks:
    """Every item of the catalogue scored for every event of the model's tasks; at least TOP best ones."""

    def without_seen(batch: Batch) -> Tensor:
        with autocast(model.device, precision):
            scores_BI = model.score_catalogue(model.prepare(batch).to(model.device)).float().cpu().clone()
        for row, (event, item) in enumerate(
            zip(batch.event_id.tolist(), batch.clicked.tolist(), strict=True)
        ):
            scores_BI[row, np.setdiff1d(clicks.before(event), [item])] = -torch.inf
        return scores_BI

    events = whole_catalogue(stream, model.world.num_items, model.tasks)
    return rank_events(
        without_seen, events, progress=progress, model=model.title, num_best=max(TOP, num_best)
    )


def whole_catalogue(stream: EvalStream, num_items: int, tasks: tuple[int, ...]) -> Iterator[Batch]:
    """The events of some tasks, few at a time, each with all items as candidates."""
    at_once = max(1, BATCH_SCORES // num_items)
    for batch in stream:
        of_tasks = torch.isin(batch.task, torch.tensor(tasks))
        batch = batch.take((batch.event_id >= 0) & of_tasks)
        for start in range(0, batch.num_events, at_once):
            part = batch.rows(start, start + at_once)
            labels_BI = torch.zeros(part.num_events, num_items)
            labels_BI[torch.arange(part.num_events), part.clicked] = 1.0
            yield part.with_candidates(torch.arange(num_items).expand(part.num_events, -1), labels_BI)


# ---- reports -----------------------------------------------------------------------------------------------


def reports(
    ranks: EventRanks, popularity: np.ndarray, num_beams: int | None = None
) -> dict[str, dict[str, Any]]:
    """task_reports, and whether a model shows more than the popular: for each task that has events

    coverage@10: share of the catalogue that stands in at least one list. mean_clicks@10: training
    recommendation clicks of the items shown, on average, and mean_clicks_of_clicked: of what was clicked.
    """
    documents = task_reports(ranks, num_beams=num_beams)
    for task, document in documents.items():
        mine = ranks.of_task(TASKS.index(task))
        shown = mine.best_items[:, :TOP]
        shown = shown[shown >= 0]
        document[f"coverage@{TOP}"] = len(np.unique(shown)) / len(popularity)
        document[f"mean_clicks@{TOP}"] = float(popularity[shown].mean()) if len(shown) else 0.0
        document["mean_clicks_of_clicked"] = float(popularity[mine.item].mean())
    return documents


def retrieval_recall(places: np.ndarray, ranks: EventRanks, task: int) -> dict[str, float]:
    """{"recall@100", "recall@400"}: how many clicked items are among the first 100 and 400 that retrieval
    finds."""
    mine = places[ranks.task == task]
    return {f"recall@{k}": float((mine <= k).mean()) for k in RETRIEVAL_CUTOFFS}
