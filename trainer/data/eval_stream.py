"""Validation and test events → batches with their stored candidates."""

import copy
import shlex
from collections.abc import Iterator

import numpy as np

from data_shards.hashing import mix64, uniform_below
from data_shards.schema import REC, SRC, TASKS
from trainer.batch import Batch
from trainer.config import DataConfig
from trainer.data.blocks import Rows, decode, read_blocks, to_batch
from trainer.data.folder import PreparedFolder
from trainer.errors import DataError

NEGATIVES = {"stored": "negatives", "hard": "hard_negatives"}  # kind of candidates → column of blocks


def check_hard(folder: PreparedFolder) -> None:
    """Raises DataError for a folder that was prepared without hard candidates."""
    if not folder.manifest.num_hard_negatives:
        raise DataError(
            f"{folder.name} holds no hard candidates. Prepare it again with: gensr prepare SOURCE RAW "
            f"{folder.name} hard_negatives=99 overwrite=true"
        )


class EvalStream:
    """Every event of valid or test exactly once over all ranks, each with its stored candidates; the clicked
    item stands at a hashed place.

    Every rank gets the same number of batches of the same size: filler rows, event_id = −1, are to be
    dropped. Blocks are read as they are needed, anew in every pass; only a sample (max_events) stays in
    memory.
    """

    def __init__(
        self,
        folder: PreparedFolder,
        split: str,
        config: DataConfig,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        max_events: int = 0,
        tasks: tuple[int, ...] = (REC, SRC),
        candidates: str = "stored",
    ) -> None:
        """max_events > 0: a fixed sample, the events with the smallest hash. tasks: whose events count.
        candidates: stored, the uniform negatives; hard, the mined ones. Raises DataError where the folder
        has none."""
        assert split in ("valid", "test"), split
        assert candidates in NEGATIVES, candidates
        if candidates == "hard":
            check_hard(folder)
        self.negatives = NEGATIVES[candidates]
        self.folder, self.split, self.history_max = folder, split, config.history_max
        self.shards = folder.manifest.shards(split)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._chosen: np.ndarray | None = None  # positions in the split, ascending; None = all
        self.num_events = folder.manifest.num_events(split)
        if set(tasks) != {REC, SRC}:
            self._chosen = np.flatnonzero(np.isin(self.column("task"), tasks))
            self.num_events = len(self._chosen)
        if not self.num_events:
            raise DataError(
                f"{folder.name}: the {split} split has no events of {_named(tasks)}. "
                f"Look at it with: gensr inspect {shlex.quote(folder.name)}"
            )
        if 0 < max_events < self.num_events:
            sample = np.sort(np.argsort(mix64(self.column("event_id"), 31), kind="stable")[:max_events])
            self._chosen = sample if self._chosen is None else self._chosen[sample]
            self.num_events = max_events
        self._kept: Rows | None = None  # this rank's part of a sample, after the first pass
        self.num_batches = -(-self.num_events // (batch_size * world_size))  # on each rank

    def __len__(self) -> int:
        return self.num_batches

    def read_as(self, config: DataConfig) -> "EvalStream":
        """The same batches of the same events, with histories as long as another model reads them."""
        other = copy.copy(self)
        other.history_max, other._kept = config.history_max, None
        return other

    def column(self, name: str) -> np.ndarray:
        """A column of the evaluated events of all ranks, in order."""
        values = self.folder.columns(self.split, [name])[name]
        return values if self._chosen is None else values[self._chosen]

    def __iter__(self) -> Iterator[Batch]:
        if self._chosen is not None and self._kept is None:
            self._kept = Rows.concatenate(list(self._own_rows()))
        waiting: Rows | None = None
        made = 0
        for part in self._own_rows() if self._kept is None else [self._kept]:
            waiting = part if waiting is None else Rows.concatenate([waiting, part])
            full = len(waiting.item) // self.batch_size * self.batch_size
            for first in range(0, full, self.batch_size):
                yield eval_batch(waiting.take(slice(first, first + self.batch_size)))
                made += 1
            waiting = waiting.take(slice(full, None))
        if made < self.num_batches:
            assert waiting is not None
            yield eval_batch(Rows.concatenate([waiting, self._filler(self.batch_size - len(waiting.item))]))

    def _own_rows(self) -> Iterator[Rows]:
        """This rank's events of one block after the other (none of most blocks' in a small sample)."""
        start = 0
        for shard in self.shards:
            for table in read_blocks(self.folder.path, shard, manifest=self.folder.manifest):
                stop = start + table.num_rows
                first, last = (
                    (start, stop) if self._chosen is None else np.searchsorted(self._chosen, [start, stop])
                )
                number = np.arange(first, last)  # of the event among all that are evaluated
                number = number[number // self.batch_size % self.world_size == self.rank]
                yield decode(
                    table,
                    self.history_max,
                    (number if self._chosen is None else self._chosen[number]) - start,
                    negatives=self.negatives,
                )
                start = stop

    def _filler(self, count: int) -> Rows:
        """Copies of the split's first event with event_id −1."""
        table = next(
            table for shard in self.shards for table in read_blocks(self.folder.path, shard) if table.num_rows
        )
        rows = decode(table, self.history_max, np.zeros(count, np.int64), negatives=self.negatives)
        rows.event_id[:] = -1
        return rows


def _named(tasks: tuple[int, ...]) -> str:
    return " and ".join(TASKS[task] for task in tasks)


def eval_batch(rows: Rows) -> Batch:
    """Stored negatives and the clicked item, the latter at a place hashed from the event: no position can
    tell it."""
    candidates = np.concatenate([rows.item[:, None], rows.extra.astype(np.int64)], axis=1)
    place = uniform_below(mix64(rows.event_id, 32), candidates.shape[1])
    every = np.arange(len(place))
    candidates[:, 0], candidates[every, place] = candidates[every, place], rows.item
    labels = np.zeros(candidates.shape, np.float32)
    labels[every, place] = 1.0
    return to_batch(rows, candidates, labels, np.full(len(place), -1))
