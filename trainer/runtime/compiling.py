"""DeepSpeed compiles helpers in C++ when they are first used: with ninja, under a lock file, into a folder
that all runs of a user share. ds_configs/ needs none of them; a JSON of a user may (DeepSpeed CPU Adam)."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import EnvironmentProblem

STALE_LOCK_S = 60.0


def get_ready() -> None:
    """Before DeepSpeed starts."""
    import deepspeed.ops
    from torch.utils.cpp_extension import get_default_build_root

    # Its inference engine's all-reduce in shared memory, for CPUs: a first start would compile it for a
    # minute, and training never calls it. DeepSpeed lets programs edit this table. With a GPU it is left
    # alone: to make it, DeepSpeed asks for CUDA's compiler, and prints a warning for each operator without.
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    put_ninja_on_path()
    free_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))


def find_ninja() -> str | None:
    """The program's path. pip puts it beside the interpreter, which is not on PATH where the environment was
    not activated (.venv/bin/accelerate launch …)."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def put_ninja_on_path() -> None:
    """torch looks for it there only."""
    if shutil.which("ninja") is None and (found := find_ninja()):
        os.environ["PATH"] = os.pathsep.join([str(Path(found).parent), os.environ.get("PATH", "")])


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raises EnvironmentProblem where torch says that something could not be compiled, or not by the process
    that this one waited for."""
    try:
        yield
    except (RuntimeError, ImportError) as error:
        text = str(error)
        if not any(sign in text for sign in ("ninja", "Ninja", "building extension", ".so: cannot open")):
            raise
        reason = next((line.strip() for line in text.splitlines() if "error:" in line), text.splitlines()[0])
        raise EnvironmentProblem(
            f"DeepSpeed cannot compile its helpers here: {reason}. `gensr doctor` says what is missing and "
            "how to get it."
        ) from error


def free_locks(folder: Path, stale_s: float = STALE_LOCK_S) -> None:
    """torch compiles and loads DeepSpeed's helpers under a lock file; one that a killed process left makes
    every later run wait for ever.

    Removes those in `folder` that no process here holds open and that are older than `stale_s`, after waiting
    for that. (Nodes that share `folder` cannot see each other's processes: give each its own
    TORCH_EXTENSIONS_DIR, as slurm/ does.)
    """
    for lock in [*folder.glob("*/lock"), *folder.glob("*/*/lock")]:
        with contextlib.suppress(OSError):  # gone, or another user's
            while not _is_open_somewhere(lock):
                if time.time() - lock.stat().st_mtime > stale_s:
                    lock.unlink()
                time.sleep(min(1.0, stale_s))


def _is_open_somewhere(path: Path) -> bool:
    """Whether a process of this machine that we may look into has the file open. Raises FileNotFoundError."""
    wanted = path.stat()
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found = opened.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False
