"""This rank's training batches, for ever.

units (order.py) ─▶ blocks ─▶ rows in order ─▶ this rank's slices ─▶ negatives ─▶ Batch
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from data_shards.hashing import click_fold, derive_seed
from data_shards.negatives import sorted_unique
from data_shards.schema import REC, SRC, TASKS, Manifest, Shard
from trainer.batch import Batch
from trainer.config import DataConfig
from trainer.data.blocks import Rows, check_shard, decode, read_blocks, searches_of, to_batch, to_numpy
from trainer.data.folder import PreparedFolder
from trainer.data.negatives import NegativeSampler
from trainer.data.order import Cycles, Mix, Order, Unit
from trainer.errors import ConfigError, DataError

# events made ready at once: array arithmetic costs by the call, so a batch is a view of a larger one
CHUNK_EVENTS = 4096


@dataclass(frozen=True)
class Part:
    """Some rows of one block, as a unit uses them."""

    table: pa.Table
    rows: np.ndarray
    stream: int
    cycle: int


class TrainStream(torch.utils.data.IterableDataset):
    """This rank's micro-batches, for ever, from global position `start_event` on (docs/checkpoints.md, "The
    order of training data").

    Positions [s·G, (s+1)·G) are global step s; micro-step m of rank r holds positions s·G + (m·R + r)·micro …
    + micro. A step's events are therefore the same set on any number of ranks and workers, and events seen (=
    `start_event` of a resumed run) is the whole state.
    """

    def __init__(
        self,
        folder: PreparedFolder,
        config: DataConfig,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_event: int = 0,
        num_folds: int = 0,
        heldout_item: np.ndarray | None = None,
        clicks: np.ndarray | None = None,
        tasks: tuple[int, ...] = (REC, SRC),
    ) -> None:
        """num_folds: folds of the cross-fitted CF table, 0 = none. heldout_item [num_users]: the click that
        the table of cf.holdout=last has not seen; events of either task whose user and item are a click that
        it has seen are left out. clicks [num_items]: training clicks, for
        negatives=popularity. tasks: whose events are trained on."""
        super().__init__()
        if global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(
                f"optim.global_batch_size={global_batch_size} is no multiple of "
                f"optim.micro_batch_size={micro_batch_size} × {world_size} processes. "
                f"Choose a micro batch that divides global_batch_size / {world_size}."
            )
        self.folder, self.manifest, self.config = folder.path, folder.manifest, config
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self.start_event = start_event
        self.num_folds = num_folds
        self.shards = _readable(
            folder.path, folder.manifest.shards("train"), skip_bad=config.on_bad_shard == "skip"
        )
        # sorted keys of the clicks that the table of cf.holdout=last has seen; None with other tables
        self.seen = self._seen(heldout_item) if heldout_item is not None else None
        both = set(tasks) == {REC, SRC}
        mix = Mix.of(config.search_share if both else 0.0)
        # of each stream; None = both
        self.tasks: list[int | None] = [REC, SRC] if mix.num_streams == 2 else [None if both else tasks[0]]
        streams = [Cycles(sizes, derive_seed(seed, 20, number)) for number, sizes in enumerate(self._sizes())]
        self._check_streams(streams)
        self.order = Order(streams, mix, seed)
        self.num_events = self.order.num_events  # in one epoch
        mixture = (config.mixture_impressions, config.mixture_popularity)
        self.sampler = NegativeSampler(
            folder.manifest.num_items,
            config.num_negatives,
            derive_seed(seed, 11),
            config.negatives,
            clicks,
            config.popularity_alpha,
            mixture,
        )

    def _check_streams(self, streams: list[Cycles]) -> None:
        if all(stream.num_events for stream in streams):
            return
        if len(streams) == 1:
            raise DataError(
                f"{self.folder}: no training events{self._of_task()}. Look at it with: gensr inspect "
                f"{self.folder}"
            )
        lacking = "recommendation" if not streams[0].num_events else "search"
        raise DataError(
            f"{self.folder} has no {lacking} events to train on: "
            f"data.search_share={self.config.search_share} needs both. Set it to 0."
        )

    def _of_task(self) -> str:
        return "" if self.tasks[0] is None else f" of {TASKS[self.tasks[0]]}"

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        micro, group = self.micro_batch_size, self.micro_batch_size * self.world_size
        waiting: list[Rows] = []
        for unit, parts, order in self._units():
            positions = unit.start + np.arange(unit.size)
            mine = (positions >= self.start_event) & (positions % group // micro == self.rank)
            mine &= (positions - self.start_event) // group % num_workers == worker_id
            if not mine.any():
                continue
            waiting.append(self._decode(parts, order[mine]))
            rows = Rows.concatenate(waiting)
            full = len(rows.item) // micro * micro
            chunk = max(CHUNK_EVENTS // micro, 1) * micro
            for start in range(0, full, chunk):
                made = self.make_batch(rows.take(slice(start, min(start + chunk, full))))
                for first in range(0, made.num_events, micro):
                    yield made.rows(first, first + micro)
            waiting = [rows.take(slice(full, None))]

    def make_batch(self, rows: Rows) -> Batch:
        """Draw the negatives of some events and lay them out as tensors; the clicked item is candidate 0."""
        negatives = self.sampler.draw(
            rows.event_id, rows.epoch, rows.item, rows.history_items, rows.history_mask, rows.extra
        )
        candidates = np.concatenate([rows.item[:, None], negatives], axis=1)
        labels = np.zeros(candidates.shape, np.float32)
        labels[:, 0] = 1.0
        fold = (
            click_fold(rows.user, rows.item, self.num_folds)
            if self.num_folds
            else np.full(len(rows.item), 0 if self.seen is not None else -1)
        )
        return to_batch(rows, candidates, labels, fold)

    # ---- units ---------------------------------------------------------------------------------------------

    def _units(self) -> Iterator[tuple[Unit, list[Part], np.ndarray]]:
        """(unit, its parts, order of their rows one after the other) from the unit that holds start_event on.
        Earlier shards are not opened."""
        readers = [BlockReader(self.folder, self.shards, self.manifest) for _ in self.tasks]
        late = np.zeros(0, np.int64)
        for unit in self.order.units_from(self.start_event):
            parts = []
            for stream, piece in self.order.pieces(unit):
                table = readers[stream].block(piece.shard, piece.block)
                parts.append(
                    Part(
                        table,
                        self._usable(table, self.tasks[stream])[piece.start : piece.stop],
                        stream,
                        piece.cycle,
                    )
                )
            user = np.concatenate([to_numpy(part.table["user"])[part.rows] for part in parts])
            lengths = [len(part.rows) for part in parts]
            stream_of, cycle = (
                np.repeat([getattr(part, name) for part in parts], lengths) for name in ("stream", "cycle")
            )
            order, late = self.order.arrange(unit, user, stream_of, cycle, late)
            if unit.start + unit.size > self.start_event:
                yield unit, parts, order

    def _decode(self, parts: list[Part], index: np.ndarray) -> Rows:
        """Rows `index` of the parts' rows one after the other."""
        ends = np.cumsum([len(part.rows) for part in parts])
        owner = np.searchsorted(ends, index, side="right")
        found, places = [], []
        for number in np.unique(owner):
            part, here = parts[number], np.flatnonzero(owner == number)
            rows = part.rows[index[here] - (ends[number] - len(part.rows))]
            found.append(
                decode(part.table, self.config.history_max, rows, part.cycle, self.sampler.uses_impressions)
            )
            places.append(here)
        if len(found) == 1:
            return found[0]
        return Rows.concatenate(found).take(np.argsort(np.concatenate(places)))

    def _usable(self, table: pa.Table, task: int | None) -> np.ndarray:
        """Rows of a block that a stream trains on."""
        if self.seen is None and task is None:
            return np.arange(table.num_rows)
        usable = np.ones(table.num_rows, bool) if task is None else to_numpy(table["task"]) == task
        if self.seen is not None:
            usable &= ~np.isin(self._keys(table), self.seen)
        return np.flatnonzero(usable)

    def _seen(self, heldout_item: np.ndarray) -> np.ndarray:
        """The recommendation clicks of training but each user's held-out one, as keys: what `gensr cf` gave
        that table to learn from. A search can be for an item that its user was recommended, too."""
        found = []
        for shard in self.shards:
            for table in self._blocks(shard, ["user", "item", "task"]):
                seen = to_numpy(table["task"]) == REC
                seen &= heldout_item[to_numpy(table["user"])] != to_numpy(table["item"])
                found.append(self._keys(table)[seen])
        return sorted_unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def _keys(self, table: pa.Table) -> np.ndarray:
        """User and item of each event as one number."""
        return to_numpy(table["user"]).astype(np.int64) * self.manifest.num_items + to_numpy(table["item"])

    def _blocks(self, shard: Shard, columns: list[str]) -> Iterator[pa.Table]:
        return read_blocks(self.folder, shard, columns=columns, manifest=self.manifest)

    def _sizes(self) -> list[list[list[int]]]:
        """Usable rows of each stream, shard and block: from the manifest, or by reading the shards once where
        it does not say."""
        if self.seen is None:
            blocks = [list(shard.blocks) for shard in self.shards]
            if self.tasks == [None]:
                return [blocks]
            searches = [list(searches_of(self.folder, shard)) for shard in self.shards]
            others = [
                [n - s for n, s in zip(*both, strict=True)] for both in zip(blocks, searches, strict=True)
            ]
            return [searches if task == SRC else others for task in self.tasks]
        counted = [
            [
                [len(self._usable(table, task)) for task in self.tasks]
                for table in self._blocks(shard, ["user", "item", "task"])
            ]
            for shard in self.shards
        ]
        return [
            [[block[stream] for block in shard] for shard in counted] for stream in range(len(self.tasks))
        ]


