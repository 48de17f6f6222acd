"""Files of a prepared folder are what its manifest says, and that is looked at once."""

import os
import shutil
from pathlib import Path

import pytest

from tests.tiny_folder import make_tiny_folder
from trainer.data import verified
from trainer.data.cf_table import cf_path
from trainer.data.folder import PreparedFolder
from trainer.errors import DataError
from trainer.models.gensr.model import GenSR


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_tiny_folder(tmp_path / "data")


def tables(folder: Path) -> None:
    PreparedFolder.at(folder).tables(GenSR.needs)


def zero_half(path: Path) -> None:
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(len(content) - half))


@pytest.mark.parametrize("name", ["catalog/item_tokens-000000.npy", "tokenizer/tokenizer.json"])
def test_a_file_that_is_half_zeros_is_refused(folder: Path, name: str) -> None:
    zero_half(folder / name)
    with pytest.raises(DataError, match=rf"{name}: checksum differs"):
        tables(folder)


def test_a_damaged_cf_table_is_refused_where_it_is_read(folder: Path) -> None:
    zero_half(cf_path(folder))
    PreparedFolder.at(folder).tables(frozenset())
    with pytest.raises(DataError, match=r"lightgcn\.safetensors: checksum differs.*gensr cf"):
        tables(folder)


def test_missing_and_cut_files_are_named(folder: Path) -> None:
    path = folder / "catalog" / "queries.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"queries\.parquet: \d+ bytes, expected \d+"):
        tables(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"queries\.parquet: missing"):
        tables(folder)


def test_a_file_is_read_again_only_after_a_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = verified.file_sha256

    def recorded(path: Path) -> str:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(verified, "file_sha256", recorded)
    tables(folder)
    assert "item_tokens-000000.npy" in read and "lightgcn.safetensors" in read
    read.clear()
    tables(folder)
    assert read == []
    os.utime(folder / "catalog" / "items.parquet", ns=(1, 1))
    tables(folder)
    assert read == ["items.parquet"]
    shutil.rmtree(folder)
    make_tiny_folder(tmp_path / "other")
    tables(tmp_path / "other")
    assert len(list((tmp_path / "cache" / "gensr" / "verified").glob("*.json"))) == 1  # the other is gone


def test_a_cache_that_cannot_be_written_costs_time_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    tables(folder)
    zero_half(folder / "catalog" / "items.parquet")
    with pytest.raises(DataError, match="checksum"):
        tables(folder)
