"""Is this machine ready? Every check says OK, WARN (works, but) or MISS (will fail), what was found, and the
fix.

Nothing is only looked up where it can be tried: the compiler compiles, two processes all-reduce, sqlite
writes.
"""

import importlib.metadata
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainer.errors import DataError
from trainer.runtime.compiling import find_ninja

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

Status = Literal["OK", "WARN", "MISS"]

MIN_PYTHON = (3, 10)
NEEDED_BY = "model.compile and DeepSpeed's own operators need it"
MIN_MEMORY_GB = 4.0
MIN_DISK_GB = 5.0
COMMAND_TIMEOUT_S = 20.0
ALL_REDUCE_TIMEOUT_S = 90.0  # importing torch twice on a cold disk takes most of it
RANKS_TIMEOUT_S = 60.0
RANKS_FIX = (
    "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME must name a network that all nodes share (slurm/README.md)"
)
DISTRIBUTION, TRAIN = "gensr", "train"  # setup.cfg's name, and its extra for training
TRAINS_WITH = ("deepspeed", "optuna")  # no package of another extra
SLURM_COMMANDS = ("sbatch", "srun", "scontrol", "squeue")

CPP_PROGRAM = "#include <vector>\nint main() { std::vector<int> v{1}; return v[0] - 1; }\n"
ALL_REDUCE_PROGRAM = """
import sys, datetime, torch, torch.distributed as dist
rank, path = int(sys.argv[1]), sys.argv[2]
minute = datetime.timedelta(seconds=60)
dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2, timeout=minute)
x = torch.tensor([rank + 1.0])
dist.all_reduce(x)
dist.destroy_process_group()
sys.exit(0 if x.item() == 3.0 else 3)
"""


@dataclass(frozen=True)
class Check:
    name: str
    status: Status
    detail: str
    fix: str = ""


def run_checks(folder: str | Path = ".", prepared: Sequence[str | Path] = ()) -> list[Check]:
    """All checks, in the order of an installation; `folder` is where data and runs will lie. Takes about ten
    seconds; never raises. prepared: folders that are read whole, which takes longer. Under a launcher of
    several processes they check what they are to each other, and nothing else."""
    checks: list[Check] = []
    steps: list[Callable[[], list[Check]]] = [
        check_python,
        check_packages,
        check_compiler,
        check_ninja,
        check_processor,
        lambda: check_disk(Path(folder)),
        check_gpus,
        check_all_reduce,
        check_extensions_folder,
        lambda: check_sqlite(Path(folder)),
        check_slurm,
        *(partial(check_prepared, Path(place)) for place in prepared),
    ]
    for step in steps if int(os.environ.get("WORLD_SIZE", 1)) == 1 else [check_ranks]:
        try:
            checks += step()
        except Exception as error:  # a check that cannot run is a finding, not a crash
            name = getattr(step, "__name__", "check").removeprefix("check_")
            checks.append(Check(name, "WARN", f"could not be checked: {type(error).__name__}: {error}"))
    return checks


def check_python() -> list[Check]:
    found, wanted = platform.python_version(), ".".join(map(str, MIN_PYTHON))
    if sys.version_info < MIN_PYTHON:
        return [
            Check(
                "python",
                "MISS",
                f"{found}, {wanted} or newer is needed",
                f"make install PYTHON=python{wanted}",
            )
        ]
    return [Check("python", "OK", f"{found} at {sys.executable}")]