class BlockReader:
    """Blocks of some shards, one after the other: a shard is read on from where it stands, and opened anew
    only to go back."""

    def __init__(self, folder: str | Path, shards: tuple[Shard, ...], manifest: Manifest) -> None:
        self.folder, self.shards, self.manifest = folder, shards, manifest
        self._shard = self._block = -1
        self._tables: Iterator[pa.Table] = iter(())
        self._table: pa.Table | None = None

    def block(self, shard: int, block: int) -> pa.Table:
        if shard != self._shard or block < self._block:
            self._tables = read_blocks(self.folder, self.shards[shard], block, manifest=self.manifest)
            self._shard, self._block = shard, block - 1
        while self._block < block:
            self._table, self._block = next(self._tables), self._block + 1
        assert self._table is not None
        return self._table


def _readable(folder: str | Path, shards: tuple[Shard, ...], skip_bad: bool) -> tuple[Shard, ...]:
    """With skip_bad, the shards whose size and checksum are right, and a warning that counts the others;
    decided before the first step, so all ranks agree."""
    if not skip_bad:
        return shards
    good = []
    for shard in shards:
        try:
            check_shard(folder, shard)
            good.append(shard)
        except DataError as error:
            warnings.warn(f"skipped {shard.num_events} training events: {error}", stacklevel=2)
    return tuple(good)
