"""Token and word matrices of the catalogue: .npy parts of PART_ROWS rows each, so that none is too large to
fetch or to write again.

A matrix of one part is mapped into memory where it lies; trainer/data/item_tables.py joins several once a
node.
"""

from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import DataError

PART_ROWS = 1 << 20


def part_path(folder: Path, stem: str, number: int) -> Path:
    """catalog/item_tokens-000000.npy and so on."""
    return folder / f"{stem}-{number:06d}.npy"


def compact_type(largest: int) -> Any:
    """uint16 where the largest id fits."""
    return np.uint16 if largest < 1 << 16 else np.int32


class MatrixWriter:
    """Writes a matrix [num_rows, width] from top to bottom as parts FOLDER/STEM-NNNNNN.npy (one empty part
    when there are no rows)."""

    def __init__(self, folder: Path, stem: str, num_rows: int, width: int, dtype: Any) -> None:
        self.folder, self.stem, self.num_rows, self.width, self.dtype = folder, stem, num_rows, width, dtype
        self.filled = 0
        self._part: Any = None
        if num_rows == 0:
            np.save(part_path(folder, stem, 0), np.zeros((0, width), dtype))

    def append(self, rows: np.ndarray) -> None:
        while len(rows):
            number, at = divmod(self.filled, PART_ROWS)
            if at == 0:
                shape = (min(PART_ROWS, self.num_rows - self.filled), self.width)
                self._part = np.lib.format.open_memmap(
                    part_path(self.folder, self.stem, number), mode="w+", dtype=self.dtype, shape=shape
                )
            here = rows[: len(self._part) - at]
            self._part[at : at + len(here)] = here
            self.filled += len(here)
            rows = rows[len(here) :]
            if at + len(here) == len(self._part):
                self._part.flush()

    def close(self) -> None:
        assert self.filled == self.num_rows, f"{self.filled} of {self.num_rows} rows written"
        self._part = None


def matrix_parts(folder: Path, stem: str, num_rows: int) -> list[np.ndarray]:
    """The parts of catalog/STEM of a prepared folder, memory-mapped. Copy-on-write: pages are shared by all
    processes until written to.

    Raises DataError when parts are missing or their rows do not add up to num_rows. Format 1 has one file,
    STEM.npy.
    """
    paths = sorted(folder.glob(f"{stem}-??????.npy")) or [folder / f"{stem}.npy"]
    if not paths[0].is_file():
        raise DataError(
            f"{part_path(folder, stem, 0)}: missing. Restore the file or prepare the folder again."
        )
    parts = [np.load(path, mmap_mode="c", allow_pickle=False) for path in paths]
    rows = sum(len(part) for part in parts)
    if rows != num_rows:
        raise DataError(
            f"{folder / stem}-*.npy: {rows} rows, the manifest says {num_rows}. Restore the files or prepare "
            "the folder again."
        )
    return parts
