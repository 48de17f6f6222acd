"""Item matrices: written in parts, joined once a node, mapped and not copied; folders of format 1."""

import json
import multiprocessing
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards import matrices
from data_shards.errors import DataError
from data_shards.matrices import MatrixWriter, compact_type, matrix_parts
from data_shards.schema import Manifest, read_manifest
from tests.tiny_folder import make_tiny_folder, relist
from trainer.batch import rows_of
from trainer.data.cf_table import CfTable
from trainer.data.folder import PreparedFolder
from trainer.data.item_tables import load_tables
from trainer.models.gensr.model import GenSR


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(("rows", "parts"), [(0, 1), (1, 1), (10, 1), (11, 2), (35, 4)])
def test_a_matrix_is_written_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, parts: int
) -> None:
    monkeypatch.setattr(matrices, "PART_ROWS", 10)
    values = np.arange(rows * 3, dtype=np.uint16).reshape(rows, 3)
    writer = MatrixWriter(tmp_path, "item_tokens", rows, 3, np.uint16)
    for start in range(0, rows, 7):
        writer.append(values[start : start + 7])
    writer.close()
    found = matrix_parts(tmp_path, "item_tokens", rows)
    assert len(found) == parts and np.concatenate(found).tolist() == values.tolist()
    with pytest.raises(DataError, match="the manifest says"):
        matrix_parts(tmp_path, "item_tokens", rows + 1)


def test_types_are_as_small_as_the_ids_allow() -> None:
    assert compact_type(65_535) is np.uint16 and compact_type(65_536) is np.int32
    ids = torch.tensor([[0, 65_535], [40_000, 1]])
    table = torch.from_numpy(ids.numpy().astype(np.uint16))
    assert rows_of(table, torch.tensor([1, 0])).tolist() == [[40_000, 1], [0, 65_535]]
    assert rows_of(ids.int() + 70_000, torch.tensor([[0]])).tolist() == [[[70_000, 135_535]]]


def test_the_parts_of_a_prepared_folder_give_the_same_tables_as_one(tmp_path: Path) -> None:
    folder = make_tiny_folder(tmp_path / "folder")
    whole = PreparedFolder.at(folder).tables(GenSR.needs, with_folds=True).item_tokens.clone()
    tokens = np.load(folder / "catalog" / "item_tokens-000000.npy")
    for number, part in enumerate(np.array_split(tokens, 3)):
        np.save(folder / "catalog" / f"item_tokens-{number:06d}.npy", part)
    relist(folder)
    for _ in range(2):  # joined, then found
        tables = PreparedFolder.at(folder).tables(GenSR.needs, with_folds=True)
        assert tables.item_tokens.dtype == torch.uint16 and torch.equal(tables.item_tokens, whole)
    assert len(list((tmp_path / "cache" / "gensr" / "joined").glob("*.npy"))) == 1


def test_folders_of_format_1_are_read(tmp_path: Path) -> None:
    folder = make_tiny_folder(tmp_path)
    for path in (folder / "catalog").glob("*-000000.npy"):
        path.rename(path.with_name(path.name.replace("-000000", "")))
    relist(folder)
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**raw, "format_version": 1}))
    assert PreparedFolder.at(folder).tables(GenSR.needs, with_folds=True).item_tokens.shape == (130, 8)
    (folder / "manifest.json").write_text(json.dumps({**raw, "format_version": 99}))
    with pytest.raises(DataError, match="Prepare the folder again"):
        read_manifest(folder)


def mapping_memory(name: str) -> tuple[int, int]:
    """(RSS, PSS) in bytes of this process's mapping of a file."""
    text = Path("/proc/self/smaps").read_text()
    block = text[text.index(name) :]
    return tuple(
        int(re.search(rf"^{key}:\s+(\d+) kB", block, re.MULTILINE)[1]) * 1024  # type: ignore[index]
        for key in ("Rss", "Pss")
    )  # type: ignore[return-value]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_processes_of_a_node_share_the_catalogue(tmp_path: Path) -> None:
    """80 MB of tokens in two processes that were started apart: each sees all of them, each pays half."""
    rows, width = 1_000_000, 40
    (tmp_path / "catalog").mkdir()
    np.save(tmp_path / "catalog" / "item_tokens-000000.npy", np.full((rows, width), 7, np.uint16))
    np.save(tmp_path / "catalog" / "query_tokens-000000.npy", np.ones((1, 2), np.uint16))
    manifest = Manifest(raw={"counts": {"items": rows, "queries": 1}, "text": {"num_words": 0}}, hash="0")
    empty = torch.zeros(0, 1)
    cf = CfTable(empty, torch.zeros(rows, 1), torch.zeros(0, rows, 1), None, "", {"holdout": "none"}, {}, "0")
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    jobs = [
        context.Process(target=read_all, args=(tmp_path, manifest, cf, barrier, answers)) for _ in range(2)
    ]
    for job in jobs:
        job.start()
    for rss, pss in [answers.get(timeout=240) for _ in jobs]:
        assert rss >= rows * width * 2 and pss < 0.6 * rss
    for job in jobs:
        job.join()


def read_all(folder: Path, manifest: Manifest, cf: CfTable, barrier: Any, answers: Any) -> None:
    tables = load_tables(folder, manifest, cf)
    assert (
        int(rows_of(tables.item_tokens, torch.arange(0, tables.num_items, 40)).sum())
        == 7 * 40 * tables.num_items // 40
    )
    assert int(tables.item_tokens.view(torch.int16).max()) == 7  # every page
    barrier.wait(240)
    answers.put(mapping_memory("item_tokens-000000.npy"))
    barrier.wait(240)
