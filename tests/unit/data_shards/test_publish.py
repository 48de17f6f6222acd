"""A folder gets its name in one step, whoever is killed and when; one preparation at a time writes it."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_shards import prepare as prepare_module
from data_shards import publish
from data_shards.errors import DataError
from data_shards.prepare import prepare
from data_shards.publish import take_lock
from data_shards.schema import read_manifest
from data_shards.work import Work
from tests.worlds import write_tables

FAST = ("vocab_size=300", "num_negatives=20")

KILLED_AT_A_RENAME = """
import os, signal, sys
from data_shards import publish
from data_shards.prepare import prepare

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

where, raw, out, *settings = sys.argv[1:]
if where == "renames":  # a file system that cannot exchange: killed between the two renames
    publish.exchange = lambda first, second: False
    real = os.rename
    os.rename = lambda old, new: (real(old, new), str(new).endswith("/old") and killed())
elif where == "before":
    publish.exchange = killed
elif where == "after":
    real = publish.exchange
    publish.exchange = lambda first, second: (real(first, second), killed())
prepare("tables", raw, out, settings)
"""


def killed_while_publishing(where: str, raw: Path, out: Path, *settings: str) -> None:
    command = [sys.executable, "-c", KILLED_AT_A_RENAME, where, str(raw), str(out), *FAST, *settings]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.parametrize("where", ["renames", "before", "after"])
def test_a_kill_while_publishing_loses_neither_folder(tmp_path: Path, where: str) -> None:
    raw, out = write_tables(tmp_path / "raw", users=12, items=60, days=4), tmp_path / "out"
    before = prepare("tables", raw, out, FAST)
    (out / "cf").mkdir()
    (out / "cf" / "mine").write_text("made later")
    killed_while_publishing(where, raw, out, "overwrite=true", "history_max=10")
    assert (where == "renames") != out.exists(), "an exchange leaves no moment without OUT"
    if where == "before":
        assert read_manifest(out).hash == before.hash and (out / "cf" / "mine").is_file()
    with pytest.raises(DataError, match="exists already"):
        prepare("tables", raw, out, [*FAST, "min_interactions=9999"])
    assert read_manifest(out).history_max == (50 if where == "before" else 10)
    after = prepare("tables", raw, out, [*FAST, "overwrite=true", "history_max=10"])
    assert after.history_max == 10 and not out.with_name("out.partial").exists()
    assert all((out / shard.name).stat().st_size == shard.num_bytes for shard in after.shards("train"))


@pytest.mark.parametrize("another", [False, True])
def test_what_is_complete_and_not_published_belongs_to_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, another: bool
) -> None:
    """Stopped behind the last stage of the first OUT: the same command repeats none, and another one that
    fails leaves no OUT."""
    raw, out = write_tables(tmp_path / "raw", users=12, items=60, days=4), tmp_path / "out"

    def stopped(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "sync", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare("tables", raw, out, FAST)
    monkeypatch.undo()
    assert (tmp_path / "out.partial" / "out" / "manifest.json").is_file()
    if another:
        with pytest.raises(DataError, match="60 negatives cannot be drawn"):
            prepare("tables", raw, out, [*FAST, "num_negatives=60"])
        assert not out.exists()
    else:
        stages: list[str] = []
        prepare("tables", raw, out, FAST, progress=lambda stage, done, total: stages.append(stage))
        assert stages == [] and read_manifest(out).num_negatives == 20


def test_a_folder_set_aside_without_a_journal_comes_back(tmp_path: Path) -> None:
    raw, out = write_tables(tmp_path / "raw", users=12, items=60, days=4), tmp_path / "out"
    before = prepare("tables", raw, out, FAST)
    partial = tmp_path / "out.partial"
    partial.mkdir()
    os.rename(out, partial / "old")
    with pytest.raises(DataError, match="exists already"):
        prepare("tables", raw, out, [*FAST, "seed=3"])
    assert read_manifest(out).hash == before.hash


def test_a_list_of_finished_stages_goes_before_what_it_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "columns").mkdir()
    (tmp_path / "stages.json").write_text("{}")

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(publish.shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        publish.clear(tmp_path)
    assert not (tmp_path / "stages.json").exists()


def test_exchange_swaps_two_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    if not publish.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange")
    assert (tmp_path / "a" / "name").read_text() == "b"
    with pytest.raises(OSError, match="No such file"):
        publish.exchange(tmp_path / "a", tmp_path / "nowhere")


def write_again_and_again(out: Path, seed: int, results: "multiprocessing.Queue[Counter[str]]") -> None:
    seen: Counter[str] = Counter()
    for number in range(120):
        try:
            work = Work(out, f"k{seed}", "1GB", 1, lambda stage, done, total: None)
            try:
                work.tree.mkdir()
                (work.tree / "manifest.json").write_text(json.dumps(seed))
                work.stage("s", lambda: {})
                work.publish(out) if number % 2 else work.discard()
            finally:
                work.close()
            seen["written"] += 1
        except DataError:
            seen["in use"] += 1
        except Exception as error:
            seen[repr(error)] += 1
    results.put(seen)


def test_one_preparation_at_a_time_holds_the_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[Counter[str]] = context.Queue()
    workers = [
        context.Process(target=write_again_and_again, args=(tmp_path / "out", seed, results))
        for seed in range(4)
    ]
    for worker in workers:
        worker.start()
    seen = sum((results.get(timeout=120) for _ in workers), Counter())
    for worker in workers:
        worker.join()
    assert seen["written"] > 10 and set(seen) <= {"written", "in use"}, seen


def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    take_lock(tmp_path / "out.partial").close()


def test_a_broken_link_on_the_way_to_out_is_named(tmp_path: Path, prepared_small: tuple[Path, str]) -> None:
    (tmp_path / "disk").symlink_to(tmp_path / "unmounted")
    with pytest.raises(DataError, match=r"out\.partial cannot be made .*disk'\): is there a broken link"):
        prepare("tables", prepared_small[0], tmp_path / "disk" / "out", FAST)


def test_a_link_stays_and_the_folder_that_it_leads_to_is_replaced(
    tmp_path: Path, prepared_small: tuple[Path, str]
) -> None:
    raw, expected = prepared_small
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "big")
    seen: set[str] = set()
    for settings in ([], ["overwrite=true"]):
        prepare("tables", raw, tmp_path / "out", [*FAST, *settings],
                progress=lambda *_: seen.update(path.name for path in tmp_path.glob("*/*")))  # fmt: skip
        assert (tmp_path / "out").is_symlink()
        assert read_manifest(tmp_path / "disk" / "big").hash == expected
    assert "big.partial" in seen
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_manifest_that_cannot_be_read_replaces_nothing(
    tmp_path: Path, prepared_small: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out = tmp_path / "out"
    if overwrite:
        shutil.copytree(prepared_small[0].parent / "out", out)
    monkeypatch.setattr(prepare_module, "FORMAT_VERSION", 99)
    with pytest.raises(DataError, match="format version 99"):
        prepare("tables", prepared_small[0], out, [*FAST, "overwrite=true"])
    assert out.exists() == overwrite and (not overwrite or read_manifest(out).hash == prepared_small[1])


def test_brackets_in_a_path_are_no_pattern(tmp_path: Path, prepared_small: tuple[Path, str]) -> None:
    raw, expected = prepared_small
    shutil.copytree(raw, tmp_path / "g[1]")
    write_tables(tmp_path / "g1", users=13, items=60, days=4)  # what duckdb's pattern g[1] means
    (tmp_path / "o1").mkdir()
    assert prepare("tables", tmp_path / "g[1]", tmp_path / "o[1]", FAST).hash == expected


NAMES = ["o'brien", "x'; COPY (SELECT 1) TO 'planted.csv'; --", "user_id=7", "pr[1]*", 'a "b" %20 #', "红"]


@pytest.mark.parametrize("name", NAMES)
def test_folders_may_have_any_name(
    tmp_path: Path, prepared_small: tuple[Path, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, expected = prepared_small
    monkeypatch.chdir(tmp_path)
    shutil.copytree(raw, Path(name) / "raw")
    assert prepare("tables", Path(name) / "raw", Path(name) / "out", FAST).hash == expected
    assert os.listdir(tmp_path) == [name]


def test_a_question_mark_is_fine_in_raw_and_refused_in_out(
    tmp_path: Path, prepared_small: tuple[Path, str]
) -> None:
    shutil.copytree(prepared_small[0], tmp_path / "a?b")
    assert prepare("tables", tmp_path / "a?b", tmp_path / "out", FAST).hash == prepared_small[1]
    with pytest.raises(DataError, match=r"question mark\. Choose another OUT"):
        prepare("tables", prepared_small[0], tmp_path / "c?d", FAST)
    assert sorted(os.listdir(tmp_path)) == ["a?b", "out"]


@pytest.fixture(scope="module")
def prepared_small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Raw tables, and the manifest's hash of what becomes of them."""
    folder = tmp_path_factory.mktemp("small")
    raw = write_tables(folder / "raw", users=12, items=60, days=4)
    return raw, prepare("tables", raw, folder / "out", FAST).hash
