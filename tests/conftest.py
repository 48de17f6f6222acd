"""Fixtures that every test may use: prepared folders of a tiny world."""

import os
from pathlib import Path

import pytest

from data_shards.prepare import prepare
from tests.worlds import write_tables

# Tests compare numbers bit for bit and start more processes than a machine has GPUs, so they run on the CPU
# everywhere. `make test-gpu` is for the rest.
if not os.environ.get("GENSR_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

SMALL = ("block_events=64", "shard_events=256", "vocab_size=400", "history_max=20")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder: 60 users, about 150 items, both tasks, natural text, four or more training shards.
    Read-only."""
    folder = tmp_path_factory.mktemp("world")
    prepare("tables", write_tables(folder / "raw"), folder / "prepared", SMALL)
    return folder / "prepared"


@pytest.fixture(scope="session")
def prepared_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with anonymised integer words in captions and queries. Read-only."""
    folder = tmp_path_factory.mktemp("words_world")
    prepare("tables", write_tables(folder / "raw", anonymised=True), folder / "prepared", SMALL)
    return folder / "prepared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: a worker that gets one of them last keeps the others waiting."""
    kinds = ("slow", "distributed", "slurm")
    slow = {item.path for item in items if any(item.get_closest_marker(kind) for kind in kinds)}
    items.sort(key=lambda item: item.path not in slow)
