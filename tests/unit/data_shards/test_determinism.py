"""Same input, seed and version → same bytes: whatever the threads, the order of rows, or interruptions."""

import hashlib
import random
from pathlib import Path

from data_shards.prepare import prepare
from tests.conftest import SMALL
from tests.worlds import write_tables


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_threads_and_row_order_do_not_change_a_byte(prepared: Path, tmp_path: Path) -> None:
    raw = write_tables(tmp_path / "raw")
    lines = (raw / "events.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (raw / "events.jsonl").write_text("".join(lines))
    prepare("tables", raw, tmp_path / "out", [*SMALL, "threads=1", "memory_limit=300MB"])
    assert digests(tmp_path / "out") == digests(prepared)


def test_the_seed_changes_ids_and_order(prepared: Path, tmp_path: Path) -> None:
    prepare("tables", write_tables(tmp_path / "raw"), tmp_path / "out", [*SMALL, "seed=1"])
    other = digests(tmp_path / "out")
    same = {name for name, digest in digests(prepared).items() if other[name] == digest}
    assert same <= {"tokenizer/tokenizer.json"}


def test_ids_tell_nothing_of_the_order_of_appearance(prepared: Path) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    original = [int(item[1:]) for item in pq.read_table(prepared / "catalog" / "items.parquet")["item_id"].to_pylist()]
    assert abs(np.corrcoef(original, np.arange(len(original)))[0, 1]) < 0.25
