"""Each finding of the doctor on a machine made to lack just that, and none on this one."""

import importlib.metadata
import json
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.tiny_folder import make_tiny_folder
from trainer import doctor
from trainer.doctor import Check


def only(checks: list[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_prepared_folder_is_read_whole(tmp_path: Path) -> None:
    folder = make_tiny_folder(tmp_path / "data")
    assert [check.status for check in doctor.check_prepared(folder)] == ["OK"]
    shard = next((folder / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (found,) = doctor.check_prepared(folder)
    assert (found.status, shard.name in found.detail) == ("MISS", True) and found.fix
    (missing,) = doctor.check_prepared(tmp_path / "nowhere")
    assert missing.status == "MISS"


def test_all_checks_run_and_every_problem_has_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "check_all_reduce", lambda: [Check("gloo all-reduce", "OK", "in another test")]
    )
    checks = doctor.run_checks(tmp_path / "not" / "yet")
    names = [check.name for check in checks]
    expected = [
        "python",
        "torch",
        "deepspeed",
        "c++ compiler",
        "ninja program",
        "cpu",
        "memory",
        "disk",
        "gpu",
        "TORCH_EXTENSIONS_DIR",
        "mlflow sqlite",
        "slurm",
    ]
    assert set(expected) <= set(names)
    assert len(names) == len(set(names))
    assert all(check.detail and (check.fix or check.status == "OK") for check in checks)
    assert (
        only(checks, "python").status
        == only(checks, "torch").status
        == only(checks, "mlflow sqlite").status
        == "OK"
    )
    assert json.loads(json.dumps([asdict(check) for check in checks]))[0]["name"] == "python"
    assert not list(tmp_path.iterdir())


def test_torch_is_not_imported_with_the_module() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, trainer.doctor; sys.exit('torch' in sys.modules)"], timeout=60
    )
    assert done.returncode == 0


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_ninja() -> list[Check]:
        raise RuntimeError("odd machine")

    def nothing() -> list[Check]:
        return []

    for name in ("check_packages", "check_compiler", "check_gpus", "check_all_reduce", "check_slurm"):
        monkeypatch.setattr(doctor, name, nothing)
    monkeypatch.setattr(doctor, "check_ninja", check_ninja)
    found = only(doctor.run_checks(), "ninja")
    assert found.status == "WARN"
    assert "odd machine" in found.detail


def test_packages_missing_and_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["numpy>=1,<99", "numpy-that-is-not>=1", "torch>=99", "pytest>=99; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: texts)
    checks = doctor.check_packages()
    assert [(check.name, check.status) for check in checks] == [
        ("numpy", "OK"),
        ("numpy-that-is-not", "MISS"),
        ("torch", "WARN"),
    ]
    assert "pip install 'torch>=99'" in checks[2].fix


def test_packages_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked like the others where training is installed; one line where it is not."""
    texts = ["numpy>=1,<99", "scipy-that-is-not>=1; extra == 'train'", "x>=1; extra == 'serve'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: texts)
    assert [(check.name, check.status) for check in doctor.check_packages()] == [
        ("numpy", "OK"),
        ("scipy-that-is-not", "MISS"),
    ]
    monkeypatch.setattr(doctor, "TRAINS_WITH", ("a-distribution-that-is-not-here",))
    found, training = doctor.check_packages()
    assert (found.name, training.name, training.status) == ("numpy", "training", "WARN")
    assert "pip install 'gensr[train]'" in training.fix


def test_not_installed_at_all() -> None:
    (found,) = doctor.check_packages("a-distribution-that-is-not-here")
    assert found.status == "MISS"
    assert "make install" in found.fix


def test_no_compiler_and_no_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (compiler,) = doctor.check_compiler()
    assert compiler.status == "WARN"
    assert "g++" in compiler.fix
    monkeypatch.setattr(sys, "executable", str(tmp_path / "elsewhere" / "python"))
    assert doctor.check_ninja()[0].status == "WARN"


def test_a_compiler_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = executable(tmp_path / "g++", "echo 'fatal error: vector: No such file or directory' >&2; exit 1")
    monkeypatch.setenv("CXX", str(broken))
    (found,) = doctor.check_compiler()
    assert found.status == "WARN"
    assert "vector: No such file" in found.detail


def test_ninja_beside_python_but_not_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "ninja", "echo 1.11")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    (found,) = doctor.check_ninja()
    assert (found.status, found.detail) == ("OK", f"1.11 at {tmp_path}/ninja")


@pytest.mark.distributed
def test_two_processes_really_add_up() -> None:
    (found,) = doctor.check_all_reduce()
    assert found.status == "OK", found.detail


def test_all_reduce_that_fails_or_hangs() -> None:
    (failed,) = doctor.check_all_reduce("import sys; sys.exit('no interface lo9')", timeout_s=30)
    assert failed.status == "MISS"
    assert "no interface lo9" in failed.detail
    (hung,) = doctor.check_all_reduce("import time; time.sleep(60)", timeout_s=0.5)
    assert hung.status == "MISS"
    assert "did not finish" in hung.detail


@pytest.mark.distributed
def test_processes_of_a_launcher_meet() -> None:
    """Under a launcher they check nothing else, and rank 0 speaks for all."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, "-m", "gensr", "doctor"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [
        re.fullmatch(r"OK +2 processes +rank (\d) on \S+: \d+\.\d s", line) for line in lines(done.stdout)
    ]
    assert [match and match.group(1) for match in found] == ["0", "1"]


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


def test_a_process_that_meets_nobody_says_who_it_is(launched: Callable[[int, int], None]) -> None:
    launched(1, 2)
    (check,) = doctor.check_ranks(timeout_s=1.0)
    assert (check.name, check.status) == ("2 processes", "MISS")
    assert check.detail.startswith("rank 1 on ") and "GLOO_SOCKET_IFNAME" in check.fix


def test_a_wrong_sum_is_told(monkeypatch: pytest.MonkeyPatch, launched: Callable[[int, int], None]) -> None:
    launched(0, 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sum_1: sum_1.add_(5))
    (check,) = doctor.check_ranks()
    assert check.status == "MISS" and check.detail.endswith(", a sum of 5")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """launched(rank, world_size): this process is one of a launcher."""

    def launch(rank: int, world_size: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        for name, value in {**facts, "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, str(value))

    return launch


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert doctor.check_extensions_folder()[0].status == "OK"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/self/fdinfo")
    (extensions,) = doctor.check_extensions_folder()
    assert extensions.status == "WARN"
    assert "export TORCH_EXTENSIONS_DIR" in extensions.fix
    (store,) = doctor.check_sqlite(Path("/proc/self/fdinfo"))
    assert store.status == "MISS"
    assert "tracking.uri" in store.fix


def test_little_disk_little_memory_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1e9})())
    assert doctor.check_disk(tmp_path)[0].status == "WARN"
    monkeypatch.setattr(doctor, "memory_gb", lambda: (8.0, 1.0))
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda process: {0})
    assert [check.status for check in doctor.check_processor()] == ["WARN", "WARN"]


