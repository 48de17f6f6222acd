"""Writing files so that a reader sees the old one or the new one, never half of one."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data_shards.checksum import file_sha256
from data_shards.errors import WRITE_FIXES
from data_shards.publish import exchange, swap_by_renames, sync
from trainer.errors import EnvironmentProblem

__all__ = ["SECRET_MODE", "atomic", "create", "file_sha256", "write_json", "write_text", "writing"]

SECRET_MODE = 0o600  # of a file that is needed whole, passwords included: only its owner reads it
NOTHING_CHANGED = "Nothing earlier was changed"
# How torch, faiss and other libraries in C++ or Rust, which know no OSError, say that a file cannot be
# written.
_FILE_TROUBLE = re.compile(
    r"PytorchStreamWriter|inline_container|Parent directory|os error \d+|write error|for writing"
    r"|No space left|Read-only file system|Permission denied|Disk quota|Input/output error",
)


@contextmanager
def writing(what: str | Path, kept: str = NOTHING_CHANGED) -> Iterator[None]:
    """Every write happens in such a block: where the disk is full or the folder cannot be written, whichever
    library writes, it raises EnvironmentProblem that names `what`, the reason and the fix.

    kept: what is intact all the same.
    """
    try:
        yield
    except Exception as error:
        reason = _why_not_written(error)
        if reason is None:
            raise
        number, text = reason
        fix = WRITE_FIXES.get(number, "Free space or fix permissions")
        raise EnvironmentProblem(f"{what}: cannot be written: {text}. {kept}. {fix}.") from error


def _why_not_written(error: Exception) -> tuple[int, str] | None:
    """(errno, in words) of an error of a file; None for any other error."""
    if isinstance(error, OSError):
        return error.errno or 0, error.strerror or str(error)
    of_a_library = isinstance(error, RuntimeError | SafetensorError) or type(error) is Exception  # tokenizers
    if not of_a_library or not _FILE_TROUBLE.search(str(error)):
        return None
    named = re.search(r"os error (\d+)", str(error))
    number = int(named[1]) if named else 0
    for code in (*WRITE_FIXES, errno.EIO):
        if os.strerror(code) in str(error):
            number = code
    return number, os.strerror(number) if number else str(error).strip().splitlines()[0]


@contextmanager
def atomic(path: str | Path, mode: int | None = None, kept: str = NOTHING_CHANGED) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well its file is synced and renamed to
    `path`, else removed. mode: permissions from the first byte on; None = the process's. The temporary path
    is absolute: Arrow reads a relative "a:b" as a URL. kept: see writing().

    Raises EnvironmentProblem when the disk is full or the folder cannot be written.
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, kept):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if mode is not None:
                os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, mode))
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)  # the rename itself
        finally:
            with contextlib.suppress(OSError):  # a read-only file system refuses even this
                temporary.unlink(missing_ok=True)


def replace_folder(new: Path, path: Path) -> None:
    """The folder `new`, beside `path`, becomes `path` once it is on the disk; what had that name is removed.
    A reader always finds a whole one, but for a moment where the file system cannot exchange two names."""
    for entry in (*new.rglob("*"), new):
        sync(entry)
    old = new  # the name that the old one has after an exchange
    if not path.exists():
        os.rename(new, path)
    elif not exchange(new, path):
        old = path.with_name(path.name + ".previous")
        shutil.rmtree(old, ignore_errors=True)
        swap_by_renames(new, path, old)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | Path, text: str, mode: int | None = None, kept: str = NOTHING_CHANGED) -> None:
    """A text as UTF-8, atomically. mode, kept: see atomic()."""
    with atomic(path, mode, kept) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, document: Any, kept: str = NOTHING_CHANGED, allow_nan: bool = True) -> None:
    """An indented document, atomically. kept: see writing(). allow_nan: False refuses what JSON has not."""
    write_text(path, json.dumps(document, indent=2, allow_nan=allow_nan) + "\n", kept=kept)


def create(path: Path, text: str, mode: int) -> bool:
    """Write a new file that is whole from the moment it can be seen. False when it is there already; an empty
    one, which a full disk has left, does not count."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(
                os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode), "w", encoding="utf-8"
            ) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            return _appear(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _appear(temporary: Path, path: Path) -> bool:
    """Give a file its name, unless a file with something in it has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        if path.stat().st_size:
            return False
        os.replace(temporary, path)
    except OSError:  # a file system without hard links
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            if path.stat().st_size:
                return False
        os.replace(temporary, path)
    return True


def remove_temporaries(folder: Path, *names: str) -> None:
    """Remove what atomic() left of these files when its process was killed. The caller must be the only one
    who writes them."""
    for name in names:
        for stale in folder.glob(f".{name}.*.tmp"):
            stale.unlink(missing_ok=True)
