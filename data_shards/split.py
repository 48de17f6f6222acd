"""Which events are training, validation and test. Codes are positions in schema.SPLITS."""

import datetime
from typing import Any

import numpy as np

from data_shards.errors import DataError

TRAIN, VALID, TEST = 0, 1, 2
HISTORY_ONLY = -1  # a click that is in histories, and no event of any split (split=stored)
DAY_MS = 86_400_000


def day_boundaries(last_time: int, test_days: int, valid_days: int, utc_offset_hours: int) -> tuple[int, int]:
    """(first ms of validation, first ms of test): whole days that end with the day of `last_time`, midnight
    at the given offset from UTC."""
    offset = utc_offset_hours * 3_600_000
    last_day = (last_time + offset) // DAY_MS
    test_start = (last_day - test_days + 1) * DAY_MS - offset
    return test_start - valid_days * DAY_MS, test_start


def split_by_time(time: np.ndarray, boundaries: tuple[int, int]) -> np.ndarray:
    """Split code of each event, int8."""
    valid_start, test_start = boundaries
    return ((time >= valid_start).astype(np.int8) + (time >= test_start)).astype(np.int8)


def split_leave_one_out(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Rows sorted by (user, time), whole users → split codes, int8: a user's last distinct time is test, the
    one before validation.

    Users with fewer than three distinct times only train.
    """
    if len(user) == 0:
        return np.zeros(0, np.int8)
    new_user = np.ones(len(user), bool)
    new_user[1:] = user[1:] != user[:-1]
    new_time = new_user.copy()
    new_time[1:] |= time[1:] != time[:-1]
    time_group = np.cumsum(new_time) - 1
    user_group = np.cumsum(new_user) - 1
    first = time_group[new_user]  # of each user, its first and its last group of one time
    last = np.append(first[1:], time_group[-1] + 1) - 1
    from_end = last[user_group] - time_group
    long_enough = (last - first)[user_group] >= 2
    split = np.where(from_end == 0, TEST, np.where(from_end == 1, VALID, TRAIN))
    return np.where(long_enough, split, TRAIN).astype(np.int8)


def describe_boundaries(boundaries: tuple[int, int]) -> dict[str, Any]:
    return {
        name: {"ms": value, "utc": iso(value)}
        for name, value in zip(("valid_from", "test_from"), boundaries, strict=True)
    }


def iso(time_ms: int) -> str:
    moment = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc) + datetime.timedelta(
        milliseconds=int(time_ms)
    )
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def check_split(counts: dict[str, int], rule: str, hint: str = "", appends: bool = False) -> None:
    """Raises DataError when a split is empty. hint: what may have caused it. appends: the log goes on
    from a prepared folder."""
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        if rule == "stored":
            raise DataError(f"the {' and '.join(empty)} split has no event ({counts}): its files are empty.")
        fix = "users need three clicks at different times"
        if rule == "time":
            instead = "use split=leave_one_out"
            if appends:
                instead = "after a day without clicks append those of two days at once, in one folder"
            fix = (
                "clicks are needed on the last test_days days, on the valid_days before them, and before "
                f"those. Remove clicks with a wrong date, or {instead}"
            )
        told = f" {hint}:" if hint else ""
        raise DataError(f"the {' and '.join(empty)} split has no event ({counts}).{told} {fix}.")