def check_packages(distribution: str = DISTRIBUTION) -> list[Check]:
    """One check a requirement of the installed distribution and of what training adds, against its version
    range."""
    try:
        requirements = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return [
            Check(
                distribution, "MISS", "not installed in this Python", "make install, then use .venv/bin/gensr"
            )
        ]
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in requirements]
    everywhere = [need for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    training = [
        need
        for need in needed
        if need.marker is not None and need not in everywhere and need.marker.evaluate({"extra": TRAIN})
    ]
    if training and not any(map(_is_installed, TRAINS_WITH)):
        detail = "not installed: this environment answers, but does not train"
        fix = f"{sys.executable} -m pip install '{distribution}[{TRAIN}]'"
        return [_check_package(need.name, need.specifier) for need in everywhere] + [
            Check("training", "WARN", detail, fix)
        ]
    return [_check_package(need.name, need.specifier) for need in [*everywhere, *training]]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_package(name: str, wanted: "SpecifierSet") -> Check:
    fix = f"{sys.executable} -m pip install '{name}{wanted}'"
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "MISS", f"not installed, {wanted} is needed", fix)
    if not wanted.contains(found, prereleases=True):
        return Check(name, "WARN", f"{found} is outside the tested range {wanted}", fix)
    return Check(name, "OK", found)


def check_compiler() -> list[Check]:
    """A C++ compiler with the standard library, and Python's headers: for model.compile, and for a DeepSpeed
    JSON that asks for operators of DeepSpeed's own, as none of ds_configs/ does."""
    install = "sudo apt-get install g++ (or your system's package); on a cluster: module load gcc"
    on_path = [path for path in map(shutil.which, ("g++", "c++", "clang++")) if path]
    command = os.environ.get("CXX", "").split() or on_path[:1]
    if not command:
        return [
            Check(
                "c++ compiler",
                "WARN",
                f"no g++, c++ or clang++ on PATH, and CXX is not set: {NEEDED_BY}",
                install,
            )
        ]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            compile_it = [*command, "-x", "c++", "-std=c++17", "-", "-o", f"{scratch}/a.out"]
            done = subprocess.run(
                compile_it, input=CPP_PROGRAM, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Check("c++ compiler", "WARN", f"{command[0]} does not run: {error}. {NEEDED_BY}", install)]
    if done.returncode:
        return [
            Check(
                "c++ compiler",
                "WARN",
                f"{command[0]} cannot compile: {_last_line(done.stderr)}. {NEEDED_BY}",
                install,
            )
        ]
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    python_headers = Check("python headers", "OK", str(headers))
    if not headers.is_file():
        python_headers = Check(
            "python headers",
            "WARN",
            f"{headers} is missing: {NEEDED_BY}",
            "sudo apt-get install python3-dev",
        )
    return [Check("c++ compiler", "OK", _first_line([command[0], "--version"]) or command[0]), python_headers]


def check_ninja() -> list[Check]:
    if found := find_ninja():
        return [Check("ninja program", "OK", f"{_first_line([found, '--version'])} at {found}")]
    return [
        Check(
            "ninja program",
            "WARN",
            f"neither on PATH nor beside the interpreter: {NEEDED_BY}",
            f"{sys.executable} -m pip install ninja",
        )
    ]


