"""Exact and elastic resume: the events of each global step do not depend on ranks, workers, accumulation,
kills or how shards are cut."""

import functools
import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_shards.schema import read_manifest
from tests.tiny_folder import make_tiny_folder
from trainer.config import DataConfig
from trainer.data import TrainStream, prefetched
from trainer.data import order as order_module
from trainer.data.folder import PreparedFolder

GLOBAL_BATCH, STEPS = 24, 14  # 24 = the least that 1, 2, 3, 4 and 8 ranks divide
RANKS = st.sampled_from([1, 2, 3, 4, 8])
# 1 to 5 shards, blocks complete, ragged, empty or of one event; 96 to 131 events: 14 steps are about three
# epochs
LAYOUTS = st.sampled_from(
    [
        ((96,),),
        ((40, 40), (16,)),
        ((32,), (32,), (32,)),
        ((50, 1, 0, 49), (17,)),
        ((7, 30), (30,), (1,), (33, 30), (0,)),
    ]
)
SHARES = st.sampled_from([0.0, 0.0, 0.5, 0.25])


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several units an epoch, as real folders have; worker processes are forks, and inherit it."""
    monkeypatch.setattr(order_module, "UNIT_EVENTS", 30)


@functools.cache
def folder_of(layout: tuple[tuple[int, ...], ...]) -> tuple[tempfile.TemporaryDirectory[str], Path]:
    home = tempfile.TemporaryDirectory(prefix="gensr-test-")
    return home, make_tiny_folder(Path(home.name), train_blocks=layout, num_valid=2)


def steps(
    layout: tuple[tuple[int, ...], ...],
    share: float,
    num_steps: int,
    start_step: int = 0,
    ranks: int = 1,
    accumulation: int = 1,
    workers: int = 0,
) -> list[list[int]]:
    """Event ids of each global step, all ranks together, in position order."""
    folder = folder_of(layout)[1]
    _manifest, config = read_manifest(folder), DataConfig(history_max=4, num_negatives=2, search_share=share)
    micro = GLOBAL_BATCH // (ranks * accumulation)
    result: list[list[list[int]]] = [[[]] * (ranks * accumulation) for _ in range(num_steps)]
    for rank in range(ranks):
        stream = TrainStream(
            PreparedFolder.at(folder),
            config,
            5,
            GLOBAL_BATCH,
            micro,
            rank,
            ranks,
            start_event=start_step * GLOBAL_BATCH,
        )
        source = prefetched(stream, workers) if workers else iter(stream)
        batches = list(itertools.islice(source, num_steps * accumulation))
        # every rank takes the same number of equal steps
        assert all(batch.num_events == micro for batch in batches)
        for number, batch in enumerate(batches):
            result[number // accumulation][number % accumulation * ranks + rank] = batch.event_id.tolist()
    return [list(itertools.chain(*step)) for step in result]


undisturbed = functools.cache(lambda layout, share: steps(layout, share, STEPS))
SETTINGS = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SETTINGS
@given(layout=LAYOUTS, share=SHARES)
def test_every_event_once_an_epoch(layout: tuple[tuple[int, ...], ...], share: float) -> None:
    """Of both tasks together, or of each task in its own cycles when they are mixed."""
    events = list(itertools.chain(*undisturbed(layout, share)))
    every = range(sum(map(sum, layout)))
    is_search = {event: number % 2 == 1 for event, number in _places(layout).items()}
    groups = (
        [every] if share == 0 else [[e for e in every if is_search[e] == wanted] for wanted in (False, True)]
    )
    for group in groups:
        mine = [event for event in events if event in set(group)]
        cycles = [
            mine[start : start + len(group)] for start in range(0, len(mine) - len(group) + 1, len(group))
        ]
        assert cycles and all(sorted(cycle) == sorted(group) for cycle in cycles)
        assert len(set(mine[len(cycles) * len(group) :])) == len(mine) % len(group)


def _places(layout: tuple[tuple[int, ...], ...]) -> dict[int, int]:
    """Row in its block of each event id: make_tiny_folder's tasks alternate in a block."""
    sizes = list(itertools.chain(*layout))
    return {sum(sizes[:block]) + row: row for block, size in enumerate(sizes) for row in range(size)}


@SETTINGS
@given(
    layout=LAYOUTS,
    share=SHARES,
    lives=st.lists(st.tuples(RANKS, st.sampled_from([1, 3]), st.integers(1, 6)), min_size=1, max_size=4),
)
def test_kills_and_other_numbers_of_ranks_leave_the_sequence_as_it_is(
    layout: tuple[tuple[int, ...], ...], share: float, lives: list[tuple[int, int, int]]
) -> None:
    """Each life of the run takes some steps with its own ranks and accumulation, then is killed."""
    done: list[list[int]] = []
    for ranks, accumulation, num_steps in lives:
        if GLOBAL_BATCH % (ranks * accumulation):
            accumulation = 1
        num_steps = min(num_steps, STEPS - len(done))
        done += steps(layout, share, num_steps, len(done), ranks, accumulation)
    assert done == undisturbed(layout, share)[: len(done)]


@settings(SETTINGS, max_examples=3)
@given(
    layout=LAYOUTS,
    share=SHARES,
    ranks=st.sampled_from([1, 2]),
    workers=st.sampled_from([1, 2, 3]),
    start=st.integers(0, 8),
)
def test_workers_leave_the_sequence_as_it_is(
    layout: tuple[tuple[int, ...], ...], share: float, ranks: int, workers: int, start: int
) -> None:
    """Real worker processes of a DataLoader."""
    assert steps(layout, share, 4, start, ranks, 2, workers) == undisturbed(layout, share)[start : start + 4]