def test_slurm_complete_partial_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_slurm() == [Check("slurm", "OK", "not here (needed by slurm/*.sbatch only)")]
    executable(tmp_path / "sbatch", "echo slurm 22.05.8")
    (partial,) = doctor.check_slurm()
    assert partial.status == "WARN"
    assert "squeue" in partial.detail
    for command in doctor.SLURM_COMMANDS[1:]:
        executable(tmp_path / command, "true")
    assert doctor.check_slurm() == [Check("slurm", "OK", "slurm 22.05.8")]


def test_memory_respects_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    total, available = doctor.memory_gb()
    assert 0 < available <= total
    monkeypatch.setattr(doctor, "group_limits", lambda: [(2**60, 0), (10**9, 4 * 10**8), (2 * 10**9, 10**8)])
    assert doctor.memory_gb() == (1.0, 0.6)


@pytest.mark.parametrize(
    ("line", "inside", "names"),
    [("0::", "", ("max", "current")), ("4:memory:", "memory/", ("limit_in_bytes", "usage_in_bytes"))],
)
def test_a_jobs_limit_lies_above_the_group_of_its_step(
    tmp_path: Path, line: str, inside: str, names: tuple[str, str]
) -> None:
    mine, job = tmp_path / "cgroup", tmp_path / inside / "slurm" / "job_7"
    mine.write_text(f"9:cpu:/other\n{line}/slurm/job_7/step_0/task_0\n")
    (job / "step_0" / "task_0").mkdir(parents=True)
    groups = {
        job: ("3000", "2000"),
        job / "step_0": ("max", "900"),
        job / "step_0" / "task_0": ("2500", "800"),
    }
    for group, values in groups.items():
        for name, value in zip(names, values, strict=True):
            (group / f"memory.{name}").write_text(value + "\n")
    assert list(doctor.group_limits(tmp_path, mine)) == [(2500, 800), (3000, 2000)]
    assert list(doctor.group_limits(tmp_path, tmp_path / "no such file")) == []
