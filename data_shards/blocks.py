"""Tar entries → Arrow blocks. Only `.arrow` entries are decoded; nothing is ever unpickled."""

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa


def tar_entries(path: Path) -> Iterator[bytes]:
    """The content of each `.arrow` entry of a local tar file, in order."""
    with tarfile.open(path) as tar:
        for entry in tar:
            file = tar.extractfile(entry)
            if file is not None and entry.name.endswith(".arrow"):
                yield file.read()


def decode_blocks(entries: Iterable[bytes], sizes: Sequence[int], first: int = 0) -> Iterator[pa.Table]:
    """Entries of one shard → its blocks from number `first` on. sizes: events of each block, as the manifest
    says.

    Raises EOFError when there are fewer or more, ValueError (pyarrow's errors among them) for a block that is
    not what it should be.
    """
    number = -1
    for number, entry in enumerate(entries):
        if number < first:
            continue
        table = pa.ipc.open_stream(entry).read_all()
        if number < len(sizes) and table.num_rows != sizes[number]:
            raise ValueError(f"it holds {table.num_rows} events, the manifest says {sizes[number]}")
        yield table
    if number + 1 != len(sizes):
        raise EOFError(f"the shard holds {number + 1} blocks, the manifest says {len(sizes)} (truncated?)")
