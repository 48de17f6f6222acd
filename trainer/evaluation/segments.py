"""Which kind of event is a model good at? Metrics of parts of the events.

history_length   items of the stored history (at most history_max of the prepared folder)
item_popularity  training clicks of the clicked item, both tasks
query_ambiguity  distinct items clicked for the query in training; of searches only
time_of_day      hours of the folder's utc_offset_hours; left out where the log knows days or an order only
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from data_shards.negatives import sorted_unique
from data_shards.schema import NO_QUERY, TASKS
from trainer.data.blocks import read_blocks, to_numpy
from trainer.data.folder import PreparedFolder
from trainer.evaluation.bootstrap import UNIT, mean_interval
from trainer.evaluation.metrics import METRICS
from trainer.evaluation.ranking import EventRanks

METRIC = "ndcg@10"
LENGTHS = (0, 1, 5, 10, 20, 50)
CLICKS = (0, 1, 5, 20, 80)
ITEMS_OF_QUERY = (0, 1, 2, 5, 20)
HOURS = ("00–05", "06–11", "12–17", "18–23")
HOUR_MS = 3_600_000

Segments = dict[str, np.ndarray]  # name → bucket of each event [n] (str), None where it has none


def bucket_names(starts: Sequence[int]) -> tuple[str, ...]:
    """(0, 1, 5, 20) → "0", "1–4", "5–19", "≥20"."""
    ends = [stop - 1 for stop in starts[1:]]
    inner = (str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=False))
    return (*inner, f"≥{starts[-1]}")


BUCKETS = {  # in the order of tables
    "history_length": bucket_names(LENGTHS),
    "item_popularity": bucket_names(CLICKS),
    "query_ambiguity": bucket_names(ITEMS_OF_QUERY),
    "time_of_day": HOURS,
}


def bucketed(values: np.ndarray, starts: Sequence[int]) -> np.ndarray:
    """The bucket of each of `values` [n], which are at least starts[0]."""
    names = np.array(bucket_names(starts), dtype=object)
    return names[np.searchsorted(starts, values, side="right") - 1]


def segments_of(folder: PreparedFolder, split: str, ranks: EventRanks) -> Segments:
    """The bucket of each ranked event, in the order of `ranks`. Reads the split, and the training split where
    searches are among the events."""
    query, time, length = _facts(folder, split, ranks.event_id)
    segments = {
        "history_length": bucketed(length, LENGTHS),
        "item_popularity": bucketed(folder.item_clicks()[ranks.item], CLICKS),
    }
    is_search = query != NO_QUERY
    if is_search.any():
        counts = items_of_queries(folder)[np.maximum(query, 0)]
        segments["query_ambiguity"] = bucketed(counts, ITEMS_OF_QUERY)
        segments["query_ambiguity"][~is_search] = None
    offset_h = folder.manifest.raw["settings"].get("utc_offset_hours", 0)
    quarter = (time // HOUR_MS + offset_h) % 24 // 6
    if len(np.unique(quarter)) > 1:
        segments["time_of_day"] = np.array(HOURS, dtype=object)[quarter]
    return segments


def items_of_queries(folder: PreparedFolder) -> np.ndarray:
    """How many distinct items were clicked for each query in training, [num_queries]."""
    train = folder.columns("train", ["query", "item"])
    searches = train["query"] != NO_QUERY
    query, item = (train[name][searches].astype(np.int64) for name in ("query", "item"))
    pairs = sorted_unique(query * folder.manifest.num_items + item)
    return np.bincount(pairs // folder.manifest.num_items, minlength=folder.manifest.num_queries)


def _facts(
    folder: PreparedFolder, split: str, event_id: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """query, time and length of the stored history of some events of a split, [n] each."""
    parts = []
    for shard in folder.manifest.shards(split):
        for table in read_blocks(folder.path, shard, columns=["event_id", "query", "time", "history_items"]):
            lengths = pc.list_value_length(table["history_items"])
            columns = (table["event_id"], table["query"], table["time"], lengths)
            parts.append(np.stack([to_numpy(column).astype(np.int64) for column in columns]))
    stored = np.concatenate(parts, axis=1)
    stored = stored[:, np.argsort(stored[0], kind="stable")]
    query, time, length = stored[1:, np.searchsorted(stored[0], event_id)]
    return query, time, length


def segment_reports(ranks: EventRanks, segments: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{task: {name: {bucket: {"num_events", "num_users", "ndcg@10", "ci95": {"ndcg@10": [low, high]}}}}};
    buckets without events are left out."""
    values = ranks.metric_values()[:, METRICS.index(METRIC)].numpy()
    reports: dict[str, Any] = {}
    for code, task in enumerate(TASKS):
        for name, buckets in segments.items():
            for bucket in BUCKETS[name]:
                mine = (ranks.task == code) & (buckets == bucket)
                if not mine.any():
                    continue
                found = mean_interval(values[mine], ranks.user[mine], UNIT)
                reports.setdefault(task, {}).setdefault(name, {})[bucket] = {
                    "num_events": int(mine.sum()),
                    "num_users": len(np.unique(ranks.user[mine])),
                    METRIC: found.value,
                    "ci95": {METRIC: [found.low, found.high]},
                }
    return reports
