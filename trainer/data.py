"""Shards → batches. The order of training data is a function of (seed, position) alone: README.md, "The order of training data".

block order of epoch e ─▶ blocks (webdataset entry → Arrow → numpy) ─▶ rows in hashed order ─▶ this rank's slices ─▶ negatives ─▶ Batch
"""

import itertools
import queue
import tarfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import webdataset as wds

from data_shards.hashing import click_fold, derive_seed, mix64, permutation, uniform_below, uniform_float
from data_shards.histories import first_of_runs
from data_shards.schema import SRC, Manifest, Shard
from trainer.batch import Batch
from trainer.config import DataConfig
from trainer.errors import ConfigError, DataError
from trainer.files import file_sha256
from trainer.negatives import NegativeSampler

PREFETCH = 8  # batches made ahead by the loader's thread
CHUNK_EVENTS = 4096  # events made ready at once: array arithmetic costs by the call, so a batch is a view of a larger one
READ_ATTEMPTS, RETRY_AFTER_S = 3, 1.0  # a read error of the disk or the network is tried again after 1 s, then 2 s
MAX_IMPRESSIONS = 16  # unclicked impressions of an event offered as negatives


@dataclass(frozen=True)
class Rows:
    """Columns of some events. History is padded at the end to the model's N, newest kept."""

    event_id: np.ndarray
    user: np.ndarray
    task: np.ndarray
    item: np.ndarray
    query: np.ndarray
    history_items: np.ndarray  # [n, N]
    history_tasks: np.ndarray
    history_mask: np.ndarray
    extra: np.ndarray  # [n, X]: stored negatives of valid and test; impressions of train, padded with -1
    epoch: np.ndarray

    def take(self, index: Any) -> "Rows":
        return Rows(**{name: value[index] for name, value in vars(self).items()})

    @staticmethod
    def concatenate(parts: list["Rows"]) -> "Rows":
        if len(parts) == 1:
            return parts[0]
        return Rows(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


# ---- blocks ----------------------------------------------------------------------------------------------------


def read_blocks(folder: str | Path, shard: Shard, first_block: int = 0, columns: list[str] | None = None, verify: bool = True) -> Iterator[pa.Table]:
    """The Arrow blocks of one shard, in order, from block `first_block` on. Decodes `.arrow` entries and nothing else (no pickle).

    A failing disk or network is tried again, from the block where it failed. Raises DataError naming the shard when it is missing, truncated, or not
    what the manifest says, or cannot be read after READ_ATTEMPTS attempts.
    """
    path = Path(folder) / shard.name
    if "://" not in str(folder) and not str(folder).startswith("pipe:"):
        _check_file(path, shard, verify)
        url = str(path)
    else:
        url = f"{str(folder).rstrip('/')}/{shard.name}"
    number = first_block
    for attempt in itertools.count(1):
        try:
            for table in _blocks_of_tar(url, shard, number):
                number += 1
                yield table if columns is None else table.select(columns)
            return
        except (OSError, KeyError, EOFError, tarfile.TarError, pa.ArrowException, ValueError) as error:
            if not isinstance(error, OSError) or attempt == READ_ATTEMPTS:
                raise DataError(f"{url}: cannot be read at block {number}: {error}. Restore the file or prepare the folder again.") from error
            warnings.warn(f"{url}: reading block {number} failed ({error}), trying again", stacklevel=2)
            time.sleep(RETRY_AFTER_S * attempt)


def _blocks_of_tar(url: str, shard: Shard, first_block: int) -> Iterator[pa.Table]:
    number = -1
    for number, entry in enumerate(wds.WebDataset([url], shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False)):
        if number < first_block:
            continue
        table = pa.ipc.open_stream(entry["arrow"]).read_all()
        if table.num_rows != shard.blocks[number]:
            raise DataError(
                f"{url}: block {number} holds {table.num_rows} events, the manifest says {shard.blocks[number]}. Prepare the folder again."
            )
        yield table
    if number + 1 != len(shard.blocks):
        raise DataError(
            f"{url}: holds {number + 1} blocks, the manifest says {len(shard.blocks)} (truncated?). Restore the file or prepare the folder again."
        )


_verified: set[tuple[str, str]] = set()


def _check_file(path: Path, shard: Shard, verify: bool) -> None:
    """Size always, checksum once per process and file."""
    if not path.is_file():
        raise DataError(f"{path}: missing shard. Restore the file or prepare the folder again.")
    size = path.stat().st_size
    if size != shard.num_bytes:
        raise DataError(f"{path}: {size} bytes, the manifest says {shard.num_bytes} (truncated?). Restore the file or prepare the folder again.")
    key = (str(path), shard.sha256)
    if verify and key not in _verified:
        if file_sha256(path) != shard.sha256:
            raise DataError(f"{path}: checksum differs from the manifest's (corrupt shard). Restore the file or prepare the folder again.")
        _verified.add(key)


def split_columns(folder: str | Path, manifest: Manifest, split: str, names: list[str]) -> dict[str, np.ndarray]:
    """Whole columns of a split, in stored order. Fixed-size lists come as [n, k]."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for shard in manifest.shards(split):
        for table in read_blocks(folder, shard, columns=names):
            for name in names:
                parts[name].append(_to_numpy(table[name]))
    return {name: np.concatenate(arrays) if arrays else np.zeros(0, np.int64) for name, arrays in parts.items()}


def train_clicks(folder: str | Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """user, item, task, time and event_id of every training event."""
    return split_columns(folder, manifest, "train", ["user", "item", "task", "time", "event_id"])


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    array = _single_chunk(column)
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
    return array.to_numpy(zero_copy_only=False)


def _single_chunk(column: pa.ChunkedArray) -> Any:
    array = column.combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def decode(table: pa.Table, history_max: int, index: np.ndarray | None = None, epoch: int = 0, with_impressions: bool = True) -> Rows:
    """Rows `index` of one Arrow block. Histories are cut to their newest `history_max` items by index arithmetic, without a Python loop."""
    if index is None:
        index = np.arange(table.num_rows)
    plain = {name: _to_numpy(table[name])[index].astype(np.int64) for name in ("event_id", "user", "task", "item", "query")}
    history_items, mask = _list_tail(table["history_items"], index, history_max, fill=0)
    history_tasks, _ = _list_tail(table["history_tasks"], index, history_max, fill=0)
    extra = np.zeros((len(index), 0), np.int64)
    if "negatives" in table.column_names:
        extra = _to_numpy(table["negatives"])[index]
    elif with_impressions and "impressions" in table.column_names:
        extra, _ = _list_tail(table["impressions"], index, MAX_IMPRESSIONS, fill=-1)
    return Rows(**plain, history_items=history_items, history_tasks=history_tasks, history_mask=mask, extra=extra, epoch=np.full(len(index), epoch))


def _list_tail(column: pa.ChunkedArray, index: np.ndarray, width: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """The last `width` entries of lists `index` → [n, width] int64 padded at the end with `fill`, and the mask of real entries."""
    lists = _single_chunk(column)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    end = offsets[index + 1][:, None]
    at = np.maximum(offsets[index][:, None], end - width) + np.arange(width)
    mask = at < end
    values = lists.values.to_numpy()
    if len(values) == 0:
        return np.full(mask.shape, fill, np.int64), mask
    return np.where(mask, values[np.where(mask, at, 0)], fill).astype(np.int64), mask


# ---- training --------------------------------------------------------------------------------------------------


class TrainStream(torch.utils.data.IterableDataset):
    """This rank's micro-batches, for ever, from global position `start_event` on (README.md, "The order of training data").

    Positions [s·G, (s+1)·G) are global step s; micro-step m of rank r holds positions s·G + (m·R + r)·micro … + micro. A step's events are therefore the
    same set on any number of ranks and workers, and events seen (= `start_event` of a resumed run) is the whole state.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
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
    ) -> None:
        """num_folds: folds of the cross-fitted CF table, 0 = none. heldout_item [num_users]: recommendation events are trained on only where their click
        was held out of the table (cf.holdout=last). clicks [num_items]: training clicks, for negatives=popularity."""
        super().__init__()
        if global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(
                f"optim.global_batch_size={global_batch_size} is no multiple of optim.micro_batch_size={micro_batch_size} × {world_size} processes. "
                f"Choose a micro batch that divides global_batch_size / {world_size}."
            )
        self.folder, self.config, self.seed = folder, config, seed
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self.start_event = start_event
        self.num_folds, self.heldout_item = num_folds, heldout_item
        self.shards = _readable(folder, manifest.shards("train"), skip_bad=config.on_bad_shard == "skip")
        self.block_sizes = self._usable_rows() if heldout_item is not None else [list(shard.blocks) for shard in self.shards]
        self.num_events = sum(map(sum, self.block_sizes))  # in one epoch
        if self.num_events == 0:
            raise DataError(f"{folder}: no training events. Look at it with: gensr inspect {folder}")
        mixture = (config.mixture_impressions, config.mixture_popularity)
        self.sampler = NegativeSampler(
            manifest.num_items, config.num_negatives, derive_seed(seed, 11), config.negatives, clicks, config.popularity_alpha, mixture
        )

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        micro, group = self.micro_batch_size, self.micro_batch_size * self.world_size
        waiting: list[Rows] = []
        for start, table, order, epoch in self._blocks():
            positions = start + np.arange(len(order))
            mine = (positions >= self.start_event) & (positions % group // micro == self.rank)
            mine &= (positions - self.start_event) // group % num_workers == worker_id
            if not mine.any():
                continue
            waiting.append(decode(table, self.config.history_max, order[mine], epoch, self.sampler.uses_impressions))
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
        negatives = self.sampler.draw(rows.event_id, rows.epoch, rows.item, rows.history_items, rows.history_mask, rows.extra)
        candidates = np.concatenate([rows.item[:, None], negatives], axis=1)
        labels = np.zeros(candidates.shape, np.float32)
        labels[:, 0] = 1.0
        fold = (
            click_fold(rows.user, rows.item, self.num_folds)
            if self.num_folds
            else np.full(len(rows.item), 0 if self.heldout_item is not None else -1)
        )
        return to_batch(rows, candidates, labels, fold)

    def _blocks(self) -> Iterator[tuple[int, pa.Table, np.ndarray, int]]:
        """(position of the first event, block, order of its usable rows, epoch) from the block that holds start_event on. Earlier shards are not opened."""
        position = self.start_event // self.num_events * self.num_events
        for epoch in itertools.count(self.start_event // self.num_events):
            for index in permutation(len(self.shards), derive_seed(self.seed, 21, epoch)):
                shard, sizes = self.shards[index], self.block_sizes[index]
                ends = position + np.cumsum(sizes)
                first = int(np.searchsorted(ends, self.start_event, side="right"))
                if first < len(sizes):
                    for number, table in enumerate(read_blocks(self.folder, shard, first), start=first):
                        usable = self._usable(table)
                        user = _to_numpy(table["user"])[usable]
                        order = usable[spread_users(user, derive_seed(self.seed, 22, epoch, int(index), number))]
                        yield int(ends[number]) - sizes[number], table, order, epoch
                position = int(ends[-1]) if len(sizes) else position

    def _usable(self, table: pa.Table) -> np.ndarray:
        if self.heldout_item is None:
            return np.arange(table.num_rows)
        user, item, task = (_to_numpy(table[name]) for name in ("user", "item", "task"))
        return np.flatnonzero((task == SRC) | (self.heldout_item[user] == item))

    def _usable_rows(self) -> list[list[int]]:
        columns = ["user", "item", "task"]
        return [[len(self._usable(table)) for table in read_blocks(self.folder, shard, columns=columns)] for shard in self.shards]


def _readable(folder: str | Path, shards: tuple[Shard, ...], skip_bad: bool) -> tuple[Shard, ...]:
    """With skip_bad, the shards whose size and checksum are right, and a warning that counts the others; decided before the first step, so all ranks agree."""
    if not skip_bad:
        return shards
    good = []
    for shard in shards:
        try:
            _check_file(Path(folder) / shard.name, shard, verify=True)
            good.append(shard)
        except DataError as error:
            warnings.warn(f"skipped {shard.num_events} training events: {error}", stacklevel=2)
    return tuple(good)


def spread_users(user: np.ndarray, seed: int) -> np.ndarray:
    """A hashed order of events (user: [n]) that puts events of one user far apart: a batch holds distinct users wherever it can (Eq. 10).

    The k-th of a user's c events, k in hashed order, gets the place (k + shift) / c of the block; shift ∈ [0, 1) is hashed from the user.
    """
    hashed = permutation(len(user), seed)
    by_user = hashed[np.argsort(user[hashed], kind="stable")]
    user = user[by_user]
    starts = first_of_runs(user)
    first = np.flatnonzero(starts)
    count = np.diff(first, append=len(user))
    run = np.cumsum(starts) - 1
    shift = uniform_float(mix64(user, derive_seed(seed, 1)))
    return by_user[np.argsort((np.arange(len(user)) - first[run] + shift) / count[run], kind="stable")]


def to_batch(rows: Rows, candidates: np.ndarray, labels: np.ndarray, fold: np.ndarray) -> Batch:
    return Batch(
        event_id=torch.from_numpy(rows.event_id),
        user=torch.from_numpy(rows.user),
        task=torch.from_numpy(rows.task),
        query=torch.from_numpy(rows.query),
        fold=torch.from_numpy(fold.astype(np.int64)),
        history_items=torch.from_numpy(rows.history_items),
        history_tasks=torch.from_numpy(rows.history_tasks),
        history_mask=torch.from_numpy(rows.history_mask),
        candidates=torch.from_numpy(candidates),
        labels=torch.from_numpy(labels),
    )


# ---- evaluation ------------------------------------------------------------------------------------------------


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


# ---- prefetch --------------------------------------------------------------------------------------------------


def prefetched(stream: Any, num_workers: int = 0) -> Iterator[Batch]:
    """Batches made ahead of time: by a thread (num_workers=0), or by worker processes, in the same order."""
    if num_workers:
        return iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=num_workers, prefetch_factor=PREFETCH))
    return _from_thread(stream)


def _from_thread(stream: Any) -> Iterator[Batch]:
    ready: queue.Queue[Any] = queue.Queue(PREFETCH)
    stop = threading.Event()

    def put(value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for batch in stream:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=produce, daemon=True, name="gensr-loader")
    thread.start()
    try:
        while True:
            value = ready.get()
            if value is None:
                return
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
