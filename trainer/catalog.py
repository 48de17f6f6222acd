"""catalog/ and cf/ of a prepared folder → ItemTables. Token arrays are memory-mapped: the processes of a node share one copy."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_shards.schema import Manifest
from trainer.batch import ItemTables
from trainer.cf_table import CfTable
from trainer.errors import DataError


def load_tables(folder: str | Path, manifest: Manifest, cf: CfTable, with_folds: bool = True) -> ItemTables:
    """All look-up tables of a prepared folder on the CPU. CF vectors are scaled by one number to unit RMS, whatever LightGCN's regularisation made of them.

    Raises DataError when a file is missing or its rows do not match the manifest.
    """
    catalog = Path(folder) / "catalog"
    clicked = cf.item.any(1)  # items without training clicks are zero rows
    scale = 1.0 / float(cf.item[clicked].square().mean().sqrt()) if bool(clicked.any()) else 1.0
    folds = cf.item_folds if with_folds else cf.item_folds[:0]
    return ItemTables(
        cf=cf.item * scale,
        cf_folds=folds * scale,
        item_tokens=_tokens(catalog / "item_tokens.npy", manifest.num_items),
        item_words=_words(catalog / "item_words.npy", manifest.num_items, manifest.num_words),
        query_tokens=_trimmed(_tokens(catalog / "query_tokens.npy", manifest.num_queries)),
        query_words=_trimmed(_words(catalog / "query_words.npy", manifest.num_queries, manifest.num_words)),
    )


def _tokens(path: Path, rows: int) -> Tensor:
    if not path.is_file():
        raise DataError(f"{path}: missing. Restore the file or prepare the folder again.")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape[0] != rows:
        raise DataError(f"{path}: {array.shape[0]} rows, the manifest says {rows}. Prepare the folder again.")
    return torch.from_numpy(np.asarray(array).astype(np.int32))


def _words(path: Path, rows: int, num_words: int) -> Tensor:
    return _tokens(path, rows) if num_words else torch.zeros((rows, 0), dtype=torch.int32)


def _trimmed(tokens: Tensor) -> Tensor:
    """Without the columns that hold padding only: the longest query decides the prompt's length. At least one column stays."""
    used = (tokens != 0).any(0)
    longest = int(used.nonzero().max()) + 1 if bool(used.any()) else 1
    return tokens[:, :longest] if tokens.shape[1] else tokens