def check_processor() -> list[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    cpu = Check("cpu", "OK", f"{cores} cores for this process")
    if cores < 2:
        cpu = Check(
            "cpu",
            "WARN",
            "1 core: the demo starts two processes and will be slow",
            "allow two cores (taskset, --cpus-per-task)",
        )
    total, available = memory_gb()
    detail = f"{available:.1f} GB available of {total:.1f} GB"
    if available < MIN_MEMORY_GB:
        return [
            cpu,
            Check(
                "memory",
                "WARN",
                f"{detail}, the demo wants {MIN_MEMORY_GB:.0f} GB",
                "free memory, or ask for more (--mem)",
            ),
        ]
    return [cpu, Check("memory", "OK", detail)]


def memory_gb() -> tuple[float, float]:
    """Total and available memory in GB, within the limits of the control groups (container, SLURM job)."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit, used in group_limits():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total / 1e9, available / 1e9


def group_limits(
    mounted: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each control group with a limit that this process is in. A group's limit
    holds for those inside it, so a SLURM job's lies above the process's own. Of cgroup v2, or v1."""
    lines = mine.read_text().splitlines() if mine.is_file() else []
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers == "":
            top, names = mounted, ("memory.max", "memory.current")
        elif controllers == "memory":
            top, names = mounted / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        path = top / group.lstrip("/")
        for folder in (path, *path.parents):
            limit, used = (folder / name for name in names)
            if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
                yield int(text), int(used.read_text())
            if folder == top:
                break


def check_disk(folder: Path) -> list[Check]:
    folder = existing_parent(folder)
    free = shutil.disk_usage(folder).free / 1e9
    if not os.access(folder, os.W_OK):
        return [
            Check(
                "disk",
                "MISS",
                f"{folder} cannot be written",
                "choose a folder of your own for data.dir and run.dir",
            )
        ]
    if free < MIN_DISK_GB:
        return [
            Check(
                "disk",
                "WARN",
                f"{free:.1f} GB free in {folder}",
                f"free {MIN_DISK_GB:.0f} GB, or choose another folder",
            )
        ]
    return [Check("disk", "OK", f"{free:.1f} GB free in {folder}")]


def check_gpus() -> list[Check]:
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        fix = f"{sys.executable} -m pip install --force-reinstall torch"
        return [Check("gpu", "MISS", f"torch cannot be imported: {type(error).__name__}: {error}", fix)]
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            fix = (
                "install the torch build for your driver (pytorch.org), and check nvidia-smi and "
                "CUDA_VISIBLE_DEVICES"
            )
            return [Check("gpu", "WARN", f"a driver is here, but torch {torch.__version__} sees no GPU", fix)]
        return [Check("gpu", "OK", "none: training runs on the CPU (two processes, gloo)")]
    count = torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(0)
    checks = [Check("gpu", "OK", f"{count} × {properties.name}, {properties.total_memory / 1e9:.0f} GB each")]
    if torch.cuda.is_bf16_supported():
        checks.append(Check("bf16", "OK", f"compute capability {properties.major}.{properties.minor}"))
    else:
        checks.append(Check("bf16", "WARN", "these GPUs have no bf16", "run.precision=fp32"))
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        checks.append(Check("nccl", "OK", ".".join(map(str, torch.cuda.nccl.version()))))
    else:
        checks.append(
            Check(
                "nccl",
                "WARN" if count == 1 else "MISS",
                "this torch has no NCCL: one GPU only",
                "install torch's CUDA build for Linux",
            )
        )
    return checks


def check_all_reduce(
    program: str = ALL_REDUCE_PROGRAM, timeout_s: float = ALL_REDUCE_TIMEOUT_S
) -> list[Check]:
    """Two processes add up a number over gloo, as every CPU run does."""
    fix = (
        "export GLOO_SOCKET_IFNAME=lo (several nodes: the name of the network interface), and check that "
        "the host name resolves"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        logs = [Path(scratch) / f"{rank}.log" for rank in (0, 1)]
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(logs):
                command = [sys.executable, "-c", program, str(rank), f"{scratch}/rendezvous"]
                with log.open("wb") as file:
                    ranks.append(
                        subprocess.Popen(
                            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
                        )
                    )
            codes = [
                process.wait(timeout=max(0.1, timeout_s - (time.monotonic() - started))) for process in ranks
            ]
        except subprocess.TimeoutExpired:
            return [
                Check("gloo all-reduce", "MISS", f"two processes did not finish in {timeout_s:.0f} s", fix)
            ]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if any(codes):
            told = next(
                (
                    _last_line(log.read_text(errors="replace"))
                    for log, code in zip(logs, codes, strict=True)
                    if code
                ),
                "",
            )
            return [Check("gloo all-reduce", "MISS", f"failed: {told or f'exit codes {codes}'}", fix)]
    return [
        Check("gloo all-reduce", "OK", f"two processes, {time.monotonic() - started:.1f} s with their start")
    ]


def check_ranks(timeout_s: float = RANKS_TIMEOUT_S) -> list[Check]:
    """All processes of a launcher meet and add up their ranks on their devices: how a run would begin. Rank 0
    says which are where and how long they took; another one speaks only where it fails."""
    import torch
    from torch import distributed

    from trainer.runtime.launch import read_launch

    launch, host, started = read_launch(), platform.node(), time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, backend = f"{launch.world_size} processes", "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        sum_1 = torch.tensor([float(launch.rank)], device=device)
        distributed.all_reduce(sum_1)
        found: list[tuple[str, float, float]] = [("", 0.0, 0.0)] * launch.world_size
        distributed.all_gather_object(found, (host, float(sum_1), time.monotonic() - started))
        distributed.destroy_process_group()
    except Exception as error:  # of a network: whatever its libraries raise
        detail = f"rank {launch.rank} on {host}: {type(error).__name__}: {_last_line(str(error))}"
        return [Check(name, "MISS", detail, RANKS_FIX)]
    expected = sum(range(launch.world_size))
    told = [
        f"rank {rank} on {where}: {seconds:.1f} s" + (f", a sum of {sum_:g}" if sum_ != expected else "")
        for rank, (where, sum_, seconds) in enumerate(found)
    ]
    status: Status = "OK" if all(sum_ == expected for _, sum_, _ in found) else "MISS"
    return [Check(name, status, text, RANKS_FIX) for text in told] if launch.rank == 0 else []


def check_extensions_folder() -> list[Check]:
    """Where DeepSpeed's compiled operators are kept: writable, and not mounted noexec."""
    configured = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(configured) if configured else Path.home() / ".cache" / "torch_extensions"
    name, fix = "TORCH_EXTENSIONS_DIR", "export TORCH_EXTENSIONS_DIR=/a/folder/on/a/local/disk"
    present = existing_parent(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=present):
            pass
    except OSError as error:
        return [Check(name, "WARN", f"{folder} cannot be written: {error.strerror}", fix)]
    if os.statvfs(present).f_flag & getattr(os, "ST_NOEXEC", 0):
        return [
            Check(
                name, "WARN", f"{folder} is mounted noexec: compiled operators cannot be loaded from it", fix
            )
        ]
    return [Check(name, "OK", str(folder) + ("" if configured else " (default)"))]


def check_sqlite(folder: Path) -> list[Check]:
    """MLflow's default store is a sqlite file beside the runs: needs working locks, which some network disks
    lack."""
    folder = existing_parent(folder)
    path = folder / f".gensr-doctor-{os.getpid()}.db"
    fix = "tracking.uri=sqlite:////a/local/disk/mlflow.db, or the address of an MLflow server"
    try:
        connection = sqlite3.connect(path, timeout=5)
        try:
            with connection:
                connection.execute("CREATE TABLE t (x INTEGER)")
                connection.execute("INSERT INTO t VALUES (1)")
            connection.execute("BEGIN EXCLUSIVE").fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return [Check("mlflow sqlite", "MISS", f"no sqlite file can be written in {folder}: {error}", fix)]
    finally:
        for leftover in (path, path.with_name(f"{path.name}-journal")):
            leftover.unlink(missing_ok=True)
    return [Check("mlflow sqlite", "OK", f"sqlite {sqlite3.sqlite_version} writes and locks in {folder}")]


def check_slurm() -> list[Check]:
    found = [command for command in SLURM_COMMANDS if shutil.which(command)]
    if not found:
        return [Check("slurm", "OK", "not here (needed by slurm/*.sbatch only)")]
    missing = sorted(set(SLURM_COMMANDS) - set(found))
    if missing:
        return [
            Check(
                "slurm",
                "WARN",
                f"{', '.join(found)} without {', '.join(missing)}",
                "log in to a submit node, or module load slurm",
            )
        ]
    return [Check("slurm", "OK", _first_line(["sbatch", "--version"]) or ", ".join(found))]


def check_prepared(folder: Path) -> list[Check]:
    """Every file of a prepared folder against its manifest: size, checksum, numbers in range."""
    from data_shards.schema import read_manifest
    from data_shards.verify import verify

    started_s = time.monotonic()
    try:
        verify(folder, read_manifest(folder))
    except DataError as error:
        return [Check("prepared folder", "MISS", str(error), f"restore {folder}, or prepare it again")]
    return [Check("prepared folder", "OK", f"{folder} read whole in {time.monotonic() - started_s:.0f} s")]


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
