"""Categories of items as rows: item_category, a matrix of ids, and categories.parquet, what they stand for.

A category is a place in the tree: the names from the root down to it. "Accessories" below "Phones" and
"Accessories" below "Cars" are two categories.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.matrices import MatrixWriter

PATH_MARK = "\x1f"  # ASCII's unit separator, between the names of a path: no name holds it
ROWS_AT_ONCE = 250_000  # not work.py's: training reads this module, and needs no duckdb for it
SCHEMA = pa.schema([("id", pa.int32()), ("level", pa.int32()), ("name", pa.string()), ("parent", pa.int32())])


def read_categories(catalog: Path) -> list[tuple[str, ...]]:
    """Names from the root down of categories 1, 2, … of catalog/categories.parquet."""
    table = pq.read_table(catalog / "categories.parquet", columns=["name", "parent"])
    paths: list[tuple[str, ...]] = [()]
    for name, parent in zip(table["name"].to_pylist(), table["parent"].to_pylist(), strict=True):
        paths.append((*paths[parent], name))  # parents come first
    return paths[1:]


class CategoryWriter:
    """Collects the category path of each item, then writes catalog/item_category-*.npy and
    catalog/categories.parquet.

    Ids are 1 … num_categories: those of `known`, then the others by level and then by path. Neither file is
    written when no item has a category.
    """

    def __init__(
        self, folder: Path, num_items: int, max_levels: int, known: Sequence[tuple[str, ...]] = ()
    ) -> None:
        self.folder, self.max_levels, self.known = folder, max_levels, known
        self.numbers = {"": 0}  # of each path as it was written
        self.number_of_item = np.zeros(num_items, np.int32)
        self.filled = 0

    def append(self, paths: pa.StringArray) -> None:
        """Paths of the next items: names from the root, joined by PATH_MARK; null for none."""
        found = paths.fill_null("").dictionary_encode()
        texts = found.dictionary.to_pylist()
        numbers = np.array([self.numbers.setdefault(text, len(self.numbers)) for text in texts], np.int32)
        stop = self.filled + len(paths)
        self.number_of_item[self.filled : stop] = numbers[found.indices.to_numpy()]
        self.filled = stop

    def close(self) -> dict[str, int]:
        """Writes both files → counts for the manifest."""
        assert self.filled == len(self.number_of_item), f"{self.filled} of {len(self.number_of_item)} items"
        paths = [_names(text)[: self.max_levels] for text in self.numbers]
        nodes = {path[:length] for path in paths for length in range(1, len(path) + 1)}
        others = nodes.difference(self.known)
        in_order = [*self.known, *sorted(others, key=lambda node: (len(node), node))]
        id_of = {node: number for number, node in enumerate(in_order, start=1)}
        depth = max(map(len, [*paths, *self.known]))
        if depth:
            self._write_matrix(paths, id_of, depth)
            rows = [(id_of[node], len(node) - 1, node[-1], id_of.get(node[:-1], 0)) for node in in_order]
            columns = dict(zip(SCHEMA.names, zip(*rows, strict=True), strict=True))
            pq.write_table(pa.table(columns, SCHEMA), self.folder / "categories.parquet", compression="zstd")
        return {"categories": len(in_order), "category_depth": depth}

    def _write_matrix(
        self, paths: list[tuple[str, ...]], id_of: dict[tuple[str, ...], int], depth: int
    ) -> None:
        ids_of_path = np.zeros((len(paths), depth), np.int32)
        for number, path in enumerate(paths):
            ids_of_path[number, : len(path)] = [id_of[path[: level + 1]] for level in range(len(path))]
        num_items = len(self.number_of_item)
        writer = MatrixWriter(self.folder, "item_category", num_items, depth, np.int32)
        for start in range(0, num_items, ROWS_AT_ONCE):
            writer.append(ids_of_path[self.number_of_item[start : start + ROWS_AT_ONCE]])
        writer.close()


def _names(path: str) -> tuple[str, ...]:
    """Names of the levels, without those that are empty."""
    return tuple(name for name in (part.strip() for part in path.split(PATH_MARK)) if name)
