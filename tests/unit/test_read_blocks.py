"""Reading a shard over a disk or network that fails for a moment."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_shards.schema import read_manifest
from tests.tiny_folder import make_tiny_folder
from trainer.data import blocks
from trainer.errors import DataError


class Flaky:
    """webdataset's reader, failing `failures` times after its first entry."""

    def __init__(self, failures: int) -> None:
        self.failures, self.real = failures, blocks.tar_file_iterator

    def __call__(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        for number, entry in enumerate(self.real(*arguments, **options)):
            if number == 1 and self.failures:
                self.failures -= 1
                raise OSError("the network is down")
            yield entry


def events(folder: Path) -> list[int]:
    shard = read_manifest(folder).shards("train")[0]
    return [event for table in blocks.read_blocks(folder, shard) for event in table["event_id"].to_pylist()]


def test_a_transient_error_is_retried_and_nothing_is_lost_or_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_folder(tmp_path)
    undisturbed = events(folder)
    monkeypatch.setattr(blocks, "RETRY_AFTER_S", 0.0)
    monkeypatch.setattr(blocks, "tar_file_iterator", Flaky(2))
    with pytest.warns(UserWarning, match="trying again"):
        assert events(folder) == undisturbed


def test_a_lasting_error_names_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_folder(tmp_path)
    monkeypatch.setattr(blocks, "RETRY_AFTER_S", 0.0)
    monkeypatch.setattr(blocks, "tar_file_iterator", Flaky(99))
    with (
        pytest.warns(UserWarning, match="trying again"),
        pytest.raises(DataError, match=r"train-000000\.tar: cannot be read at block 1: the network is down"),
    ):
        events(folder)
