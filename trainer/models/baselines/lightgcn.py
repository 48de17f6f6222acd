"""LightGCN: e_u · e_i of the full table of `gensr cf`. Users and items without training clicks are zero
vectors: their candidates tie."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data_shards.schema import Manifest
from trainer.batch import Batch
from trainer.data.cf_table import load_cf


def build_lightgcn(folder: str | Path, manifest: Manifest) -> Callable[[Batch], Tensor]:
    """Raises DataError when the folder has no table, or one of another split."""
    table = load_cf(folder, manifest, folds=False)
    return lambda batch: torch.einsum("bk,bck->bc", table.user[batch.user], table.item[batch.candidates])
