"""`inspect` reads all of a folder: what was changed, or holds a number out of range, is named."""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file

from data_shards import verify
from data_shards.blocks import tar_entries
from data_shards.errors import DataError
from data_shards.inspect import inspect
from data_shards.write import _write_tar
from tests.tiny_folder import make_tiny_folder


@pytest.fixture
def folder(prepared_words: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared_words, tmp_path / "out")
    return tmp_path / "out"


def sign(folder: Path, name: str) -> None:
    """Write size and sha256 of a changed file into the manifest, as whoever made it wrong would."""
    raw = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    entries = [*raw["catalog"], *(shard for shards in raw["shards"].values() for shard in shards)]
    entry = next(entry for entry in entries if entry["name"] == name)
    entry.update(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(raw))


def change_events(folder: Path, split: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change event 3 of the first block of a split's first shard."""
    name = f"shards/{split}-000000.tar"
    tables = [pa.ipc.open_stream(entry).read_all() for entry in tar_entries(folder / name)]
    rows = tables[0].to_pylist()
    change(rows[3])
    tables[0] = pa.Table.from_pylist(rows, schema=tables[0].schema)
    payloads = []
    for table in tables:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        payloads.append(sink.getvalue().to_pybytes())
    _write_tar(folder / name, iter(payloads))
    sign(folder, name)


def set_(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda event: event.update({key: value})


def history(items: list[int], tasks: list[int]) -> Callable[[dict[str, Any]], None]:
    queries = [-1] * len(items)
    return lambda event: event.update(history_items=items, history_tasks=tasks, history_queries=queries)


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("train", set_("item", -5), r"train-000000\.tar: block 0: item: event 3 holds -5, which"),
        ("train", set_("item", 10**6), r"item: event 3 holds 1000000"),
        ("test", set_("user", -1), r"test-000000\.tar: block 0: user: event 3 holds -1"),
        ("test", set_("task", 2), r"task: event 3 holds 2"),
        ("valid", set_("query", -2), r"query: event 3 holds -2"),
        ("valid", set_("query", 10**6), r"query: event 3 holds 1000000"),
        ("train", lambda event: event.update(task=1 - event["task"]), r"a search has no query"),
        ("train", history([-1], [0]), r"history_items: entry \d+ holds -1"),
        ("train", history([1], []), r"differ in length"),
        ("train", set_("history_queries", [-2]), r"history_queries: entry \d+ holds -2"),
        ("train", set_("history_queries", [0] * 60), r"history_items and history_queries differ in length"),
        ("train", history([1] * 99, [0] * 99), r"event 3 holds 99"),
        ("train", set_("impressions", [10**6]), r"impressions: entry \d+ holds 1000000"),
        ("test", set_("negatives", [-1] * 99), r"negatives: entry 297 holds -1"),
        ("test", set_("item", None), r"item is int32 with 1 gaps"),
    ],
)  # fmt: skip
def test_an_id_out_of_range_is_found(
    folder: Path, split: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change_events(folder, split, change)
    with pytest.raises(DataError, match=message):
        inspect(folder)


def spoil_matrix(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path, change(np.load(path)))


def inf_in(matrix: np.ndarray) -> np.ndarray:
    floats = matrix.astype(np.float32)
    floats[2, 1] = np.inf
    return floats


@pytest.mark.parametrize(
    ("stem", "change", "message"),
    [
        ("item_tokens", inf_in, r"item_tokens-\*\.npy: float32 \[\d+, 48\], not integers"),
        ("item_tokens", lambda matrix: matrix + 60_000, r"item_tokens-\*\.npy: row 0 holds \d+, which"),
        ("query_words", lambda matrix: matrix.astype(np.int32) - 9, r"query_words-\*\.npy: row 0 holds -"),
        ("query_tokens", lambda matrix: matrix[:, :5], r"query_tokens-\*\.npy: uint16 \[\d+, 5\], not"),
        ("item_category", lambda matrix: matrix + 99, r"item_category-\*\.npy: row 0 holds \d+, which"),
        ("item_words", lambda matrix: matrix[:-1], r"item_words-\*\.npy: \d+ rows, the manifest says \d+"),
    ],
)  # fmt: skip
def test_a_matrix_out_of_range_is_found(
    folder: Path, stem: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    spoil_matrix(folder / "catalog" / f"{stem}-000000.npy", change)
    sign(folder, f"catalog/{stem}-000000.npy")
    with pytest.raises(DataError, match=message):
        inspect(folder)


FILES = ("catalog/item_words-000000.npy", "catalog/items.parquet", "tokenizer/tokenizer.json")


@pytest.mark.parametrize("name", [*FILES, "shards/test-000000.tar"])
def test_a_changed_byte_is_found(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} differs from the checksum in the manifest"):
        inspect(folder)
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes, the manifest says \d+"):
        inspect(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        inspect(folder)


@pytest.mark.parametrize("name", ["catalog/items.parquet", "manifest.json"])
def test_a_file_that_may_not_be_read_is_named(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By stand-ins, since root may read everything."""

    def denied_to(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def denied(path: Path) -> Any:
            if path == folder / name:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return read(path)

        return denied

    monkeypatch.setattr(Path, "read_bytes", denied_to(Path.read_bytes))
    monkeypatch.setattr(verify, "file_sha256", denied_to(verify.file_sha256))
    with pytest.raises(DataError, match=rf"{name}: cannot be read: Permission denied"):
        inspect(folder)


@pytest.mark.parametrize("name", ["items", "categories"])
def test_a_table_with_other_rows_is_found(folder: Path, name: str) -> None:
    shutil.copyfile(folder / "catalog" / "users.parquet", folder / "catalog" / f"{name}.parquet")
    sign(folder, f"catalog/{name}.parquet")
    with pytest.raises(DataError, match=rf"{name}\.parquet: 60 rows, the manifest says \d+"):
        inspect(folder)


def test_one_inf_in_the_cf_table_is_found(tmp_path: Path) -> None:
    folder = make_tiny_folder(tmp_path / "tiny")
    inspect(folder)
    path = folder / "cf" / "lightgcn.safetensors"
    tensors = load_file(path)
    name = max(tensors, key=lambda key: tensors[key].ndim)
    tensors[name][(1,) * tensors[name].ndim] = np.inf
    save_file(tensors, path)
    with pytest.raises(DataError, match=r"differs from its checksum .*gensr cf .* overwrite=true"):
        inspect(folder)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "cf" / "lightgcn.sha256").write_text(f"{digest} {path.stat().st_size} lightgcn.safetensors\n")
    with pytest.raises(
        DataError, match=rf"lightgcn\.safetensors: {name}\[1, 1.*\] is inf, not a finite number"
    ):
        inspect(folder)
