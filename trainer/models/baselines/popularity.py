"""Popularity: an item's number of training recommendation clicks, the same for every user."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from data_shards.schema import Manifest
from trainer.batch import Batch


def build_popularity(folder: str | Path, manifest: Manifest) -> Callable[[Batch], Tensor]:
    column = pq.read_table(Path(folder) / "catalog" / "items.parquet", columns=["train_rec_clicks"])[
        "train_rec_clicks"
    ]
    clicks = torch.from_numpy(column.to_numpy().astype(np.float32))  # exact up to 2^24 clicks
    return lambda batch: clicks[batch.candidates]
