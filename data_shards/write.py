"""Events → Arrow IPC blocks → tar shards whose bytes depend on nothing but their content."""

import hashlib
import io
import itertools
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from data_shards.checksum import file_sha256
from data_shards.histories import ragged_rows
from data_shards.schema import SRC, TRAIN_SCHEMA, eval_schema
from data_shards.work import in_threads

COPY_BYTES = 1 << 22  # written and hashed at once


@dataclass(frozen=True)
class EventColumns:
    """Every event of all splits in canonical order; row number = event_id. Histories and impressions are
    ranges of flat columns."""

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    task: np.ndarray
    query: np.ndarray
    split: np.ndarray
    history_start: np.ndarray  # [events] int64 into history_item, _task, _query
    history_count: np.ndarray
    history_item: np.ndarray
    history_task: np.ndarray
    history_query: np.ndarray
    shown_start: np.ndarray  # [events] int64 into shown_item
    shown_count: np.ndarray
    shown_item: np.ndarray

    def block(
        self, event_id: np.ndarray, negatives: np.ndarray | None, hard: np.ndarray | None = None
    ) -> pa.RecordBatch:
        """Rows event_id [E] as one record batch; negatives [E, n] makes it a validation or test block, in
        which hard [E, m] are further ones."""
        history = ragged_rows(self.history_start[event_id], self.history_count[event_id])
        history_offsets = _offsets(self.history_count[event_id])
        columns: list[Any] = [
            pa.array(event_id.astype(np.int64)),
            *(
                pa.array(np.asarray(values[event_id]))
                for values in (self.user, self.task, self.item, self.query, self.time)
            ),
            *(
                pa.ListArray.from_arrays(history_offsets, pa.array(flat[history]))
                for flat in (self.history_item, self.history_task, self.history_query)
            ),
        ]  # fmt: skip
        if negatives is None:
            shown = ragged_rows(self.shown_start[event_id], self.shown_count[event_id])
            columns.append(
                pa.ListArray.from_arrays(
                    _offsets(self.shown_count[event_id]), pa.array(self.shown_item[shown])
                )
            )
            return pa.record_batch(columns, schema=TRAIN_SCHEMA)
        stored = [negatives] if hard is None else [negatives, hard]
        columns += [
            pa.FixedSizeListArray.from_arrays(pa.array(items.reshape(-1)), items.shape[1]) for items in stored
        ]
        return pa.record_batch(columns, schema=eval_schema(*(items.shape[1] for items in stored)))


def _offsets(counts: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


class HashingFile:
    """A binary file that knows its size and sha256."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.num_bytes = file, hashlib.sha256(), 0

    def tell(self) -> int:
        return self.num_bytes

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.num_bytes += len(data)
        return self.file.write(data)


def write_shards(
    folder: Path,
    split: str,
    event_ids: np.ndarray,
    columns: EventColumns,
    negatives: np.ndarray | None,
    block_events: int,
    shard_events: int,
    compression: str,
    threads: int,
    report: Callable[[int], None],
    hard: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Write event_ids, in this order, as folder/shards/SPLIT-NNNNNN.tar. → the manifest's description of each
    shard.

    negatives, hard: row k belongs to event_ids[k]. threads: shards written at once. `report` gets the number
    of events written so far.
    """
    blocks_per_shard = max(1, shard_events // block_events)
    starts = range(0, len(event_ids), block_events)
    written = itertools.count(1)  # blocks, by all threads

    def write(number: int) -> dict[str, Any]:
        name = f"shards/{split}-{number:06d}.tar"
        sizes: list[int] = []
        searches: list[int] = []

        def payloads() -> Iterator[bytes]:
            for start in starts[number * blocks_per_shard : (number + 1) * blocks_per_shard]:
                of_block = slice(start, start + block_events)
                rows = event_ids[of_block]
                stored = (None if items is None else items[of_block] for items in (negatives, hard))
                sizes.append(len(rows))
                searches.append(int((columns.task[rows] == SRC).sum()))
                yield _ipc_bytes(columns.block(rows, *stored), compression)
                report(min(next(written) * block_events, len(event_ids)))

        num_bytes, sha256 = _write_tar(folder / name, payloads())
        return {"name": name, "num_bytes": num_bytes, "sha256": sha256, "blocks": sizes, "searches": searches}

    (folder / "shards").mkdir(parents=True, exist_ok=True)
    return list(in_threads(write, range(-(-len(starts) // blocks_per_shard)), threads))


def _ipc_bytes(batch: pa.RecordBatch, compression: str) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(
        compression=None if compression == "none" else compression, use_threads=False
    )
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _write_tar(path: Path, payloads: Iterator[bytes]) -> tuple[int, str]:
    """One tar of NNNNNN.arrow entries; owner, mode and time are constants. → (num_bytes, sha256)."""
    with open(path, "wb") as raw:
        hashed = HashingFile(raw)
        with tarfile.open(
            fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT, copybufsize=COPY_BYTES
        ) as tar:  # type: ignore[call-overload]
            for number, payload in enumerate(payloads):
                entry = tarfile.TarInfo(f"{number:06d}.arrow")
                entry.size, entry.mode, entry.mtime = len(payload), 0o644, 0
                tar.addfile(entry, io.BytesIO(payload))
        raw.flush()
        os.fsync(raw.fileno())
    return hashed.num_bytes, hashed.sha256.hexdigest()


def describe_file(folder: Path, path: Path) -> dict[str, Any]:
    """name, num_bytes and sha256 of a finished file, which is flushed to disk first."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return {
        "name": str(path.relative_to(folder)),
        "num_bytes": path.stat().st_size,
        "sha256": file_sha256(path),
    }
