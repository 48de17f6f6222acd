"""Giving a finished folder its name, and the lock of whoever writes it, so that a kill at any moment loses
nothing.

A folder that is there already is exchanged with the new one in one step (Linux's renameat2). Where a file
system cannot do that, two renames follow one another; the file `publishing` of the work folder says what was
about to happen, and the next start completes it before it deletes anything.
"""

import ctypes
import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import IO

from data_shards.errors import DataError
from data_shards.locks import lock

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY)
LOCK_ATTEMPTS = 1000  # a millisecond or two each when others make and remove the same folder
TREE, OLD, JOURNAL, LOCK, STAGES = "out", "old", "publishing", "lock", "stages.json"


def partial_folder(out: Path) -> Path:
    """OUT.partial, as an absolute path: duckdb reads `md:x` or `:memory:x` as no path at all."""
    return out.absolute().parent / f"{out.name}.partial"


def take_lock(folder: Path) -> IO[str]:
    """The open lock file of a work folder, which is made if need be. Raises DataError when another process
    holds it.

    Whoever held it last may have removed file and folder between open and flock: the lock of a removed file
    keeps nobody out, so it is tried again.
    """
    path = folder / LOCK
    failed: OSError | None = None
    for _ in range(LOCK_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a")  # noqa: SIM115 - held by the caller
        except (FileNotFoundError, FileExistsError) as error:  # the folder was removed between two looks
            failed = error
            continue
        if not lock(file):
            file.close()
            raise DataError(
                f"{folder} is in use by another gensr prepare. Wait for it or choose another OUT."
            )
        if _is_file_at(file, path):
            return file
        file.close()
    raise DataError(
        f"{folder} cannot be made ({failed or 'others remove it'}): is there a broken link or a file on the "
        "way to it? Correct it or choose another OUT."
    ) from failed


def _is_file_at(file: IO[str], path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), there)


def clear(folder: Path) -> None:
    """Empty a work folder, except for its lock. The list of finished stages goes first: it must not promise
    what is gone."""
    (folder / STAGES).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.name != LOCK:
            remove(entry)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish(folder: Path, out: Path) -> None:
    """folder/out, complete and synced, becomes `out`; what had that name lies in `folder` afterwards.

    Raises OSError; `out` is then as it was.
    """
    tree = folder / TREE
    if not os.path.lexists(out):
        os.rename(tree, out)
    else:
        with open(folder / JOURNAL, "w") as file:
            file.write(_identity(tree))
            file.flush()
            os.fsync(file.fileno())
        sync(folder)
        if not exchange(tree, out):
            swap_by_renames(tree, out, folder / OLD)
    sync(out.absolute().parent)


def swap_by_renames(new: Path, out: Path, old: Path) -> None:
    """`new` becomes `out`, and what had that name `old`. Raises OSError; `out` is then as it was."""
    os.rename(out, old)
    try:
        os.rename(new, out)
    except OSError:
        os.rename(old, out)
        raise


def finish_publishing(out: Path) -> None:
    """What a killed process began to publish: completed if OUT has lost its name, forgotten otherwise. Call
    it before anything asks whether OUT is there.

    Raises DataError when another process is at it.
    """
    folder = partial_folder(out)
    if not os.path.lexists(folder / JOURNAL) and not os.path.lexists(folder / OLD):
        return
    with take_lock(folder):
        recover(folder, out)


def recover(folder: Path, out: Path) -> None:
    """The same for the holder of the lock."""
    if os.path.lexists(folder / OLD) and not os.path.lexists(out):  # killed between the two renames
        complete = (folder / TREE / "manifest.json").is_file()
        os.rename(folder / (TREE if complete else OLD), out)
        sync(out.absolute().parent)
        if complete:
            clear(folder)
    journal = folder / JOURNAL
    if journal.is_file() and journal.read_text() == _identity(out):  # folder/out is the old one, if anything
        clear(folder)
    remove(folder / OLD)
    journal.unlink(missing_ok=True)


def _identity(folder: Path) -> str:
    try:
        return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    except OSError:
        return "no manifest"


def exchange(first: Path, second: Path) -> bool:
    """Two names of one file system change places in one step; False where that is not possible."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def sync(path: Path) -> None:
    """A file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
