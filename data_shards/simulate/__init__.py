"""Logs from a planted preference model, in bounded memory: anonymised in KuaiSAR's exact CSV schema, or in
natural words.

    world.py      what items are, what users like         → 20 bytes an item stay in memory
    behaviour.py  what a range of users does              → draws are hashes: any range gives the same rows
    csv_tables.py text=anonymised: rows of KuaiSAR's five CSV files
    natural.py    text=natural: rows of events.csv and items.csv, in the words of lexicon.py and grammar.yaml
    oracle.py     the best possible scores, for checks; never written
    simulated.py  simulated.json: the arguments, from which the same world can be made again

The bytes depend on the arguments only (on one kind of CPU: exp and log may differ in the last bit elsewhere).
"""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np

from data_shards.errors import ConfigError, DataError, write_fix
from data_shards.progress import StageProgress, silent_stage
from data_shards.simulate import behaviour, csv_tables, natural
from data_shards.simulate.simulated import Simulated
from data_shards.simulate.world import World, make_world

ROWS_PER_DAY = 24.0  # shown items of both services a user and day; KuaiSAR has about 40
CHUNK_ROWS = 150_000  # rows made at once: bounds memory, changes nothing else
ITEM_CHUNK = 1 << 16
FORMS = {"anonymised": csv_tables, "natural": natural}


def simulate(
    out: str | Path,
    users: int = 1000,
    items: int = 4000,
    days: int = 14,
    seed: int = 0,
    progress: StageProgress = silent_stage,
    rows_per_day: float = ROWS_PER_DAY,
    chunk_users: int = 0,
    text: str = "anonymised",
) -> dict[str, int]:
    """Write the logs and simulated.json into the new folder `out`; returns the rows of each CSV file.

    text: "anonymised" writes KuaiSAR's five files, for `gensr prepare kuaisar`; "natural" writes events.csv
    and items.csv of the same clicks with titles, queries and categories in words, for `gensr prepare tables`.
    `rows_per_day` is the mean number of impressions of a user and day; KuaiSAR's size is users=25_877,
    items=6_890_707, days=19, rows_per_day=40. `chunk_users` users are held at once (0 = by their rows) and
    change no byte. `progress(what, done, total)` is called as parts finish. Raises ConfigError for sizes that
    make no world, DataError when `out` exists or cannot be written. `out` appears complete or not at all.
    """
    _check_arguments(users, items, days, rows_per_day, text)
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists already. Choose another folder, or delete this one first.")
    temporary = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        progress("world", 0, items)
        world = make_world(users, items, days, seed)
        progress("world", items, items)
        counts = _write_all(temporary, world, progress, rows_per_day, chunk_users, FORMS[text])
        Simulated(users, items, days, seed, rows_per_day, text).write(temporary)
        os.rename(temporary, out)
    except OSError as error:
        raise DataError(
            f"cannot write {out}: {error}. Nothing was left behind. {write_fix(error, 'Check the path')}."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def _check_arguments(users: int, items: int, days: int, rows_per_day: float, text: str) -> None:
    if text not in FORMS:
        raise ConfigError(f"text must be {' or '.join(FORMS)}, got {text!r}. Nothing was written.")
    limits = [
        ("users", users, 2, 50_000_000),
        ("items", items, 200, natural.MAX_ITEMS if text == "natural" else 200_000_000),
        ("days", days, 3, 3650),
        ("rows_per_day", rows_per_day, 0.1, 160),
    ]
    problems = [
        f"{name} must be between {low:,} and {high:,} (text={text}), got {value:,}"
        for name, value, low, high in limits
        if not low <= value <= high
    ]
    if problems:
        raise ConfigError("; ".join(problems) + ". Nothing was written.")


def _write_all(
    folder: Path,
    world: World,
    progress: StageProgress,
    rows_per_day: float,
    chunk_users: int,
    form: ModuleType,
) -> dict[str, int]:
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {
            name: stack.enter_context(open(folder / name, "wb")) for name in form.HEADERS
        }
        for name, file in files.items():
            csv_tables.write_header(file, form.HEADERS[name])
        counts = _write_items(files[form.ITEMS_FILE], world, progress, form)
        counts |= _write_users(files, world, progress, rows_per_day, chunk_users, form)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return counts


def _write_items(file: BinaryIO, world: World, progress: StageProgress, form: ModuleType) -> dict[str, int]:
    """In the order of public ids, so that the file's order tells nothing about topics."""
    internal = np.empty(world.num_items, np.int32)
    internal[world.public_item - 1] = np.arange(world.num_items, dtype=np.int32)
    rows = 0
    for start in range(0, world.num_items, ITEM_CHUNK):
        items = internal[start : start + ITEM_CHUNK].astype(np.int64)
        items = items[world.has_features(items)]
        csv_tables.write_rows(file, form.item_columns(world, items))
        rows += len(items)
        progress("items", min(start + ITEM_CHUNK, world.num_items), world.num_items)
    return {form.ITEMS_FILE: rows}


def _write_users(
    files: dict[str, BinaryIO],
    world: World,
    progress: StageProgress,
    rows_per_day: float,
    chunk_users: int,
    form: ModuleType,
) -> dict[str, int]:
    all_ids = csv_tables.user_ids(world)
    chunk_users = chunk_users or max(1, int(CHUNK_ROWS / (rows_per_day * world.days)))
    counts = {name: 0 for name in files if name != form.ITEMS_FILE}
    next_session = 1
    for start in range(0, world.num_users, chunk_users):
        stop = min(start + chunk_users, world.num_users)
        log = behaviour.make_log(world, start, stop, rows_per_day)
        rows = form.log_columns(world, log, all_ids[start:stop], all_ids, next_session)
        for name, table in rows.items():
            csv_tables.write_rows(files[name], table)
            counts[name] += len(table[0])
        next_session += len(log.searches.key)
        progress("users", stop, world.num_users)
    return counts
