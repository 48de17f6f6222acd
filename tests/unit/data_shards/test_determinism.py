"""Same input, seed and version → same bytes: whatever the threads, the order of rows, or interruptions."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_shards.prepare import prepare
from data_shards.work import Work
from tests.conftest import SMALL
from tests.worlds import write_tables
from trainer.cli import app


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
    # categories are numbered by their paths: item_category differs, what its ids stand for does not
    assert same <= {"tokenizer/tokenizer.json", "catalog/categories.parquet"}


def test_ids_tell_nothing_of_the_order_of_appearance(prepared: Path) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    original = [
        int(item[1:]) for item in pq.read_table(prepared / "catalog" / "items.parquet")["item_id"].to_pylist()
    ]
    assert abs(np.corrcoef(original, np.arange(len(original)))[0, 1]) < 0.25


KILLED = """
import os, signal, sys
from data_shards.prepare import prepare

def progress(stage, done, total):
    print(stage, flush=True)
    if stage == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)

prepare("tables", *sys.argv[2:4], sys.argv[4:], progress=progress)
"""


def test_killed_again_and_again_the_bytes_are_the_same_and_finished_stages_stay(
    prepared: Path, tmp_path: Path
) -> None:
    """SIGKILL inside one stage after another, each time by a process of its own: as power or the scheduler
    does it, without a word."""
    raw, out = write_tables(tmp_path / "raw"), tmp_path / "out"
    before = [
        "read",
        "encode",
        "sort",
        "filter",
        "split",
        "histories",
        "names",
        "impressions",
        "catalog",
        "negatives",
        "shards",
        "checks",
    ]
    chosen = sorted(random.Random(3).sample(range(len(before)), 3))
    finished = 0
    for number in chosen:
        command = [sys.executable, "-c", KILLED, before[number], str(raw), str(out), *SMALL]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not out.exists()
        assert not set(ended.stdout.split()) & set(before[:finished]), "what was finished is not done again"
        finished = number
    prepare("tables", raw, out, SMALL)
    assert digests(out) == digests(prepared)
    assert not out.with_name("out.partial").exists()


def test_ctrl_c_in_a_query_ends_the_verb_and_it_resumes(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """duckdb makes a RuntimeError of it."""
    command = ["prepare", "tables", str(write_tables(tmp_path / "raw")), str(tmp_path / "out"), *SMALL]

    def long_query(work: Work, *rest: Any) -> Any:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        for _ in range(1000):  # a single long one may see the signal only at its end
            work.scalar("SELECT sum(range) FROM range(10000000)")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with monkeypatch.context() as patched:
        patched.setattr("data_shards.encode.sort_clicks", long_query)
        stopped = CliRunner().invoke(app, command)
    signal.signal(signal.SIGINT, before)
    assert stopped.exit_code == 75 and "the same command resumes" in stopped.output
    resumed = CliRunner().invoke(app, command)
    assert resumed.exit_code == 0, resumed.output
    assert digests(tmp_path / "out") == digests(prepared)
