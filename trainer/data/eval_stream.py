"""Validation and test events → batches with their stored candidates."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_shards.hashing import mix64, uniform_below
from data_shards.schema import Manifest
from trainer.batch import Batch
from trainer.config import DataConfig
from trainer.data.blocks import Rows, decode, read_blocks, to_batch
from trainer.errors import DataError


class EvalStream:
    """Every event of valid or test exactly once over all ranks, each with its stored candidates; the clicked item stands at a hashed place.

    Every rank gets the same number of batches of the same size: filler rows, event_id = −1, are to be dropped.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        split: str,
        config: DataConfig,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        max_events: int = 0,
    ) -> None:
        """max_events > 0: a fixed sample, the events with the smallest hash."""
        assert split in ("valid", "test"), split
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        parts = [decode(table, config.history_max) for shard in manifest.shards(split) for table in read_blocks(folder, shard)]
        if not parts:
            raise DataError(f"{folder}: the {split} split has no events. Look at it with: gensr inspect {folder}")
        rows = Rows.concatenate(parts)
        chosen = np.argsort(mix64(rows.event_id, 31), kind="stable")[: max_events or None]
        self.rows = rows.take(np.sort(chosen))
        self.num_events = len(self.rows.item)
        self.num_batches = -(-self.num_events // (batch_size * world_size))  # on each rank

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.num_batches):
            first = (number * self.world_size + self.rank) * self.batch_size
            index = np.arange(first, first + self.batch_size)
            filler = index >= self.num_events
            rows = self.rows.take(np.minimum(index, self.num_events - 1))
            rows.event_id[filler] = -1
            yield eval_batch(rows)


def eval_batch(rows: Rows) -> Batch:
    """Stored negatives and the clicked item, the latter at a place hashed from the event: no position can tell it."""
    candidates = np.concatenate([rows.item[:, None], rows.extra.astype(np.int64)], axis=1)
    place = uniform_below(mix64(rows.event_id, 32), candidates.shape[1])
    every = np.arange(len(place))
    candidates[:, 0], candidates[every, place] = candidates[every, place], rows.item
    labels = np.zeros(candidates.shape, np.float32)
    labels[every, place] = 1.0
    return to_batch(rows, candidates, labels, np.full(len(place), -1))
