"""UniSAR's pickled tables → files that hold no pickle. A program of its own, which `unisar.py` starts:

    python -m data_shards.sources.unisar_tables RAW OUT      prints {"error": …} or {facts for unisar.py}

OUT/clicks.parquet     every click of the users' lists: user_id, item_id, time, task, query, and where it
                       stands: position (in the list of clicks or of sessions), place (in its session)
OUT/stored.parquet     every row of dataset/: the same columns, split, number (of its row among those of its
                       split), and how much of both lists is its history: rec_count, src_count
OUT/items.parquet      item_id, words, category, path
OUT/negatives_{valid,test}.npy   int64 [rows of the split, negatives], row `number`
"""

import json
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.categories import PATH_MARK
from data_shards.errors import DataError, write_fix
from data_shards.pickled import read_pickle
from data_shards.schema import REC, SPLITS, SRC
from data_shards.sources import EARLIEST_MS, LATEST_MS

FILES = {"train": "train", "valid": "val", "test": "test"}  # split → as dataset/rec_*.pkl names it
TASK_NAMES = {REC: "rec", SRC: "src"}
TIME_COLUMNS = ("timestamp", "ts")
QUERY_WORDS = 50  # of a query, in its table of sessions; longer ones are cut to match it
NO_WORDS = [0]  # a query without a word: 0 is its padding
LEVELS = ("first_level_category_id", "second_level_category_id")
WORD_LIST = re.compile(r"[\s\[\],0-9]*")
Columns = dict[str, np.ndarray]


def convert(raw: Path, out: Path) -> dict[str, Any]:
    """RAW/dataset and RAW/vocab → the files above. → width of the negatives, and notes for the manifest.
    Raises DataError naming file, column and row."""
    sessions = _Sessions(raw / "vocab" / "src_session_vocab_np.pkl")
    clicks = _listed_clicks(raw / "vocab" / "user_vocab.pkl", sessions)
    stored, negatives = _stored_rows(raw / "dataset")
    unit = _to_ms(clicks, stored)
    seen = [clicks["item_id"], stored["item_id"], *(items.reshape(-1) for items in negatives.values())]
    num_items = _write_items(raw / "vocab" / "item_vocab_np.pkl", max(int(ids.max()) for ids in seen), out)
    for name, columns in (("clicks", clicks), ("stored", stored)):
        pq.write_table(pa.table(columns), out / f"{name}.parquet")
    for split, items in negatives.items():
        np.save(out / f"negatives_{split}.npy", items)
    return {
        "num_negatives": negatives["test"].shape[1],
        "notes": {"time_unit": unit, "listed_items": num_items, "stored_rows": len(stored["user_id"])},
    }


# ---- the users' lists --------------------------------------------------------------------------------------


class _Sessions:
    """vocab/src_session_vocab_np.pkl: keyword [sessions, words] and pos_items [sessions, clicks], padded with
    0; session 0 is padding."""

    def __init__(self, path: Path) -> None:
        self.path, table = path, _dict(path)
        self.items = _matrix(path, table, "pos_items")
        words = _matrix(path, table, "keyword")
        if len(self.items) != len(words):
            raise DataError(f"{path}: {len(words)} rows of keyword and {len(self.items)} of pos_items")
        self.queries = np.array([_query_text(row) for row in words.tolist()], object)

    def clicks(self, ids: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """→ of all clicks of these sessions: row of `ids`, place in the session, item."""
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self.items)):
            wrong = ids[(ids < 0) | (ids >= len(self.items))][0]
            raise DataError(f"{where}: session {wrong} is not among the {len(self.items)} of {self.path}")
        items = self.items[ids]
        row, place = np.nonzero(items)
        return row, place, items[row, place]


