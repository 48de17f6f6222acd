"""Filters, splits, windows and negatives alone, against loops."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.errors import DataError
from data_shards.filters import keep_users_and_items
from data_shards.histories import first_of_runs, in_histories, ragged_rows, windows
from data_shards.negatives import draw_negatives, user_item_keys
from data_shards.split import day_boundaries, split_by_time, split_leave_one_out
from data_shards.work import user_chunks

HOUR, DAY = 3_600_000, 86_400_000


def naive_core(clicks: list[tuple[int, int, int]], minimum: int, both: bool) -> list[tuple[int, int, int]]:
    while True:
        users, items = Counter(u for u, _, _ in clicks), Counter(i for _, i, _ in clicks)
        tasks = {user: {t for u, _, t in clicks if u == user} for user in users}
        left = [
            c
            for c in clicks
            if users[c[0]] >= minimum and items[c[1]] >= minimum and (not both or len(tasks[c[0]]) == 2)
        ]
        if left == clicks:
            return left
        clicks = left


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 1)), min_size=1, max_size=60),
    st.integers(1, 4),
    st.booleans(),
)
def test_the_core_is_that_of_a_loop(clicks: list[tuple[int, int, int]], minimum: int, both: bool) -> None:
    user, item, task = (np.array(column, np.int32) for column in zip(*clicks, strict=True))
    keep_user, keep_item, _ = keep_users_and_items(user, item, task, 6, 7, minimum, both, repeat=True)
    expected = naive_core(clicks, minimum, both)
    assert [c for c in clicks if keep_user[c[0]] and keep_item[c[1]]] == expected
    assert set(np.flatnonzero(keep_user)) == {user for user, _, _ in expected}
    assert set(np.flatnonzero(keep_item)) == {item for _, item, _ in expected}


def test_without_repeating_the_filter_runs_once() -> None:
    # item 1 has two clicks, one of them by user 1, who leaves: repeated filtering would drop item 1 next
    user, item, task = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), np.zeros(4, np.int8)
    keep_user, keep_item, removed = keep_users_and_items(
        user, item, task, 2, 2, 2, both_behaviours=False, repeat=False
    )
    assert (keep_user.tolist(), keep_item.tolist()) == ([True, False], [True, True])
    assert [step["round"] for step in removed] == [1]
    assert keep_users_and_items(user, item, task, 2, 2, 2, False, True)[1].tolist() == [True, False]


def test_minimum_zero_keeps_items_without_clicks() -> None:
    _, keep_item, _ = keep_users_and_items(np.array([0]), np.array([1]), np.array([0]), 1, 3, 0, False, True)
    assert keep_item.all()


sorted_rows = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 3), st.integers(0, 1)),
    min_size=1,
    max_size=50,
)


@settings(max_examples=60, deadline=None)
@given(sorted_rows, st.integers(1, 5))
def test_windows_are_those_of_a_loop(rows: list[tuple[int, int, int, int]], history_max: int) -> None:
    rows = sorted(rows, key=lambda row: row[:2])
    user, time, item, task = (np.array(column) for column in zip(*rows, strict=True))
    keep = in_histories(user, time, item, task)
    flat = [(u, t, i, k) for (u, t, i, k), kept in zip(rows, keep, strict=True) if kept]
    assert {row[:3] for row in flat} == {row[:3] for row in rows}, "every click is there"
    assert len({row[:3] for row in flat}) == len(flat), "once"
    assert all(k == max(row[3] for row in rows if row[:3] == (u, t, i)) for u, t, i, k in flat), (
        "as a search if it was one"
    )
    start, count = windows(user, time, keep, history_max)
    for row, first, number in zip(rows, start, count, strict=True):
        before = [other for other in flat if other[0] == row[0] and other[1] < row[1]]
        assert flat[first : first + number] == before[-history_max:]


@settings(max_examples=60, deadline=None)
@given(sorted_rows)
def test_leave_one_out_is_that_of_a_loop(rows: list[tuple[int, int, int, int]]) -> None:
    rows = sorted(rows)
    user, time = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    for u, t, code in zip(user, time, split_leave_one_out(user, time), strict=True):
        times = sorted(set(time[user == u]))
        assert code == (0 if len(times) < 3 or t < times[-2] else 1 if t == times[-2] else 2)


def test_days_end_with_the_last_click_and_begin_at_midnight_of_the_offset() -> None:
    last = 20_000 * DAY + 5 * HOUR  # 05:00 UTC
    assert day_boundaries(last, test_days=1, valid_days=1, utc_offset_hours=0) == (19_999 * DAY, 20_000 * DAY)
    assert day_boundaries(last, test_days=1, valid_days=2, utc_offset_hours=8) == (
        19_998 * DAY - 8 * HOUR,
        20_000 * DAY - 8 * HOUR,
    )
    assert day_boundaries(last, 1, 1, -8)[1] == 19_999 * DAY + 8 * HOUR, "21:00 of the day before"
    times = np.array([19_998 * DAY, 19_999 * DAY, 20_000 * DAY - 1, 20_000 * DAY])
    assert split_by_time(times, (19_999 * DAY, 20_000 * DAY)).tolist() == [0, 1, 1, 2]


def test_ragged_rows_and_chunks() -> None:
    assert ragged_rows(np.array([5, 0, 2]), np.array([2, 0, 3])).tolist() == [5, 6, 2, 3, 4]
    user = np.array([0, 0, 0, 1, 2, 2, 3])
    starts = np.flatnonzero(first_of_runs(user))
    for rows in range(1, 9):
        bounds = list(user_chunks(user, rows))
        assert [row for start, stop in bounds for row in range(start, stop)] == list(range(7))
        assert all(start in starts for start, _ in bounds), "users are never cut"


@pytest.mark.parametrize(
    ("num_items", "clicked", "negatives"), [(1000, 20, 99), (130, 30, 99), (110, 11, 99)]
)
def test_negatives_are_unique_and_never_clicked(num_items: int, clicked: int, negatives: int) -> None:
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(5), clicked)
    item = np.concatenate([rng.permutation(num_items)[:clicked] for _ in range(5)])
    taken = user_item_keys(user, item, num_items)
    event_id = np.arange(40) + 1000
    event_user = np.arange(40) % 5
    drawn = draw_negatives(event_id, event_user, taken, num_items, negatives, seed=3)
    for row, of_user in zip(drawn, event_user, strict=True):
        assert len(set(row)) == negatives
        assert not set(row) & set(item[user == of_user])
        assert row.min() >= 0
        assert row.max() < num_items
    alone = draw_negatives(event_id[7:9], event_user[7:9], taken, num_items, negatives, seed=3)
    np.testing.assert_array_equal(alone, drawn[7:9], "an event's negatives do not depend on the others")
    assert (draw_negatives(event_id, event_user, taken, num_items, negatives, seed=4) != drawn).any()


def test_negatives_are_uniform_over_free_items() -> None:
    taken = user_item_keys(np.zeros(10, int), np.arange(10), 60)
    drawn = draw_negatives(np.arange(4000), np.zeros(4000, int), taken, 60, 10, seed=0)
    counts = np.bincount(drawn.ravel(), minlength=60)
    assert counts[:10].sum() == 0
    assert abs(counts[10:] / 800 - 1).max() < 0.2  # 800 expected, standard deviation about 25


def test_too_few_possible_negatives_say_how_many_there_are() -> None:
    taken = user_item_keys(np.zeros(60, int), np.arange(60), 100)
    with pytest.raises(DataError, match="num_negatives=40"):
        draw_negatives(np.array([1]), np.array([0]), taken, 100, 99, seed=0)
