"""Position in the training stream → event, by arithmetic: no state but the position. Sees sizes and users,
never files.

    position p ─▶ epoch, unit (about UNIT_EVENTS positions) ─▶ which task (Mix)
               ─▶ the task's n-th event ─▶ (shard, block, row)

A unit's events are ordered together, so that one user's events lie far apart, also across the borders of
units.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data_shards.hashing import derive_seed, mix64, permutation, uniform_float
from data_shards.histories import first_of_runs

UNIT_EVENTS = 4096  # events ordered together, at least (fewer only if an epoch has fewer)
APART = 256  # positions that should hold distinct users (Eq. 10)
MARGIN = 1.25  # places are shares of a unit, positions differ from them by chance


@dataclass(frozen=True)
class Piece:
    """Usable rows start … stop-1, in stored order, of one block."""

    cycle: int  # how often the task's events have all been used before
    shard: int
    block: int
    start: int
    stop: int


class Cycles:
    """The events of one task (or all of them) for ever: cycle after cycle, each with the shards in another
    hashed order."""

    def __init__(self, sizes: Sequence[Sequence[int]], seed: int) -> None:
        """sizes[shard][block]: usable rows."""
        self.seed = seed
        self.num_events = sum(map(sum, sizes))
        self._sizes = [np.asarray(blocks, np.int64) for blocks in sizes]
        self._cached: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    def layout(self, cycle: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard, block, end) of every block in the order of this cycle; end: events of the cycle up to and
        with it."""
        if self._cached is None or self._cached[0] != cycle:
            shards = permutation(len(self._sizes), derive_seed(self.seed, 21, cycle))
            shard = np.concatenate([np.full(len(self._sizes[s]), s) for s in shards])
            block = np.concatenate([np.arange(len(self._sizes[s])) for s in shards])
            self._cached = cycle, shard, block, np.cumsum(np.concatenate([self._sizes[s] for s in shards]))
        return self._cached[1:]

    def pieces(self, first: int, count: int) -> Iterator[Piece]:
        """Where events first … first+count-1 of the endless sequence lie, in order."""
        while count > 0:
            cycle, at = divmod(first, self.num_events)
            shard, block, end = self.layout(cycle)
            number = int(np.searchsorted(end, at, side="right"))
            begin = int(end[number - 1]) if number else 0
            taken = min(count, int(end[number]) - at)
            yield Piece(cycle, int(shard[number]), int(block[number]), at - begin, at - begin + taken)
            first, count = first + taken, count - taken


