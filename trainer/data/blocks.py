"""Blocks of a prepared folder → columns of events (webdataset entry → Arrow → numpy)."""

import hashlib
import itertools
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import webdataset as wds
from webdataset.tariterators import tar_file_iterator

from data_shards.blocks import decode_blocks
from data_shards.checksum import file_sha256, pieces
from data_shards.schema import NO_QUERY, SRC, TASKS, Manifest, Shard
from trainer.batch import Batch
from trainer.data.node_cache import (
    READ_ATTEMPTS,
    RETRY_AFTER_S,
    check_stream,
    reason,
    retried,
    shard_place,
    shown,
)
from trainer.errors import DataError

MAX_IMPRESSIONS = 16  # unclicked impressions of an event offered as negatives
# with the value of padding; history_queries is there from format 3 on
HISTORY_COLUMNS = {"history_items": 0, "history_tasks": 0, "history_queries": NO_QUERY}


@dataclass(frozen=True)
class Rows:
    """Columns of some events. History is padded at the end to the model's N, newest kept.

    It keeps the stored types until to_batch: rows are moved several times, and wider numbers cost more.
    """

    event_id: np.ndarray
    user: np.ndarray
    task: np.ndarray
    item: np.ndarray
    query: np.ndarray
    history_items: np.ndarray  # [n, N] int32
    history_tasks: np.ndarray  # int8
    history_mask: np.ndarray
    history_queries: (
        np.ndarray | None
    )  # int32, NO_QUERY for a recommendation and padding; None before format 3
    extra: np.ndarray  # [n, X]: stored negatives of valid and test; impressions of train, padded with -1
    epoch: np.ndarray  # how often the event has been trained on before

    def take(self, index: Any) -> "Rows":
        return self._each([self], lambda columns: columns[0][index])

    @staticmethod
    def concatenate(parts: list["Rows"]) -> "Rows":
        return parts[0] if len(parts) == 1 else Rows._each(parts, np.concatenate)

    @staticmethod
    def _each(parts: list["Rows"], change: Callable[[list[np.ndarray]], np.ndarray]) -> "Rows":
        """Rows of `change` of each column of the parts. A column that they lack stays None."""
        made: dict[str, Any] = {}
        for field in fields(Rows):
            columns = [getattr(part, field.name) for part in parts]
            made[field.name] = None if columns[0] is None else change(columns)
        return Rows(**made)


def read_blocks(
    folder: str | Path,
    shard: Shard,
    first_block: int = 0,
    columns: list[str] | None = None,
    manifest: Manifest | None = None,
) -> Iterator[pa.Table]:
    """The Arrow blocks of one shard, in order, from block `first_block` on. folder: a prepared folder, or one
    of the node's cache (data/node_cache.py). manifest: whose counts all ids must respect; None = any ids.

    A failing disk or network is tried again, from the block where it failed. Raises DataError naming the
    shard when it is missing, truncated, or not what the manifest says, or cannot be read after READ_ATTEMPTS
    attempts. A file is checked before its first block, a streamed shard after its last.
    """
    place = shard_place(folder, shard)
    if isinstance(place, Path):
        _check_file(place, shard)
    number, where = first_block, shown(place, shard.name)
    for attempt in itertools.count(1):
        try:
            for table in decode_blocks(_entries(place, shard), shard.blocks, number):
                table = table if columns is None else table.select(columns)
                if manifest is not None:
                    check_ids(table, manifest, f"{where}: block {number}")
                number += 1
                yield table
            return
        except (OSError, KeyError, EOFError, tarfile.TarError, pa.ArrowException, ValueError) as error:
            # of a stream, a cut-off end may be the network's fault
            lasting = isinstance(place, Path) and not isinstance(error, OSError)
            if lasting or attempt == READ_ATTEMPTS:
                raise DataError(
                    f"{where}: cannot be read at block {number}: {reason(error)}. Restore the file or "
                    "prepare the folder again."
                ) from error
            warnings.warn(
                f"{where}: reading block {number} failed ({reason(error)}), trying again", stacklevel=2
            )
            time.sleep(RETRY_AFTER_S * attempt)


