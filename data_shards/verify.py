"""Whether a prepared folder is what its manifest says: every file's size and sha256, every number decoded and
in range.

A row number out of range would otherwise be a wrong embedding (-5 counts from the end), or a crash hours
later.
"""

import json
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.blocks import decode_blocks, tar_entries
from data_shards.checksum import file_sha256, has_sha256
from data_shards.errors import DataError
from data_shards.matrices import matrix_parts
from data_shards.schema import NO_QUERY, SPLITS, SRC, Manifest, Shard

FIX = "Restore the file or prepare the folder again."
CF_TABLE, CF_DIGEST = "cf/lightgcn.safetensors", "cf/lightgcn.sha256"
CHUNK_ROWS = 1 << 18


def verify(folder: Path, manifest: Manifest) -> None:
    """Raises DataError naming the first file that is missing, changed or holds what it cannot hold."""
    try:
        _verify(folder, manifest)
    except OSError as error:  # permissions, or a disk that fails
        raise DataError(f"{error.filename or folder}: cannot be read: {error.strerror}. {FIX}") from error


def _verify(folder: Path, manifest: Manifest) -> None:
    files = [
        (shard.name, shard.num_bytes, shard.sha256) for split in SPLITS for shard in manifest.shards(split)
    ]
    files += [(file["name"], file["num_bytes"], file["sha256"]) for file in manifest.raw["catalog"]]
    for name, num_bytes, _ in files:
        _check_size(folder / name, num_bytes)
    for name, _, sha256 in files:
        if file_sha256(folder / name) != sha256:
            raise DataError(f"{folder / name} differs from the checksum in the manifest: changed. {FIX}")
    _check_catalog(folder / "catalog", manifest)
    negatives = ("negatives", "hard_negatives") if manifest.num_hard_negatives else ("negatives",)
    for split in SPLITS:
        for shard in manifest.shards(split):
            others = ("impressions",) if split == "train" else negatives
            _check_shard(folder / shard.name, shard, manifest, others)
    _check_cf(folder)


def _check_size(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing, though the manifest lists it. Prepare the folder again.")
    if path.stat().st_size != num_bytes:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes, the manifest says {num_bytes}: cut off or changed. "
            "Prepare the folder again."
        )


# ---- catalogue ---------------------------------------------------------------------------------------------


def _check_catalog(folder: Path, manifest: Manifest) -> None:
    text = manifest.raw["text"]
    sizes = {"item": manifest.num_items, "query": manifest.num_queries}
    for name, rows in (("items", sizes["item"]), ("queries", sizes["query"]), ("users", manifest.num_users)):
        _check_rows(folder / f"{name}.parquet", rows)
    for stem, rows in sizes.items():
        _check_matrix(folder, f"{stem}_tokens", (rows, text[f"{stem}_tokens"]), text["vocab_size"] - 1)
        if manifest.num_words:
            _check_matrix(folder, f"{stem}_words", (rows, None), manifest.num_words)
    if manifest.category_depth:
        _check_rows(folder / "categories.parquet", manifest.num_categories)
        shape = (manifest.num_items, manifest.category_depth)
        _check_matrix(folder, "item_category", shape, manifest.num_categories)


def _check_rows(path: Path, rows: int) -> None:
    try:
        found = pq.ParquetFile(path).metadata.num_rows
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}. {FIX}") from error
    if found != rows:
        raise DataError(f"{path}: {found} rows, the manifest says {rows}. {FIX}")


def _check_matrix(folder: Path, stem: str, shape: tuple[int, int | None], largest: int) -> None:
    """Parts of a matrix of ids 0 … largest, [rows, width]."""
    where = f"{folder / stem}-*.npy"
    try:
        parts = matrix_parts(folder, stem, shape[0])
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{where}: cannot be read: {error}. {FIX}") from error
    done = 0
    for part in parts:
        if part.ndim != 2 or part.dtype.kind not in "iu" or shape[1] not in (None, part.shape[1]):
            raise DataError(
                f"{where}: {part.dtype} {list(part.shape)}, not integers [rows, {shape[1]}]. {FIX}"
            )
        for start in range(0, len(part), CHUNK_ROWS):
            rows = part[start : start + CHUNK_ROWS]
            _check_range(where, "row", rows.reshape(-1), (0, largest), done + start, max(rows.shape[1], 1))
        done += len(part)


