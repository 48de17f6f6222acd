"""What GenSR is compared with on the same stored candidates. Each file gives a scorer: Batch → scores_BC
float32, for one task."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from data_shards.schema import REC, SRC, Manifest
from trainer.batch import Batch
from trainer.models.baselines.bm25 import build_bm25
from trainer.models.baselines.lightgcn import build_lightgcn
from trainer.models.baselines.popularity import build_popularity

Scorer = Callable[[Batch], Tensor]

# name: (task it serves, how to build its scorer from a prepared folder)
BASELINES: dict[str, tuple[int, Callable[[str | Path, Manifest], Scorer]]] = {
    "popularity": (REC, build_popularity),
    "lightgcn": (REC, build_lightgcn),
    "bm25": (SRC, build_bm25),
}
