"""sha256 of files, in pieces."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

PIECE_BYTES = 1 << 20


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def pieces(file: Readable) -> Iterator[bytes]:
    """What is left of a binary file, a megabyte at a time."""
    while piece := file.read(PIECE_BYTES):
        yield piece


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in pieces(file):
            digest.update(piece)
    return digest.hexdigest()


def has_sha256(path: Path, digest: Path) -> bool:
    """Whether a file's sha256 is the first word of the file `digest`, as sha256sum writes it."""
    return digest.read_text(errors="replace").split()[:1] == [file_sha256(path)]
