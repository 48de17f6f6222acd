"""Writing files so that a reader sees the old one or the new one, never half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_shards.checksum import file_sha256
from trainer.errors import EnvironmentProblem

__all__ = ["SECRET_MODE", "atomic", "file_sha256"]

SECRET_MODE = 0o600  # of a file that is needed whole, passwords included: only its owner reads it


@contextmanager
def atomic(path: str | Path, mode: int | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well its file is synced and renamed to
    `path`, else removed. mode: permissions from the first byte on; None = the process's. The temporary path is absolute: Arrow reads a relative "a:b" as a URL.

    Raises EnvironmentProblem when the disk is full or the folder cannot be written.
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if mode is not None:
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, mode))
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}: cannot be written: {error.strerror or error}. Nothing earlier was changed; free space "
            "or fix permissions."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, *names: str) -> None:
    """Remove what atomic() left of these files when its process was killed. The caller must be the only one
    who writes them."""
    for name in names:
        for stale in folder.glob(f".{name}.*.tmp"):
            stale.unlink(missing_ok=True)
