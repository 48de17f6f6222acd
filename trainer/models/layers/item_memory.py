"""Vectors of items that depend on the item alone, computed once a model instead of once a score."""

from collections.abc import Callable

import torch
from torch import Tensor


class ItemMemory:
    """For models whose weights stay as they are: made in Ranker.ready_to_serve(). It takes num_items × what
    an item has of memory, of which only the items that were asked for are touched. Scores under gradients are
    not remembered."""

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
