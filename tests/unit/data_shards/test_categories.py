"""Categories of items: every way to write them gives the same ids; each source fills them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from data_shards.categories import PATH_MARK, CategoryWriter
from data_shards.errors import DataError
from data_shards.prepare import prepare

SETTINGS = ("num_negatives=1", "vocab_size=300", "split=leave_one_out")
PATHS = [["Cars", "New"], ["Bikes", "New", "Red"], [], ["Cars"], ["Bikes", "New"]]


def paths_by_item(folder: Path) -> dict[Any, list[str]]:
    """The category path of each item of a prepared folder, read from the matrix alone."""
    catalog = folder / "catalog"
    rows = pq.read_table(catalog / "categories.parquet").to_pylist()
    items = pq.read_table(catalog / "items.parquet")["item_id"].to_pylist()
    matrix = np.load(catalog / "item_category-000000.npy")
    return {
        item: [rows[number - 1]["name"] for number in ids if number]
        for item, ids in zip(items, matrix.tolist(), strict=True)
    }


def write_logs(folder: Path, suffix: str, category: list[Any]) -> Path:
    folder.mkdir()
    events = {"user_id": [0] * 4 + [1] * 4, "item_id": [0, 1, 2, 3, 1, 2, 3, 4]}
    events["time"] = [10**12 + position for position in range(8)]
    pq.write_table(pa.table(events), folder / "events.parquet")
    items = {"item_id": [*range(5)], "text": [f"item {i}" for i in range(5)], "category": category}
    if suffix == "parquet":
        pq.write_table(pa.table(items), folder / "items.parquet")
    elif suffix == "csv":
        pyarrow.csv.write_csv(pa.table(items), folder / "items.csv")
    else:
        rows = [dict(zip(items, row, strict=True)) for row in zip(*items.values(), strict=True)]
        (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("as_list", [True, False])
def test_a_path_may_be_a_list_or_text(tmp_path: Path, suffix: str, as_list: bool) -> None:
    category: list[Any] = PATHS if as_list else [">".join(path) for path in PATHS]
    if suffix == "csv" and as_list:
        category = [json.dumps(path) for path in PATHS]
    manifest = prepare("tables", write_logs(tmp_path / "raw", suffix, category), tmp_path / "out", SETTINGS)
    assert paths_by_item(tmp_path / "out") == dict(enumerate(PATHS))
    assert (manifest.num_categories, manifest.category_depth) == (5, 3)
    rows = pq.read_table(tmp_path / "out" / "catalog" / "categories.parquet").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (1, 0, "Bikes", 0),
        (2, 0, "Cars", 0),
        (3, 1, "New", 1),
        (4, 1, "New", 2),
        (5, 2, "Red", 3),
    ], "by level, then path; New is there below both"


def test_lists_and_text_may_be_mixed(tmp_path: Path) -> None:
    category = [["Cars", "New"], "Bikes > New > Red", None, "[Cars", ["Bikes", None, "a > b"]]
    prepare("tables", write_logs(tmp_path / "raw", "jsonl", category), tmp_path / "out", SETTINGS)
    expected = [["Cars", "New"], ["Bikes", "New", "Red"], [], ["[Cars"], ["Bikes", "a > b"]]
    assert paths_by_item(tmp_path / "out") == dict(enumerate(expected))


NESTED = [["Cars", "New"], ["Bikes"]]


@pytest.mark.parametrize(
    ("suffix", "category", "message"),
    [
        ("csv", "['Cars', 'New']", "that of item 0 must be one list of names"),  # as pandas writes a list
        ("csv", "['Cars'\n 'New']", "that of item 0 must be one list of names"),  # and an array
        ("jsonl", NESTED, "that of item 0 must be one list of names"),
        ("parquet", NESTED, r"must be a column of text, numbers or lists of them, it is VARCHAR\[\]\[\]"),
    ],
)
def test_a_list_in_another_writing_is_no_name(
    tmp_path: Path, suffix: str, category: Any, message: str
) -> None:
    nothing: Any = [] if suffix == "parquet" else ""
    raw = write_logs(tmp_path / "raw", suffix, [category, *[nothing] * 4])
    with pytest.raises(DataError, match=rf"items\.{suffix}:category: {message}"):
        prepare("tables", raw, tmp_path / "out", SETTINGS)


def test_a_folder_without_categories_says_so(tmp_path: Path) -> None:
    manifest = prepare("tables", write_logs(tmp_path / "raw", "csv", [""] * 5), tmp_path / "out", SETTINGS)
    assert (manifest.num_categories, manifest.category_depth) == (0, 0)
    assert not list((tmp_path / "out" / "catalog").glob("*categor*"))


def test_the_writer_joins_batches_and_cuts_deep_paths(tmp_path: Path) -> None:
    writer = CategoryWriter(tmp_path, 3, max_levels=2)
    writer.append(pa.array([PATH_MARK.join("abc"), None]))
    writer.append(pa.array([PATH_MARK.join(("a", "", " b "))]))
    assert writer.close() == {"categories": 2, "category_depth": 2}
    assert np.load(tmp_path / "item_category-000000.npy").tolist() == [[1, 2], [0, 0], [1, 2]]


def test_simulated_logs_have_their_tree(tmp_path: Path) -> None:
    from data_shards.simulate import simulate

    simulate(tmp_path / "raw", users=60, items=300, days=6, seed=0)
    manifest = prepare("kuaisar", tmp_path / "raw", tmp_path / "out", ["vocab_size=300"])
    assert manifest.category_depth >= 2 and manifest.num_categories > 2
    rows = pq.read_table(tmp_path / "out" / "catalog" / "items.parquet").to_pylist()
    paths = paths_by_item(tmp_path / "out")
    assert all(row["category"] == (" > ".join(paths[row["item_id"]]) or None) for row in rows)
