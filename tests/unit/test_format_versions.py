"""What format 3 adds reaches batches and tables; folders of format 2 are read as before."""

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from data_shards.blocks import decode_blocks, tar_entries
from data_shards.categories import CategoryWriter
from data_shards.inspect import describe, inspect
from data_shards.matrices import matrix_parts
from data_shards.schema import NO_QUERY, SRC, read_manifest
from tests.tiny_folder import make_tiny_folder, to_format_2
from trainer.batch import Batch
from trainer.config import DataConfig
from trainer.data.cf_table import CfTable, load_cf
from trainer.data.eval_stream import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.data.item_tables import load_tables
from trainer.data.train_stream import TrainStream
from trainer.errors import DataError
from trainer.serving.scorer import read_tables

HISTORY_MAX = 4  # shorter than the stored histories
CONFIG = DataConfig(history_max=HISTORY_MAX)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("formats")
    made = {version: make_tiny_folder(root / str(version)) for version in (2, 3)}
    to_format_2(made[2])
    return made


def batches(folder: Path) -> list[Batch]:
    """Training batches of two epochs, then validation batches."""
    opened = PreparedFolder.at(folder)
    train = TrainStream(opened, CONFIG, seed=1, global_batch_size=24, micro_batch_size=24)
    return [*itertools.islice(train, 8), *EvalStream(opened, "valid", CONFIG, batch_size=16)]


def stored(folder: Path) -> dict[int, dict[str, Any]]:
    """Every event by its id, by loops."""
    shards = [shard for split in ("train", "valid") for shard in read_manifest(folder).shards(split)]
    blocks = [
        block for shard in shards for block in decode_blocks(tar_entries(folder / shard.name), shard.blocks)
    ]
    return {row["event_id"]: row for block in blocks for row in block.to_pylist()}


def test_batches_hold_the_queries_of_histories(folders: dict[int, Path]) -> None:
    events, searches = stored(folders[3]), 0
    for batch in batches(folders[3]):
        assert batch.history_queries.dtype == torch.int64
        for row in np.flatnonzero(batch.event_id.numpy() >= 0):
            event = events[int(batch.event_id[row])]
            newest = event["history_queries"][-HISTORY_MAX:]
            assert batch.history_queries[row].tolist() == newest + [NO_QUERY] * (HISTORY_MAX - len(newest))
            tasks = event["history_tasks"][-HISTORY_MAX:]
            assert [query != NO_QUERY for query in newest] == [task == SRC for task in tasks]
            searches += sum(tasks)
    assert searches > 100


def test_format_2_gives_the_same_batches_without_queries(folders: dict[int, Path]) -> None:
    for old, new in zip(batches(folders[2]), batches(folders[3]), strict=True):
        assert old.history_queries.dtype == torch.int64
        assert old.history_queries.shape == old.history_items.shape and bool(
            (old.history_queries == -1).all()
        )
        for field in dataclasses.fields(Batch):
            if field.name not in ("history_queries", "groups"):
                assert torch.equal(getattr(old, field.name), getattr(new, field.name)), field.name


def test_format_2_has_tables_without_categories_and_says_what_it_lacks(folders: dict[int, Path]) -> None:
    manifest = read_manifest(folders[2])
    assert (manifest.has_history_queries, manifest.num_categories, manifest.category_depth) == (False, 0, 0)
    tables = load_tables(folders[2], manifest, load_cf(folders[2], manifest))
    assert tables.item_category.shape == (manifest.num_items, 0)
    manifest.check_holds({"cf", "item_text"}, folders[2])
    with pytest.raises(
        DataError, match=r"history_queries.* and .*item_category.*gensr prepare .*overwrite=true"
    ):
        manifest.check_holds({"item_category", "history_queries"}, folders[2])


def test_paths_of_categories_are_those_that_were_written(folders: dict[int, Path], tmp_path: Path) -> None:
    (tmp_path / "catalog").mkdir()
    texts = ["Cars\x1fAccessories", "Phones", "Phones\x1fAccessories\x1fCases", None, "Cars"]
    writer = CategoryWriter(tmp_path / "catalog", len(texts), max_levels=8)
    writer.append(pa.array(texts))
    writer.close()
    [matrix] = matrix_parts(tmp_path / "catalog", "item_category", len(texts))
    manifest = read_manifest(folders[3])
    raw = {**manifest.raw, "counts": {**manifest.raw["counts"], "categories": int(matrix.max())}}
    folder = PreparedFolder(tmp_path, dataclasses.replace(manifest, raw=raw), "hand-made")

    paths = folder.category_paths()

    assert ["\x1f".join(paths[row.max()]) or None for row in matrix] == texts  # ids ascend by level
    assert len(paths) == 1 + folder.manifest.num_categories
    assert PreparedFolder.at(folders[2]).category_paths() == [()]


def test_registered_versions_from_before_categories_are_read(tmp_path: Path) -> None:
    table = torch.zeros((5, 2), dtype=torch.int32)
    save_file(
        {"cf": table.float(), "item_tokens": table, "item_words": table[:, :0]},
        tmp_path / "tables.safetensors",
    )
    pq.write_table(pa.table({"item_id": list(range(5)), "text": [""] * 5}), tmp_path / "items.parquet")
    assert read_tables(tmp_path).item_category.shape == (5, 0)


def test_format_3_lacks_categories_only_where_the_source_has_none(folders: dict[int, Path]) -> None:
    manifest = read_manifest(folders[3])
    manifest.check_holds({"history_queries"}, folders[3])
    with pytest.raises(DataError, match=r"item_category.*Its source gives no item a category"):
        manifest.check_holds({"item_category", "history_queries"}, folders[3])


def test_categories_are_mapped_as_they_lie_in_the_file(prepared: Path) -> None:
    manifest = read_manifest(prepared)
    manifest.check_holds({"history_queries", "item_category"}, prepared)
    table = torch.ones(manifest.num_items, 2)
    cf = CfTable(torch.zeros(0, 2), table, table[None][:0], None, "", {"holdout": "none"}, {}, "0")
    categories = load_tables(prepared, manifest, cf).item_category
    assert categories.dtype == torch.int32
    assert categories.tolist() == np.load(prepared / "catalog" / "item_category-000000.npy").tolist()
    assert (int(categories.min()), int(categories.max())) == (1, manifest.num_categories)


def test_inspect_shows_queries_of_histories_where_there_are_some(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "old")
    to_format_2(tmp_path / "old")
    new, old = inspect(prepared), inspect(tmp_path / "old")
    searches = [click for click in new["example"]["history"] if click["task"] == "src"]
    assert searches and all(click["query"] for click in searches)
    assert all(click["query"] is None for click in new["example"]["history"] if click["task"] == "rec")
    assert {click["query"] for click in old["example"]["history"]} == {None}
    text = "\n".join(describe(new))
    assert f"{new['counts']['categories']} categories of items in 1 levels" in text
    newest = [click for click in new["example"]["history"][-5:] if click["task"] == "src"]
    assert all(f"src {click['item_id']} ({click['query']!r})" in text for click in newest)
    assert describe(old)