@dataclass(frozen=True)
class Mix:
    """Which positions are searches: those where n·share passes a whole number. share = 0: the log's own
    mixture, one sequence of both tasks."""

    share: Fraction

    @staticmethod
    def of(search_share: float) -> "Mix":
        return Mix(Fraction(search_share).limit_denominator(1000))

    @property
    def num_streams(self) -> int:
        return 2 if self.share else 1

    def before(self, stream: int, position: int) -> int:
        """How many events of a stream (0 recommendation or everything, 1 search) lie at positions below this
        one."""
        searches = position * self.share.numerator // self.share.denominator
        return searches if stream else position - searches

    def first_after(self, stream: int, events: np.ndarray) -> np.ndarray:
        """The least position p with before(stream, p) == events (at least 1 each)."""
        searches, all_positions = self.share.numerator, self.share.denominator
        if stream:
            return -(-events * all_positions // searches)
        return (events - 1) * all_positions // (all_positions - searches) + 1

    def stream_of(self, positions: np.ndarray) -> np.ndarray:
        """0 or 1 for each position, int64."""
        searches = positions * self.share.numerator // self.share.denominator
        return (positions + 1) * self.share.numerator // self.share.denominator - searches


@dataclass(frozen=True)
class Unit:
    """Positions start … start+size-1 of the stream."""

    epoch: int
    start: int
    size: int


class Order:
    """The whole order of training: units, their pieces and how the events inside are arranged."""

    def __init__(self, streams: Sequence[Cycles], mix: Mix, seed: int) -> None:
        assert len(streams) == mix.num_streams
        self.streams, self.mix, self.seed = streams, mix, seed
        self.num_events = sum(stream.num_events for stream in streams)  # positions of an epoch

    def units_from(self, position: int) -> Iterator[Unit]:
        """For ever, from the unit before the one that holds `position` (its users are needed at the border),
        or from the first."""
        epoch = position // self.num_events
        ends = self._ends(epoch)
        number = int(np.searchsorted(ends, position - epoch * self.num_events, side="right")) - 1
        if number < 0 and epoch > 0:
            epoch -= 1
            ends = self._ends(epoch)
            number = len(ends) - 1
        number = max(number, 0)
        while True:
            for at in range(number, len(ends)):
                begin = int(ends[at - 1]) if at else 0
                yield Unit(epoch, epoch * self.num_events + begin, int(ends[at]) - begin)
            epoch, number = epoch + 1, 0
            ends = self._ends(epoch)

    def _ends(self, epoch: int) -> np.ndarray:
        """End of each unit, counted from the epoch's start: whole blocks where one sequence is read, even
        parts of cycles where two are mixed."""
        if len(self.streams) > 1:
            return self._even_ends(epoch * self.num_events)
        ends, last = [0], 0
        for end in self.streams[0].layout(epoch)[2].tolist():
            if end - last >= UNIT_EVENTS:
                ends.append(end)
                last = end
        if last < self.num_events:  # too few for a unit: they join the last one
            ends[-1 if len(ends) > 1 else len(ends) :] = [self.num_events]
        return np.array(ends[1:])

    def _even_ends(self, start: int) -> np.ndarray:
        """Units that also end where a stream's cycle ends: events of two cycles in one unit cannot be spread
        well. Too short a part stays with the next."""
        borders: list[int] = []
        for number, stream in enumerate(self.streams):
            cycles = [
                self.mix.before(number, position) // stream.num_events
                for position in (start, start + self.num_events)
            ]
            ends = (
                self.mix.first_after(number, np.arange(cycles[0] + 1, cycles[1] + 1) * stream.num_events)
                - start
            )
            borders += ends[(ends > 0) & (ends < self.num_events)].tolist()
        found: list[int] = []
        last = 0
        for border in [*sorted(borders), self.num_events]:
            size = border - last
            if border == self.num_events or min(size, self.num_events - border) >= UNIT_EVENTS // 4:
                parts = max(size // UNIT_EVENTS, 1)
                found += [last + size * part // parts for part in range(1, parts + 1)]
                last = border
        return np.array(found)

    def pieces(self, unit: Unit) -> list[tuple[int, Piece]]:
        """(stream, piece) of everything in a unit."""
        found = []
        for number, stream in enumerate(self.streams):
            first = self.mix.before(number, unit.start)
            found += [
                (number, piece)
                for piece in stream.pieces(first, self.mix.before(number, unit.start + unit.size) - first)
            ]
        return found

    def arrange(
        self, unit: Unit, user: np.ndarray, stream: np.ndarray, cycle: np.ndarray, avoid: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Order of a unit's events (columns [n]) and the users at its end. avoid: the users at the end of the
        unit before.

        Each stream keeps to its positions, and its events of one cycle come before those of the next: every
        event is used once a cycle.
        """
        place, late = spread_users(user, derive_seed(self.seed, 22, unit.start), avoid)
        wanted = self.mix.stream_of(unit.start + np.arange(unit.size))
        order = np.empty(unit.size, np.int64)
        for number in range(len(self.streams)):
            rows = np.flatnonzero(stream == number)
            order[wanted == number] = rows[np.lexsort((place[rows], cycle[rows]))]
        return order, late


def spread_users(user: np.ndarray, seed: int, avoid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in [0, 1) for events (user: [n]) that put events of one user far apart, and the users that may
    stand within APART of the end.

    The k-th of a user's c events, k in hashed order, gets the place (k + shift) / c; shift ∈ [0, 1) is hashed
    from the user. Users in `avoid` stood at the end of the unit before: their shift keeps them from the first
    APART positions, and from the last ones, too, so that who stands at the end follows from this unit alone
    (a stream can start anywhere after reading one unit more).
    """
    num_events = len(user)
    by_user = permutation(num_events, seed)
    by_user = by_user[np.argsort(user[by_user], kind="stable")]
    starts = first_of_runs(user[by_user])
    first = np.flatnonzero(starts)
    who, count, run = user[by_user[first]], np.diff(first, append=num_events), np.cumsum(starts) - 1
    shift = uniform_float(mix64(who, derive_seed(seed, 1)))
    # 0.5: very active, at both ends whatever the shift
    edge = np.minimum(MARGIN * APART * count / max(num_events, 1), 0.5)
    late = who[shift >= 1 - edge]
    shift = np.where(np.isin(who, avoid, assume_unique=True), edge + shift * (1 - 2 * edge), shift)
    place = np.empty(num_events)
    place[by_user] = (np.arange(num_events) - first[run] + shift[run]) / count[run]
    return place, late
