"""Position → event, on arrays: every event once a cycle, from any position the same, searches in their share,
users apart."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data import order as order_module
from trainer.data.order import Cycles, Mix, Order

Event = tuple[int, int, int, int, int]  # stream, cycle, shard, block, row
LAYOUTS = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=1, max_size=4).filter(
    lambda sizes: sum(map(sum, sizes)) > 0
)
SHARES = st.sampled_from([0.0, 0.5, 0.3, 0.07, 0.999])


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "UNIT_EVENTS", 24)


def user_of(event: Event) -> int:
    return (event[2] * 7 + event[3] * 3 + event[4]) % 11


def sequence(order: Order, start: int) -> Iterator[Event]:
    """Events at positions start, start + 1, …, as TrainStream puts them together."""
    late = np.zeros(0, np.int64)
    for unit in order.units_from(start):
        events = [
            (stream, piece.cycle, piece.shard, piece.block, row)
            for stream, piece in order.pieces(unit)
            for row in range(piece.start, piece.stop)
        ]
        users = np.array([user_of(event) for event in events])
        arranged, late = order.arrange(
            unit, users, np.array([e[0] for e in events]), np.array([e[1] for e in events]), late
        )
        assert sorted(arranged.tolist()) == list(range(unit.size))
        for position, index in enumerate(arranged.tolist(), unit.start):
            if position >= start:
                yield events[index]


def make_order(sizes: list[list[int]], share: float, seed: int) -> Order:
    mix = Mix.of(share)
    return Order([Cycles(sizes, seed + number) for number in range(mix.num_streams)], mix, seed)


quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(sizes=LAYOUTS, share=SHARES, seed=st.integers(0, 2**40))
def test_every_event_of_a_task_is_used_once_a_cycle(sizes: list[list[int]], share: float, seed: int) -> None:
    order = make_order(sizes, share, seed)
    every = sorted(
        (shard, block, row)
        for shard, blocks in enumerate(sizes)
        for block, size in enumerate(blocks)
        for row in range(size)
    )
    wanted = 3 * order.num_events
    events = list(islice(sequence(order, 0), wanted))
    for stream in range(len(order.streams)):
        mine = [event[1:] for event in events if event[0] == stream]
        assert len(mine) == order.mix.before(stream, wanted)
        for cycle in range(len(mine) // len(every)):
            part = mine[cycle * len(every) : (cycle + 1) * len(every)]
            assert sorted(event[1:] for event in part) == every and {event[0] for event in part} == {cycle}


@quick
@given(sizes=LAYOUTS, share=SHARES, seed=st.integers(0, 2**40), where=st.floats(0, 3))
def test_the_sequence_can_be_entered_anywhere(
    sizes: list[list[int]], share: float, seed: int, where: float
) -> None:
    order = make_order(sizes, share, seed)
    start = int(where * order.num_events)
    whole = list(islice(sequence(order, 0), start + 150))
    assert list(islice(sequence(make_order(sizes, share, seed), start), 150)) == whole[start:]


@quick
@given(share=st.integers(1, 999), first=st.integers(0, 10**9), size=st.integers(1, 300))
def test_searches_have_their_share_of_any_batch(share: int, first: int, size: int) -> None:
    mix = Mix.of(share / 1000)
    positions = np.arange(first, first + size)
    searches = mix.stream_of(positions).sum()
    assert abs(searches - size * share / 1000) <= 1
    assert searches == mix.before(1, first + size) - mix.before(1, first)
    for stream in (0, 1):  # the inverse
        position = int(mix.first_after(stream, np.array([first + 1]))[0])
        assert mix.before(stream, position) == first + 1 and mix.before(stream, position - 1) == first


def test_another_seed_is_another_order_and_so_is_another_epoch() -> None:
    sizes = [[30, 30], [30]]
    first, second = (list(islice(sequence(make_order(sizes, 0.0, seed), 0), 180)) for seed in (1, 2))
    place = lambda events: [event[2:] for event in events]  # noqa: E731
    assert place(first[:90]) != place(second[:90]) and place(first[:90]) != place(first[90:])


@pytest.mark.parametrize(("share", "fewest_wanted", "mean_wanted"), [(0.0, 250, 255.5), (0.3, 250, 255.0)])
def test_a_batch_of_256_holds_250_users_wherever_it_begins(
    share: float, fewest_wanted: int, mean_wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activity as uneven as a log's (log-normal over 5,000 users), incomplete blocks in every shard, two
    epochs. A plain shuffle gives about 240."""
    monkeypatch.setattr(order_module, "UNIT_EVENTS", 4096)
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0, 1.0, 5000)
    sizes = [[4096, 4096, 903], [4096, 4096, 17], [4096, 2048, 1], [700, 300]]
    users = [[rng.choice(5000, size, p=weights / weights.sum()) for size in blocks] for blocks in sizes]
    order, late, parts = make_order(sizes, share, 3), np.zeros(0, np.int64), []
    for unit in islice(order.units_from(0), 12):
        pieces = order.pieces(unit)
        user = np.concatenate([users[p.shard][p.block][p.start : p.stop] for _, p in pieces])
        stream, cycle = (
            np.concatenate([np.full(p.stop - p.start, v(s, p)) for s, p in pieces])
            for v in (lambda s, p: s, lambda s, p: p.cycle)
        )
        arranged, late = order.arrange(unit, user, stream, cycle, late)
        parts.append(user[arranged])
    sequence_of_users = np.concatenate(parts)
    distinct = [
        len(np.unique(sequence_of_users[start : start + 256]))
        for start in range(0, len(sequence_of_users) - 256, 19)
    ]
    shuffled = rng.permutation(sequence_of_users)
    assert min(distinct) >= fewest_wanted and np.mean(distinct) >= mean_wanted
    assert np.mean([len(np.unique(shuffled[start : start + 256])) for start in range(0, 20_000, 256)]) < 248
