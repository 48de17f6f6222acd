"""catalog/ and cf/ of a prepared folder → ItemTables. Item matrices are mapped into memory: the processes of
a node share one copy."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_shards.matrices import matrix_parts
from data_shards.schema import Manifest
from trainer.batch import ItemTables
from trainer.data.cf_table import CfTable
from trainer.data.node_cache import cache_of, check_free_space, locked
from trainer.runtime.files import atomic


def load_tables(
    folder: str | Path, manifest: Manifest, cf: CfTable | None, with_folds: bool = True
) -> ItemTables:
    """All look-up tables of a prepared folder on the CPU. cf: None for a model that reads no CF vectors. CF
    vectors are scaled by one number to unit RMS, whatever LightGCN's regularisation made of them.

    item_tokens, item_words and item_category keep the files' type (uint16 where ids of tokens and words fit)
    and lie in the page cache, once a node. Raises DataError when a file is missing or its rows do not match
    the manifest.
    """
    num_items, num_queries = manifest.num_items, manifest.num_queries
    words = manifest.num_words > 0
    return ItemTables(
        **_cf_tables(cf, num_items, with_folds),
        item_tokens=_mapped(folder, manifest, "item_tokens", num_items),
        item_words=_mapped(folder, manifest, "item_words", num_items) if words else _nothing(num_items),
        item_category=_mapped(folder, manifest, "item_category", num_items)
        if manifest.category_depth
        else _nothing(num_items),
        query_tokens=_at_least_one_row(
            _trimmed(_mapped(folder, manifest, "query_tokens", num_queries).int())
        ),
        query_words=_at_least_one_row(
            _trimmed(_mapped(folder, manifest, "query_words", num_queries).int())
            if words
            else _nothing(num_queries)
        ),
    )


def _cf_tables(cf: CfTable | None, num_items: int, with_folds: bool) -> dict[str, Tensor]:
    if cf is None:
        empty = torch.zeros((num_items, 0))
        return {"cf": empty, "cf_folds": empty[None, :, :][:0], "cf_users": torch.zeros((0, 0))}
    clicked = cf.item.any(1)  # items without training clicks are zero rows
    scale = 1.0 / float(cf.item[clicked].square().mean().sqrt()) if bool(clicked.any()) else 1.0
    folds = cf.item_folds if with_folds else cf.item_folds[:0]
    return {"cf": cf.item * scale, "cf_folds": folds * scale, "cf_users": cf.user * scale}


def _nothing(rows: int) -> Tensor:
    return torch.zeros((rows, 0), dtype=torch.int32)


def _mapped(folder: str | Path, manifest: Manifest, stem: str, num_rows: int) -> Tensor:
    """A matrix as a tensor that lies in a memory-mapped file: its only part, or, of several, one file that
    they are joined to once a node."""
    parts = matrix_parts(Path(folder) / "catalog", stem, num_rows)
    if len(parts) == 1:
        return torch.from_numpy(parts[0])
    path = cache_of(folder) / "joined" / f"{manifest.hash[:32]}-{stem}.npy"
    with locked(path):
        if not path.is_file():
            check_free_space(path, sum(part.nbytes for part in parts))
            with atomic(path) as temporary:
                whole = np.lib.format.open_memmap(
                    temporary, mode="w+", dtype=parts[0].dtype, shape=(num_rows, parts[0].shape[1])
                )
                np.concatenate(parts, out=whole)
                whole.flush()
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


def _trimmed(tokens: Tensor) -> Tensor:
    """Without the columns that hold padding only: the longest query decides the prompt's length. At least one
    column stays."""
    used = (tokens != 0).any(0)
    longest = int(used.nonzero().max()) + 1 if bool(used.any()) else 1
    return tokens[:, :longest] if tokens.shape[1] else tokens


def _at_least_one_row(tokens: Tensor) -> Tensor:
    """Of a log without searches: a query of padding, so that what stands for "no query" can be looked up."""
    return tokens if len(tokens) else tokens.new_zeros(1, tokens.shape[1])
