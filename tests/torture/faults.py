"""Places and limits that fail: a folder that cannot be written, a disk that is full, memory that runs out.

Each verb runs as the command would, in a process of its own; it must end with its answer or with a message,
never with a traceback or a signal. Everything that was there before is there afterwards. Read-only folders
and full disks are file systems in memory that are mounted for it, because root writes into any folder.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tests.torture.mutations import RUN, World
from tests.torture.outcomes import Tally

LIMIT_S = 120.0
DISK_BYTES = 64 << 20
MIB = 1 << 20

Words = tuple[str, ...]


def verbs(root: Path) -> dict[str, Words]:
    """Commands that write below `root`, a copy of the world."""
    data, run = str(root / "data"), str(root / "run")
    train = ["train", "demo", f"data.dir={data}", f"run.dir={root / 'new'}", *RUN, "run.max_steps=1"]
    return {
        "evaluate": ("evaluate", run),
        "report": ("report", run),
        "recommend": ("recommend", run, "--user", "u1"),
        "cf": ("cf", data, "cf.max_epochs=1", "cf.num_folds=2", "overwrite=true"),
        "train": tuple(train),
        "inspect": ("inspect", data),
        "prepare": (
            *("prepare", "tables", str(root / "raw"), str(root / "out")),
            *("num_negatives=20", "vocab_size=400", "threads=1"),
        ),
        "score": ("score", run, str(root / "requests.jsonl"), "--out", str(root / "answers.jsonl")),
        "register": ("register", run, "tiny"),
    }


@dataclass(frozen=True)
class Fault:
    """amounts: bytes that are left (of the disk, of memory beyond what the process has)."""

    name: str
    amounts: tuple[int, ...]
    mounts: bool


FAULTS = (
    Fault("read-only folders", (0,), mounts=True),
    Fault("full disk", (0, 4 << 10, 64 << 10, 256 << 10, MIB), mounts=True),
    Fault("memory limit", (MIB, 8 * MIB, 64 * MIB, 256 * MIB), mounts=False),
)


def why_not(fault: Fault) -> str:
    """Why a fault cannot be made here; "" where it can."""
    if not fault.mounts:
        return ""
    if os.geteuid() != 0:
        return "mounting a file system needs root"
    folder = Path("/tmp") / f"gensr-mount-{os.getpid()}"
    folder.mkdir()
    try:
        with mounted(folder, MIB):
            return ""
    except subprocess.CalledProcessError as error:
        return f"mount: {error.stderr.strip()}"
    finally:
        folder.rmdir()


@contextmanager
def mounted(folder: Path, num_bytes: int) -> Iterator[None]:
    _mount("-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True, text=True)


# ---- a command in a fork -----------------------------------------------------------------------------------


def run_command(words: Words, log: Path, memory: int = 0, limit_s: float = LIMIT_S) -> tuple[str, str]:
    """(outcome, the end of what it said): same (exit code 0), refused (1 and a message), traceback (also
    ended by a signal), hang. memory: bytes beyond what this process has; 0 = no limit."""
    child = os.fork()
    if not child:
        _be_command(words, log, memory)
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return _outcome(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"))
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hang", f"no end in {limit_s:.0f} s"


def _be_command(words: Words, log: Path, memory: int) -> None:
    code = 70
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        from trainer.cli import main

        if memory:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            allowed = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
        sys.argv = ["gensr", *words]
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _outcome(code: int, said: str) -> tuple[str, str]:
    if code < 0 or "Traceback (most recent call last)" in said:
        return "traceback", f"exit code {code}: {said[-1500:]}"
    if code == 0:
        return "same", said[-500:]
    return (
        ("refused", said[-500:]) if "gensr: " in said else ("traceback", f"exit code {code}: {said[-500:]}")
    )


# ---- campaigns ---------------------------------------------------------------------------------------------


def run_fault(world: World, fault: Fault, root: Path, only: tuple[str, ...] = ()) -> Tally:
    """Every verb with every amount. only: names of verbs; empty = all. A verb that does not even work without
    the fault is an error of the campaign."""
    tally = Tally(fault.name)
    make: dict[str, Callable[..., tuple[str, str]]] = {
        "read-only folders": _read_only,
        "full disk": _full_disk,
        "memory limit": _little_memory,
    }
    chosen = [name for name in verbs(root) if not only or name in only]
    for name in chosen:
        outcome, detail = make["memory limit"](world, _empty(root / "place"), name, 0)
        assert outcome == "same", f"{name} without a fault: {detail}"
        shutil.rmtree(root / "place")
    for amount in fault.amounts:
        for name in chosen:
            place = _empty(root / "place")
            outcome, detail = make[fault.name](world, place, name, amount)
            tally.add(outcome, f"{name}, {amount:,} bytes", detail)
            shutil.rmtree(place)
    return tally


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def copy_world(world: World, to: Path) -> None:
    """All that verbs() names, with the paths of the copy."""
    for part in ("data", "run", "raw"):
        shutil.copytree(world.root / part, to / part)
    shutil.copy(world.requests, to / world.requests.name)
    config = to / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(world.root), str(to)))


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "full"
    }


def missing(before: dict[str, str], folder: Path) -> str:
    """What is not as it was, aside from what verbs write anew."""
    after = contents(folder)
    written = ("evaluation-", "report/", "retrieval/", "cf/")
    return ", ".join(
        name
        for name, digest in before.items()
        if after.get(name) != digest and (name not in after or not any(part in name for part in written))
    )


def _checked(before: dict[str, str], place: Path, result: tuple[str, str]) -> tuple[str, str]:
    if lost := missing(before, place):
        return "lost", f"{lost}: {result[1]}"
    return result


def _read_only(world: World, place: Path, name: str, amount: int) -> tuple[str, str]:
    with mounted(place, DISK_BYTES):
        copy_world(world, place)
        before = contents(place)
        _mount("-o", "remount,ro", str(place))
        return _checked(before, place, run_command(verbs(place)[name], place.with_name("log")))


def _full_disk(world: World, place: Path, name: str, amount: int) -> tuple[str, str]:
    """Once there is space again, the same command does its work."""
    with mounted(place, DISK_BYTES):
        copy_world(world, place)
        before = contents(place)
        fill(place / "full", amount)
        log = place.with_name("log")
        first = _checked(before, place, run_command(verbs(place)[name], log))
        (place / "full").unlink()
        if first[0] != "refused":
            return first
        words = verbs(place)[name]
        again = run_command((*words, "--resume", "auto") if name == "train" else words, log)
        return first if again[0] == "same" else ("lost", f"not even with space again: {again[1]}")


def fill(path: Path, left: int) -> None:
    """Take all space but `left` bytes."""
    disk = os.statvfs(path.parent)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(disk.f_bavail * disk.f_frsize - left, 1))


def _little_memory(world: World, place: Path, name: str, amount: int) -> tuple[str, str]:
    copy_world(world, place)
    before = contents(place)
    return _checked(before, place, run_command(verbs(place)[name], place.with_name("log"), amount))
