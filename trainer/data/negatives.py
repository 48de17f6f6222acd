"""Sampled training negatives: a hash of (seed, epoch, event, draw), so that they do not depend on ranks,
workers or resumption."""

import numpy as np

from data_shards.hashing import derive_seed, mix64, uniform_below, uniform_float

# a collision with the positive, the history or an earlier negative is drawn again this often
MAX_REDRAWS = 20
U64 = np.uint64


class NegativeSampler:
    """Draws negatives for a batch of events; never the positive nor an item of the (model's) history,
    distinct within an event."""

    def __init__(
        self,
        num_items: int,
        num_negatives: int,
        seed: int,
        kind: str = "uniform",
        clicks: np.ndarray | None = None,
        alpha: float = 0.75,
        mixture: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """kind: uniform, popularity (probability ∝ (clicks + 1)^alpha; `clicks` [num_items]: training click
        counts), impressions (shown beside the click, uniform where they run out), or a mixture of all: the
        shares of (impressions, popularity), the rest uniform."""
        self.num_items, self.num_negatives, self.seed = num_items, num_negatives, seed
        shares = {
            "uniform": (0.0, 0.0),
            "popularity": (0.0, 1.0),
            "impressions": (1.0, 0.0),
            "mixture": mixture,
        }
        self.impressions_share, popularity = shares[kind]
        # of the draws that are not impressions
        self.popularity_share = popularity / (1 - self.impressions_share) if popularity else 0.0
        self.cumulative: np.ndarray | None = None
        if self.popularity_share:
            assert clicks is not None and clicks.shape == (num_items,)
            weights = (clicks.astype(np.float64) + 1.0) ** alpha
            self.cumulative = np.cumsum(weights / weights.sum())

    @property
    def uses_impressions(self) -> bool:
        return self.impressions_share > 0

    def draw(
        self,
        event_ids: np.ndarray,
        epochs: np.ndarray,
        positives: np.ndarray,
        history: np.ndarray,
        history_mask: np.ndarray,
        impressions: np.ndarray | None = None,
    ) -> np.ndarray:
        """event_ids, epochs, positives [B]; history [B, N] with mask; impressions [B, X] padded with -1 →
        negatives [B, num_negatives] int64.

        A catalogue too small for distinct negatives keeps its last draws (collisions remain possible there).
        """
        # [1 + N, B]: rows lie together
        taken = np.concatenate([positives[None], np.where(history_mask, history, -1).T]).astype(np.int64)
        keys = mix64(event_ids, derive_seed(self.seed, 1)) ^ mix64(epochs, derive_seed(self.seed, 2))
        draws = np.arange(self.num_negatives)
        out = self._items(keys[:, None], draws[None, :])
        if self.uses_impressions and impressions is not None and impressions.shape[1]:
            shown = self._shown(keys, impressions, taken)
            out = np.where(shown >= 0, shown, out)
        bad = self._collisions(out, taken)
        rows, columns = np.nonzero(bad)
        for attempt in range(1, MAX_REDRAWS + 1):
            if len(rows) == 0:
                break
            out[rows, columns] = self._items(keys[rows], draws[columns] + attempt * self.num_negatives)
            changed = np.unique(rows)  # only these events can collide now
            at, columns = np.nonzero(self._collisions(out[changed], taken[:, changed]))
            rows = changed[at]
        return out

    def _items(self, keys: np.ndarray, draws: np.ndarray) -> np.ndarray:
        bits = mix64(keys + mix64(draws, 3), 4)
        if self.cumulative is None:
            return uniform_below(bits, self.num_items)
        popular = np.minimum(
            np.searchsorted(self.cumulative, uniform_float(bits), side="right"), self.num_items - 1
        )
        if self.popularity_share >= 1:
            return popular
        return np.where(
            self._chance(keys, draws, 5) < self.popularity_share, popular, uniform_below(bits, self.num_items)
        )

    def _shown(self, keys: np.ndarray, impressions: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """Impressions for the first slots of each event, [B, num_negatives], -1 in the others: as many as its
        share says and it has, chosen by hash."""
        usable = impressions >= 0
        for items in taken:
            usable &= impressions != items[:, None]
        order = np.where(usable, mix64(keys[:, None] ^ mix64(impressions, 6), 6), U64(2**64 - 1))
        order = np.argsort(order, axis=1, kind="stable")[:, : self.num_negatives]
        chosen = np.full((len(keys), self.num_negatives), -1, np.int64)
        chosen[:, : order.shape[1]] = np.take_along_axis(np.where(usable, impressions, -1), order, axis=1)
        slots = np.arange(self.num_negatives)
        wanted = (self._chance(keys[:, None], slots[None, :], 7) < self.impressions_share).sum(axis=1)
        return np.where(slots < wanted[:, None], chosen, -1)

    @staticmethod
    def _chance(keys: np.ndarray, draws: np.ndarray, purpose: int) -> np.ndarray:
        return uniform_float(mix64(keys + mix64(draws, purpose), purpose))

    @staticmethod
    def _collisions(negatives: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """negatives [B, K], taken [T, B] → which negatives are among the event's taken items or repeat an
        earlier one, [B, K] bool."""
        by_slot = np.ascontiguousarray(negatives.T)  # T compares of [K, B]: faster than one [B, K, T] array
        bad = np.zeros(by_slot.shape, dtype=bool)
        for items in taken:
            bad |= by_slot == items
        for slot in range(1, len(by_slot)):
            bad[slot] |= (by_slot[:slot] == by_slot[slot]).any(axis=0)
        return bad.T