def _entries(place: Path | str, shard: Shard) -> Iterator[bytes]:
    """The content of each entry of a shard. Raises DataError at the end of a stream that was not what the
    manifest says, EOFError where it was cut off."""
    if isinstance(place, Path):  # opened as a path: gopen would read "?", "#" and ":" in it as parts of a URL
        with place.open("rb") as file:
            yield from (entry["data"] for entry in tar_file_iterator(file))
        return
    with wds.gopen(place, "rb") as stream:
        hashed = _HashedStream(stream)
        yield from (entry["data"] for entry in tar_file_iterator(hashed))
        for _ in pieces(hashed):  # what lies behind the last entry counts, too
            pass
    if hashed.num_bytes != shard.num_bytes:
        raise EOFError(f"{hashed.num_bytes} bytes, the manifest says {shard.num_bytes} (truncated?)")
    if hashed.sha256.hexdigest() != shard.sha256:
        raise DataError(
            f"{shown(place, shard.name)}: checksum differs from the manifest's (corrupt shard). Restore the "
            "file or prepare the folder again."
        )


class _HashedStream:
    """What is read of a stream, counted and hashed on the way."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.sha256, self.num_bytes = stream, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        piece = self.stream.read(size)
        self.sha256.update(piece)
        self.num_bytes += len(piece)
        return piece


def check_ids(table: pa.Table, manifest: Manifest, where: str) -> None:
    """Raises DataError naming `where` for an id of a block that the folder does not have: one pass over each
    column for its least and greatest value."""
    most = {
        "user": manifest.num_users,
        "item": manifest.num_items,
        "query": manifest.num_queries,
        "task": len(TASKS),
    }
    of_column = {
        "history_items": "item", "history_queries": "query", "history_tasks": "task",
        "impressions": "item", "negatives": "item", "hard_negatives": "item",
    }  # fmt: skip
    for name in table.column_names:
        kind = of_column.get(name, name)
        if kind not in most:
            continue
        least = NO_QUERY if kind == "query" else 0
        values = table[name]
        if name in of_column:
            values = pc.list_flatten(values)
        found = pc.min_max(values).as_py()
        if found["min"] is not None and (found["min"] < least or found["max"] >= most[kind]):
            wrong = found["min"] if found["min"] < least else found["max"]
            raise DataError(
                f"{where}: {name} {wrong} is not among the folder's ids {least} … {most[kind] - 1}. Restore "
                "the file or prepare the folder again."
            )


_verified: set[tuple[str, str]] = set()


def check_shard(folder: str | Path, shard: Shard) -> None:
    """Raises DataError when the shard is not what the manifest says. One that is streamed is read to its end
    for it."""
    place = shard_place(folder, shard)
    if isinstance(place, Path):
        _check_file(place, shard)
    else:
        retried(shown(place, shard.name), lambda: check_stream(place, shard.num_bytes, shard.sha256))


def _check_file(path: Path, shard: Shard) -> None:
    """Raises DataError when the file is missing, also when it is deleted while it is looked at."""
    try:
        _check_content(path, shard)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing shard. Restore the file or prepare the folder again.") from error


def _check_content(path: Path, shard: Shard) -> None:
    """Size always, checksum once per process and file."""
    if not path.is_file():
        raise FileNotFoundError(path)
    size = path.stat().st_size
    if size != shard.num_bytes:
        raise DataError(
            f"{path}: {size} bytes, the manifest says {shard.num_bytes} (truncated?). Restore the file or "
            "prepare the folder again."
        )
    key = (str(path), shard.sha256)
    if key not in _verified:
        if file_sha256(path) != shard.sha256:
            raise DataError(
                f"{path}: checksum differs from the manifest's (corrupt shard). Restore the file or prepare "
                "the folder again."
            )
        _verified.add(key)


def searches_of(folder: str | Path, shard: Shard) -> tuple[int, ...]:
    """How many events of each block are searches: from the manifest, or, in a folder of format 1, by reading
    the shard."""
    if shard.searches is not None:
        return shard.searches
    return tuple(
        int((to_numpy(table["task"]) == SRC).sum()) for table in read_blocks(folder, shard, columns=["task"])
    )


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    array = _single_chunk(column)
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
    return array.to_numpy(zero_copy_only=False)


def _single_chunk(column: pa.ChunkedArray) -> Any:
    array = column.combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def decode(
    table: pa.Table,
    history_max: int,
    index: np.ndarray | None = None,
    epoch: int = 0,
    with_impressions: bool = True,
    negatives: str = "negatives",
) -> Rows:
    """Rows `index` of one Arrow block. Histories are cut to their newest `history_max` items by index
    arithmetic, without a Python loop. negatives: the column of stored negatives in a valid or test block."""
    if index is None:
        index = np.arange(table.num_rows)
    plain = {
        name: to_numpy(table[name])[index].astype(np.int64)
        for name in ("event_id", "user", "task", "item", "query")
    }
    at, mask = _tails(table["history_items"], index, history_max)  # the lists of a history are parallel
    history = {
        name: _values(table[name], at, mask, fill)
        for name, fill in HISTORY_COLUMNS.items()
        if name in table.column_names
    }
    extra = np.zeros((len(index), 0), np.int64)
    if negatives in table.column_names:
        extra = to_numpy(table[negatives])[index]
    elif with_impressions and "impressions" in table.column_names:
        where = _tails(table["impressions"], index, MAX_IMPRESSIONS)
        extra = _values(table["impressions"], *where, fill=-1).astype(np.int64)
    return Rows(
        **plain,
        history_items=history["history_items"],
        history_tasks=history["history_tasks"],
        history_mask=mask,
        history_queries=history.get("history_queries"),
        extra=extra,
        epoch=np.full(len(index), epoch),
    )


def _tails(column: pa.ChunkedArray, index: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the last `width` entries of lists `index` lie among a column's values, and which of them are
    real, both [n, width]; the others point at value 0."""
    offsets = _single_chunk(column).offsets.to_numpy().astype(np.int64)
    end = offsets[index + 1][:, None]
    at = np.maximum(offsets[index][:, None], end - width) + np.arange(width)
    mask = at < end
    return np.where(mask, at, 0), mask


def _values(column: pa.ChunkedArray, at: np.ndarray, mask: np.ndarray, fill: int) -> np.ndarray:
    """Those entries, in the column's type, padded at the end with `fill`."""
    values = _single_chunk(column).values.to_numpy()
    if len(values) == 0:
        return np.full(mask.shape, fill, values.dtype)
    return np.where(mask, values[at], np.array(fill, values.dtype))


def to_batch(rows: Rows, candidates: np.ndarray, labels: np.ndarray, fold: np.ndarray) -> Batch:
    queries = rows.history_queries
    if queries is None:
        queries = np.full(rows.history_items.shape, NO_QUERY, np.int64)
    return Batch(
        event_id=torch.from_numpy(rows.event_id),
        user=torch.from_numpy(rows.user),
        task=torch.from_numpy(rows.task),
        query=torch.from_numpy(rows.query),
        fold=torch.from_numpy(fold.astype(np.int64)),
        history_items=torch.from_numpy(rows.history_items).long(),
        history_tasks=torch.from_numpy(rows.history_tasks).long(),
        history_mask=torch.from_numpy(rows.history_mask),
        history_queries=torch.from_numpy(queries).long(),
        candidates=torch.from_numpy(candidates),
        labels=torch.from_numpy(labels),
    )
