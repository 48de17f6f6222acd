"""RUN/lists-NAME.parquet: the best candidates of each event with their scores, for other tools' measures and
fusions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.evaluation.ranking import EventRanks
from trainer.runtime.files import atomic

EVENTS_AT_ONCE = 10_000  # a row group of the file
PROTOCOL = b"gensr.protocol"  # its key in the file's metadata


def write_lists(
    path: Path,
    ranks: EventRanks,
    num_best: int,
    events: pa.Table,
    item_ids: pa.ChunkedArray,
    protocol: Mapping[str, Any],
) -> None:
    """The first num_best of ranks.best_items, a row a candidate: event_id, task, user_id, place (1 = best),
    item_id, score (float32), clicked.

    events: the rows of evaluation-NAME.parquet, in the order of `ranks`; item_ids [items]; protocol: that of
    evaluation-NAME.json, for the file's metadata, because a later evaluation may leave this file as it is.
    """
    whose = events.select(["event_id", "task", "user_id"])
    whose = whose.replace_schema_metadata({PROTOCOL: json.dumps(protocol)})

    def lists_of(start: int) -> pa.Table:
        rows = slice(start, start + EVENTS_AT_ONCE)
        items_NK = ranks.best_items[rows, :num_best]
        event, place = np.nonzero(items_NK >= 0)  # event by event, best first
        items = items_NK[event, place]
        table = whose.slice(start, EVENTS_AT_ONCE).take(pa.array(event))
        table = table.append_column("place", pa.array(place + 1, pa.int32()))
        table = table.append_column("item_id", item_ids.take(pa.array(items)))
        table = table.append_column("score", pa.array(ranks.best_scores[rows][event, place]))
        return table.append_column("clicked", pa.array(items == ranks.item[rows][event]))

    schema = lists_of(events.num_rows).schema  # of no event
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, events.num_rows, EVENTS_AT_ONCE):
            writer.write_table(lists_of(start))
