"""Paths of categories, […, depth] from the root, 0 behind the last."""

import torch
from torch import Tensor


def last_category(paths: Tensor) -> Tensor:
    """→ […] int64, the deepest; 0 where there is none."""
    if not paths.shape[-1]:
        return paths.new_zeros(paths.shape[:-1], dtype=torch.int64)
    last = ((paths > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    return paths.gather(-1, last)[..., 0].long()
