"""Writing on a disk that is full or read-only: one kind of error that names path, reason and fix, whichever
library writes."""

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_folder import make_tiny_folder
from trainer.analysis.figures import plot_run
from trainer.cf.build import train_cf
from trainer.config import DataConfig
from trainer.data import node_cache
from trainer.data.node_cache import local_folder
from trainer.errors import EnvironmentProblem
from trainer.runs.checkpoint import Progress, make_empty
from trainer.runs.run_folder import RunFolder
from trainer.runs.status import read_progress, write_status
from trainer.runtime import files
from trainer.runtime.files import SECRET_MODE, atomic, replace_folder, writing
from trainer.training.console import RunConsole

BIG = 300_000  # floats: more than the disk of `small_disk` has room for


def mounted(folder: Path, *options: str) -> None:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    folder = tmp_path / "disk"
    mounted(folder, "-o", "size=256k")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Makes a folder read-only, for root, too."""
    bound: list[Path] = []

    def bind(folder: Path) -> Path:
        for options in (["--bind", str(folder), str(folder)], ["-o", "remount,ro,bind", str(folder)]):
            if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
                pytest.skip("file systems cannot be mounted here")
        bound.append(folder)
        return folder

    yield bind
    for folder in bound:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def faiss_write(path: Path) -> None:
    index = faiss.IndexFlatL2(64)
    index.add(np.zeros((BIG // 64, 64), np.float32))
    faiss.write_index(index, str(path))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("x" * 4 * BIG),
    "torch": lambda path: torch.save(torch.zeros(BIG), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(BIG)}, str(path)),
    "numpy": lambda path: np.save(path.open("wb"), np.zeros(BIG, np.float32)),
    "parquet": lambda path: pq.write_table(pa.table({"a": np.random.default_rng(0).random(BIG)}), path),
    "faiss": faiss_write,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(small_disk: Path, name: str) -> None:
    path = small_disk / "file"
    path.write_text("old")
    with (
        pytest.raises(EnvironmentProblem, match=rf"{path}: cannot be written: .*[Ff]ree space"),
        atomic(path) as temporary,
    ):
        WRITERS[name](temporary)
    assert path.read_text() == "old"
    assert list(small_disk.iterdir()) == [path]


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_folder(tmp_path: Path, read_only: Callable[[Path], Path], name: str) -> None:
    (tmp_path / "folder").mkdir()
    folder = read_only(tmp_path / "folder")
    with (
        pytest.raises(EnvironmentProblem, match=rf"{folder}/file: cannot be written: .*[Rr]ead-only"),
        atomic(folder / "file") as temporary,
    ):
        WRITERS[name](temporary)
    with pytest.raises(EnvironmentProblem, match="Read-only"), writing(folder):
        (folder / "new").mkdir()


def test_other_errors_pass_through() -> None:
    for error in (RuntimeError("CUDA out of memory"), ValueError("No space left"), EOFError("os error 28")):
        with pytest.raises(type(error)), writing("x"):
            raise error
    with (
        pytest.raises(EnvironmentProblem, match=r"x: cannot be written: No space .* Free space there"),
        writing("x"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_secret_file_is_never_readable_by_others(tmp_path: Path) -> None:
    with atomic(tmp_path / "file", SECRET_MODE) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        temporary.write_text("a password")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_verbs_on_a_read_only_folder(
    tmp_path: Path, read_only: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, data = tmp_path / "run", make_tiny_folder(tmp_path / "data")
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 0.5}\n')
    (tmp_path / "cache").mkdir()
    read_only(run_dir)
    read_only(tmp_path / "cache")
    node_cache._cached_folder.cache_clear()
    failures: list[Callable[[], Any]] = [
        lambda: plot_run(run_dir),
        lambda: make_empty(run_dir / "checkpoints" / "x"),
        lambda: RunConsole(run_dir, 3),
        lambda: local_folder(DataConfig(dir=str(data), cache_dir=str(tmp_path / "cache"))),
    ]
    for verb in failures:
        with pytest.raises(EnvironmentProblem, match=r"Read-only file system.*writable"):
            verb()


def test_a_status_that_cannot_be_written_hides_no_error(
    tmp_path: Path, read_only: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    write_status(read_only(tmp_path / "run"), "failed", Progress())
    assert "status.json: cannot be written" in caplog.text


def test_the_console_of_a_full_disk_keeps_the_first_error(small_disk: Path) -> None:
    with (
        pytest.raises(EnvironmentProblem, match=r"metrics\.jsonl: cannot be written"),
        RunConsole(small_disk, 3) as console,
    ):
        console.record({"text": "x" * 1_000_000})


def test_cf_on_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    data = make_tiny_folder(tmp_path / "data", num_items=3000, num_users=1500)
    shutil.rmtree(data / "cf")
    (small_disk / "cf").mkdir()
    (data / "cf").symlink_to(small_disk / "cf")
    (small_disk / "filler").write_bytes(b"x" * 150_000)
    with pytest.raises(EnvironmentProblem, match=r"cannot be written: No space left"):
        train_cf(data, ["cf.dim=16", "cf.max_epochs=1", "overwrite=true", "save_every_s=0"])


def test_a_full_disk_takes_a_status_in_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_status(run, "running", Progress(step=1_000_000))
    size = (run / "status.json").stat().st_size

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("trainer.runtime.files.os.fsync", full)
    write_status(run, "failed", Progress(step=7))
    assert (run / "status.json").stat().st_size == size
    assert RunFolder(run).read_status()["status"] == "failed"
    assert read_progress(run).step == 7 and [path.name for path in run.iterdir()] == ["status.json"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_by_one_that_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    """Without an exchange the name is away between two renames, and both folders are whole then."""
    path, new, synced = tmp_path / "model", tmp_path / "model.partial", set[str]()
    sync, real_rename = files.sync, os.rename

    def rename(old: Path, to: Path) -> None:
        assert {"inner", "weights", "model.partial"} <= synced
        real_rename(old, to)
        wholes = [one for one in tmp_path.iterdir() if (one / "inner" / "weights").is_file()]
        assert path in wholes if can_exchange else len(wholes) >= 1

    def note(place: Path) -> None:
        synced.add(place.name)
        sync(place)

    monkeypatch.setattr(files, "sync", note)
    monkeypatch.setattr(os, "rename", rename)
    if not can_exchange:
        monkeypatch.setattr(files, "exchange", lambda first, second: False)
    for content in ("one", "two", "three"):
        synced.clear()
        (new / "inner").mkdir(parents=True)
        (new / "inner" / "weights").write_text(content)
        replace_folder(new, path)
        assert (path / "inner" / "weights").read_text() == content
        assert [one.name for one in tmp_path.iterdir()] == ["model"] and tmp_path.name in synced
