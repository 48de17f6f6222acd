"""Sampled training negatives: a hash of (seed, epoch, event, draw), so that they do not depend on ranks, workers or resumption."""

import numpy as np

from data_shards.hashing import derive_seed, mix64, uniform_below

MAX_REDRAWS = 20  # a collision with the positive, the history or an earlier negative is drawn again this often


class NegativeSampler:
    """Draws negatives for a batch of events; never the positive nor an item of the (model's) history, distinct within an event."""

    def __init__(
        self, num_items: int, num_negatives: int, seed: int, kind: str = "uniform", clicks: np.ndarray | None = None, alpha: float = 0.75
    ) -> None:
        """`clicks` [num_items]: training click counts, for kind="popularity" (probability ∝ (clicks + 1)^alpha)."""
        self.num_items = num_items
        self.num_negatives = num_negatives
        self.seed = seed
        self.kind = kind
        self.cumulative: np.ndarray | None = None
        if kind == "popularity":
            assert clicks is not None and clicks.shape == (num_items,)
            weights = (clicks.astype(np.float64) + 1.0) ** alpha
            self.cumulative = np.cumsum(weights / weights.sum())

    def draw(self, event_ids: np.ndarray, epochs: np.ndarray, positives: np.ndarray, history: np.ndarray, history_mask: np.ndarray) -> np.ndarray:
        """event_ids, epochs, positives [B]; history [B, N] with mask → negatives [B, num_negatives] int64.

        A catalogue too small for distinct negatives keeps its last draws (collisions remain possible there).
        """
        taken = np.where(history_mask, history, -1)
        taken = np.concatenate([positives[:, None], taken], axis=1).astype(np.int64)
        keys = mix64(event_ids, derive_seed(self.seed, 1)) ^ mix64(epochs, derive_seed(self.seed, 2))
        draws = np.arange(self.num_negatives)
        out = self._items(keys[:, None], draws[None, :])
        for attempt in range(1, MAX_REDRAWS + 1):
            bad = self._collisions(out, taken)
            if not bad.any():
                break
            rows, columns = np.nonzero(bad)
            out[rows, columns] = self._items(keys[rows], draws[columns] + attempt * self.num_negatives)
        return out

    def _items(self, keys: np.ndarray, draws: np.ndarray) -> np.ndarray:
        bits = mix64(keys + mix64(draws, 3), 4)
        if self.cumulative is None:
            return uniform_below(bits, self.num_items)
        uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.minimum(np.searchsorted(self.cumulative, uniform, side="right"), self.num_items - 1)

    @staticmethod
    def _collisions(negatives: np.ndarray, taken: np.ndarray) -> np.ndarray:
        bad = np.zeros(negatives.shape, dtype=bool)
        for column in range(taken.shape[1]):  # N compares of [B, negatives]: faster than one [B, negatives, N] array
            bad |= negatives == taken[:, column : column + 1]
        for column in range(1, negatives.shape[1]):
            bad[:, column] |= (negatives[:, :column] == negatives[:, column : column + 1]).any(1)
        return bad