def _listed_clicks(path: Path, sessions: _Sessions) -> Columns:
    parts: dict[str, list[np.ndarray]] = {
        name: [] for name in ("user_id", "item_id", "time", "task", "query", "position", "place")
    }

    def add(task: int, user: int, row: np.ndarray, item: np.ndarray, time: np.ndarray, **more: Any) -> None:
        values = {
            "user_id": np.full(len(item), user, np.int64),
            "item_id": item,
            "time": time,
            "task": np.full(len(item), task, np.int8),
            "position": row.astype(np.int32),
            "query": np.full(len(item), None, object),
            "place": np.zeros(len(item), np.int32),
            **more,
        }
        for name, values_of in values.items():
            parts[name].append(values_of)

    for user, lists in _dict(path).items():
        where = f"{path}:user {user!r:.40}"
        number = int(_integers([user], where, "user")[0])
        if not isinstance(lists, dict):
            raise DataError(f"{where}: must be a dict of lists, got {type(lists).__name__}")
        items, times = _timed(lists, "rec_his", where)
        real = np.flatnonzero(items)
        add(REC, number, real, items[real], times[real])
        ids, times = _timed(lists, "src_session_his", where)
        row, place, items = sessions.clicks(ids, where)
        asked = sessions.queries[ids[row]]
        add(SRC, number, row, items, times[row], query=asked, place=place.astype(np.int32))
    if not parts["user_id"]:
        raise DataError(f"{path}: holds no user")
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _timed(lists: dict[str, Any], name: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """One list of a user and its times."""
    for key in (name, f"{name}_ts"):
        if key not in lists:
            raise DataError(f"{where}: {key} is missing. Found: {', '.join(map(str, lists))}.")
    ids = _integers(lists[name], where, name)
    times = _times(lists[f"{name}_ts"], where, f"{name}_ts")
    if len(ids) != len(times):
        raise DataError(f"{where}: {len(ids)} entries in {name}, {len(times)} in {name}_ts")
    return ids, times


# ---- dataset/ ----------------------------------------------------------------------------------------------


def _stored_rows(folder: Path) -> tuple[Columns, dict[str, np.ndarray]]:
    """→ columns of stored.parquet, and the negatives of valid and test."""
    parts: list[Columns] = []
    negatives: dict[str, np.ndarray] = {}
    for code, split in enumerate(SPLITS):
        done, of_split = 0, []
        for task, name in TASK_NAMES.items():
            path = folder / f"{name}_{FILES[split]}.pkl"
            frame = read_pickle(path)
            columns = _stored_columns(path, frame, task)
            rows = len(columns["user_id"])
            columns["split"] = np.full(rows, code, np.int8)
            columns["number"] = np.arange(done, done + rows)
            done += rows
            parts.append(columns)
            if split != "train" and rows:
                of_split.append((path, _negatives(path, frame["neg_items"])))
        if split != "train":
            negatives[split] = _one_width(of_split, folder, split)
    if _width(negatives["valid"]) != _width(negatives["test"]):
        raise DataError(
            f"{folder}: {_width(negatives['valid'])} negatives of a validation event, "
            f"{_width(negatives['test'])} of a test event. They must be as many."
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, negatives


def _stored_columns(path: Path, frame: Any, task: int) -> Columns:
    times = next((name for name in TIME_COLUMNS if isinstance(frame, dict) and name in frame), "timestamp")
    wanted = ["user_id", "item_id", times, "rec_his", "src_session_his", "neg_items"]
    wanted += ["keyword"] if task == SRC else []
    if not isinstance(frame, dict) or not all(isinstance(column, np.ndarray) for column in frame.values()):
        raise DataError(f"{path}: must be a data frame, got {type(frame).__name__}")
    if missing := [name for name in wanted if name not in frame]:
        raise DataError(f"{path}: column {missing[0]} is missing. Found: {', '.join(map(str, frame))}.")
    query = [_query_text(_words(value, path, row)) for row, value in enumerate(frame["keyword"])] \
        if task == SRC else [None] * len(frame["user_id"])  # fmt: skip
    columns = {name: _integers(frame[name], str(path), name) for name in ("user_id", "item_id")}
    if len(columns["item_id"]) and columns["item_id"].min() < 1:
        row = int(columns["item_id"].argmin())
        raise DataError(f"{path}:item_id:row {row}: item {columns['item_id'][row]}; items begin at 1")
    return {
        **columns,
        "time": _times(frame[times], str(path), times),
        "task": np.full(len(query), task, np.int8),
        "query": np.array(query, object),
        "rec_count": _integers(frame["rec_his"], str(path), "rec_his").astype(np.int32),
        "src_count": _integers(frame["src_session_his"], str(path), "src_session_his").astype(np.int32),
    }


def _negatives(path: Path, column: np.ndarray) -> np.ndarray:
    """[rows, negatives] int64."""
    lists = (list, tuple, np.ndarray)
    lengths = np.array([len(items) if isinstance(items, lists) else -1 for items in column])
    if (lengths < 0).any():
        row = int(lengths.argmin())
        raise DataError(f"{path}:neg_items:row {row}: must be a list of items, got {column[row]!r:.80}")
    if (lengths != lengths[0]).any():
        row = int(np.flatnonzero(lengths != lengths[0])[0])
        raise DataError(f"{path}:neg_items:row {row}: {lengths[row]} items where row 0 has {lengths[0]}")
    flat = np.asarray(list(chain.from_iterable(np.asarray(items).tolist() for items in column)))
    items = _integers(flat, str(path), "neg_items").reshape(len(column), -1)
    if items.size and items.min() < 1:
        row = int(np.flatnonzero((items < 1).any(axis=1))[0])
        raise DataError(f"{path}:neg_items:row {row}: item {items[row].min()}; items begin at 1")
    return items


def _one_width(parts: list[tuple[Path, np.ndarray]], folder: Path, split: str) -> np.ndarray:
    """The negatives of both tasks, below each other."""
    if not parts:
        raise DataError(f"{folder}: rec_{FILES[split]}.pkl and src_{FILES[split]}.pkl have no row")
    if len({_width(items) for _, items in parts}) > 1:
        found = ", ".join(f"{_width(items)} in {path.name}" for path, items in parts)
        raise DataError(f"{folder}: both tasks must store as many negatives; found {found}")
    return np.concatenate([items for _, items in parts])


def _width(items: np.ndarray) -> int:
    return int(items.shape[1])


# ---- items -------------------------------------------------------------------------------------------------


def _write_items(path: Path, largest: int, out: Path) -> int:
    """items.parquet: items 1 … N, of which N is the number of the table's rows or the `largest` id seen.
    → N."""
    table = {name: column for name, column in _dict(path).items() if isinstance(column, np.ndarray)}
    lengths = {len(column) for column in table.values()}
    if len(lengths) > 1:
        raise DataError(f"{path}: columns of different lengths: {sorted(lengths)}")
    rows = max(lengths, default=0)
    num_items = max(rows - 1, largest)
    captions = _rows(path, table, "caption", rows)
    levels = [_rows(path, table, name, rows) for name in LEVELS]
    words, paths = [], []
    for _ in range(num_items):
        caption = [word for word in next(captions, []) if word]
        words.append(" ".join(map(str, caption)) or None)
        path_of = [str(level[0]) for level in (next(levels_of, []) for levels_of in levels) if any(level)]
        paths.append(path_of)
    ids = np.arange(1, num_items + 1)
    category = [" > ".join(names) or None for names in paths]
    pq.write_table(
        pa.table(
            {
                "item_id": ids,
                "words": pa.array(words, pa.string()),
                "category": pa.array(category, pa.string()),
                "path": pa.array([PATH_MARK.join(names) or None for names in paths], pa.string()),
            }
        ),
        out / "items.parquet",
    )
    return num_items


def _rows(path: Path, table: Columns, name: str, rows: int) -> Iterator[list[int]]:
    """The rows of a column from row 1 on (0 is padding), as lists."""
    if name not in table:
        return iter(())
    matrix = _integers(table[name].reshape(-1), str(path), name).reshape(rows, -1)
    return iter(matrix[1:].tolist())


# ---- values ------------------------------------------------------------------------------------------------


def _dict(path: Path) -> dict[Any, Any]:
    value = read_pickle(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: must be a dict, got {type(value).__name__}")
    return value


def _matrix(path: Path, table: dict[Any, Any], name: str) -> np.ndarray:
    if name not in table:
        raise DataError(f"{path}: {name} is missing. Found: {', '.join(map(str, table))}.")
    values = np.asarray(table[name])
    if values.ndim != 2 or not len(values):
        raise DataError(f"{path}: {name} must be an array [sessions, …], got one of shape {values.shape}")
    return _integers(values.reshape(-1), str(path), name).reshape(values.shape)


def _integers(values: Any, where: str, name: str) -> np.ndarray:
    """int64 [n] of integers in any writing. Raises DataError naming the first row that holds none."""
    array = np.asarray(values)
    if array.ndim == 1 and array.dtype.kind == "O":
        array = np.asarray(array.tolist())
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim == 1 and array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.ndim == 1 and array.dtype.kind == "f":
        wrong = ~np.isfinite(array) | (array != np.trunc(array)) | (np.abs(array) > 2**53)
        if not wrong.any():
            return array.astype(np.int64)
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{where}:{name}:row {row}: must be an integer, got {array[row]}")
    raise DataError(f"{where}:{name}: must hold integers, got {array.dtype} of shape {array.shape}")


def _times(values: Any, where: str, name: str) -> np.ndarray:
    """float64 [n]."""
    array = np.asarray(values)
    if array.dtype.kind == "O":
        array = np.asarray(array.tolist())
    if array.size == 0:
        return np.zeros(0)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise DataError(f"{where}:{name}: must hold numbers, got {array.dtype} of shape {array.shape}")
    wrong = ~np.isfinite(array) | (array < 0)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{where}:{name}:row {row}: must be a time, got {array[row]}")
    return array.astype(np.float64)


def _to_ms(*tables: Columns) -> str:
    """Turn column time of all tables into ms since 1970, int64. Seconds are told by their size. → the unit
    found."""
    latest = max(float(table["time"].max(initial=0)) for table in tables)
    unit = 1000 if latest < EARLIEST_MS else 1
    if latest * unit >= LATEST_MS:
        raise DataError(f"times reach {latest:.0f}: they must be ms or seconds since 1970, before 2100")
    for table in tables:
        table["time"] = np.rint(table["time"] * unit).astype(np.int64)
    return "s" if unit == 1000 else "ms"


def _words(value: Any, path: Path, row: int) -> list[int]:
    """The words of a query: a list, its text, or one word."""
    if isinstance(value, str) and WORD_LIST.fullmatch(value):
        return [int(word) for word in re.findall("[0-9]+", value)]
    words = value.tolist() if isinstance(value, np.ndarray) else value
    words = [words] if isinstance(words, int) else words
    if not isinstance(words, list | tuple) or not all(type(word) is int and word >= 0 for word in words):
        raise DataError(f"{path}:keyword:row {row}: must be a list of integers, got {value!r:.80}")
    return list(words)


def _query_text(words: list[int]) -> str:
    """One writing of a query: its first words, without padding."""
    return str([word for word in words[:QUERY_WORDS] if word] or NO_WORDS)


def main() -> int:
    raw, out = (Path(word) for word in sys.argv[1:3])
    try:
        answer = convert(raw, out)
    except DataError as error:
        answer = {"error": str(error)}
    except (OSError, MemoryError) as error:
        reason = str(error) or "memory is too small"
        fix = write_fix(error, "Free space or memory")
        answer = {"error": f"writing {out} failed: {reason}. {fix}, then run the same command again."}
    sys.stdout.write(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
