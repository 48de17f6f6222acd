"""Vectors that depend on the item alone, computed once per model instead of once per score."""

from collections.abc import Callable

import torch
from torch import Tensor


class ItemMemory:
    """For models whose weights no longer change: made in Ranker.ready_to_serve(). It reserves memory for all
    items, but touches only that of items that were asked for. Under gradients nothing is remembered."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self._vectors = self._known = torch.empty(0)

    def __call__(self, rows: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """rows: of items […] → […, width…]. compute: [n] rows → [n, width…]."""
        if torch.is_grad_enabled():
            return compute(rows)
        if not len(self._known):
            self._known = torch.zeros(self.num_items, dtype=torch.bool, device=rows.device)
        asked = rows.unique()
        new = asked[~self._known[asked]]
        if len(new):
            vectors = compute(new)
            if not len(self._vectors):
                self._vectors = vectors.new_zeros(self.num_items, *vectors.shape[1:])
            self._vectors[new] = vectors
            self._known[new] = True
        return self._vectors[rows]
