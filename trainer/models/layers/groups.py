"""Rows that share a key (items of a category, clicks of a query), and a random one of them."""

import torch
from torch import Tensor


class Groups:
    """Rows by key. A key below 0 is no key."""

    def __init__(self, keys: Tensor) -> None:
        """keys [n] int64, one a row."""
        sizes = torch.bincount(keys[keys >= 0], minlength=1)
        self._rows = keys.argsort(stable=True)  # those without a key come first
        self._sizes = sizes
        self._starts = sizes.cumsum(0) - sizes + (keys < 0).sum()

    def draw(self, keys: Tensor) -> Tensor:
        """A random row of each key, […]; −1 for no key and for one that no row has."""
        known = (keys >= 0) & (keys < len(self._sizes))
        place = keys * known
        size = self._sizes[place]
        draws = torch.rand(keys.shape, dtype=torch.float64, device=keys.device)
        row = self._starts[place] + (draws * size).long()
        found = self._rows[row.clamp(max=len(self._rows) - 1)]
        return found.masked_fill(~known | (size == 0), -1)