def _check_range(
    where: str, unit: str, values: np.ndarray, bounds: tuple[int, int], first: int = 0, width: int = 1
) -> None:
    """Raises DataError naming the first of `values` beyond bounds (both included)."""
    low, high = bounds
    if len(values) and (values.min() < low or values.max() > high):
        at = int(np.flatnonzero((values < low) | (values > high))[0])
        raise DataError(
            f"{where}: {unit} {first + at // width} holds {values[at]}, which is not in {low} … {high}. {FIX}"
        )


# ---- shards ------------------------------------------------------------------------------------------------


def _check_shard(path: Path, shard: Shard, manifest: Manifest, others: tuple[str, ...]) -> None:
    try:
        for number, block in enumerate(decode_blocks(tar_entries(path), shard.blocks)):
            _check_block(f"{path}: block {number}", block.combine_chunks(), manifest, others)
            searches = int((block["task"].to_numpy() == SRC).sum())
            if shard.searches is not None and searches != shard.searches[number]:
                raise DataError(
                    f"{path}: block {number} has {searches} searches, the manifest says "
                    f"{shard.searches[number]}. {FIX}"
                )
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}. {FIX}") from error


def _check_block(where: str, block: pa.Table, manifest: Manifest, others: tuple[str, ...]) -> None:
    """Ids of one block. others: the columns of further items of the split."""
    items = (0, manifest.num_items - 1)
    bounds = {
        "user": (0, manifest.num_users - 1),
        "item": items,
        "task": (0, 1),
        "query": (NO_QUERY, manifest.num_queries - 1),
    }
    for name, bound in bounds.items():
        _check_range(f"{where}: {name}", "event", _numbers(block[name], name), bound)
    parallel = {"history_items": items, "history_tasks": (0, 1)}
    if manifest.has_history_queries:
        parallel["history_queries"] = bounds["query"]
    lists = {**parallel, **dict.fromkeys(others, items)}
    for name, bound in lists.items():
        _check_range(f"{where}: {name}", "entry", _numbers(_flat(block[name]), name), bound)
    lengths = _lengths(block["history_items"])
    for name in parallel:
        if not np.array_equal(lengths, _lengths(block[name])):
            raise DataError(f"{where}: history_items and {name} differ in length. {FIX}")
    _check_range(f"{where}: length of history_items", "event", lengths, (0, manifest.history_max))
    search, query = block["task"].to_numpy() == SRC, block["query"].to_numpy()
    if not np.array_equal(search, query != NO_QUERY):
        raise DataError(f"{where}: a search has no query, or a recommendation has one. {FIX}")


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.flatten() for chunk in column.chunks], type=column.type.value_type)


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    return np.concatenate([np.zeros(0, int), *(np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks)])


def _numbers(column: pa.ChunkedArray, name: str) -> np.ndarray:
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(f"{name} is {column.type} with {column.null_count} gaps, it must be integers")
    return column.to_numpy()


# ---- CF table ----------------------------------------------------------------------------------------------


def _check_cf(folder: Path) -> None:
    """The table of `gensr cf`, where it is there: its sha256, and that all of its numbers are finite."""
    path, digest = folder / CF_TABLE, folder / CF_DIGEST
    if not path.is_file():
        return
    if digest.is_file() and not has_sha256(path, digest):
        raise DataError(f"{path} differs from its checksum in {digest.name}. {_again(folder)}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                _check_finite(path, name, tensors.get_tensor(name))
    except (SafetensorError, OSError, ValueError, TypeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}. {_again(folder)}") from error


def _again(folder: Path) -> str:
    return f"Make it again with: gensr cf {shlex.quote(str(folder))} overwrite=true"


def _check_finite(path: Path, name: str, values: np.ndarray) -> None:
    for start in range(0, len(values), CHUNK_ROWS):
        wrong = ~np.isfinite(values[start : start + CHUNK_ROWS])
        if wrong.any():
            place = np.argwhere(wrong)[0].tolist()
            place[0] += start
            raise DataError(
                f"{path}: {name}{place} is {values[tuple(place)]}, not a finite number. "
                f"{_again(path.parents[1])}"
            )
