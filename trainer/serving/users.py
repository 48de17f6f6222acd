"""Who clicked what, when, in a prepared folder: histories by user id, and what a user had seen before an
event. And histories given as a file."""

import itertools
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.histories import in_histories
from data_shards.schema import NO_QUERY, SPLITS, TASKS, read_manifest
from trainer.data.folder import PreparedFolder
from trainer.errors import DataError, RequestError
from trainer.serving.requests import id_text

MAX_EXAMPLES = 100  # queries


@dataclass(frozen=True)
class ClickLog:
    """Every event of a prepared folder, all splits, by user and time; [n] int64 each, rows of the catalogue
    tables."""

    event_id: np.ndarray
    user: np.ndarray
    item: np.ndarray
    task: np.ndarray
    query: np.ndarray
    time: np.ndarray

    def before(self, event_id: int) -> np.ndarray:
        """Items that the event's user had clicked strictly earlier, in either task, with repetitions."""
        place = int(np.searchsorted(self.event_id, event_id))
        assert self.event_id[place] == event_id, event_id
        first = int(np.searchsorted(self.user, self.user[place]))
        return self.item[first : first + int(np.searchsorted(self.time[first : place + 1], self.time[place]))]


def read_clicks(folder: PreparedFolder) -> ClickLog:
    names = list(ClickLog.__dataclass_fields__)
    parts = [folder.columns(split, names) for split in SPLITS]
    columns = {name: np.concatenate([part[name] for part in parts]).astype(np.int64) for name in names}
    order = np.argsort(columns["event_id"], kind="stable")  # by user, then time
    return ClickLog(**{name: column[order] for name, column in columns.items()})


class Users:
    """Every user's clicks in a prepared folder, all splits. Read when first asked for: 16 bytes a click.

    reason: why their histories are not known; "" where they are (see NoUsers). are_read: whether somebody has
    asked.
    """

    reason, are_read = "", False

    def __init__(self, folder: PreparedFolder) -> None:
        self.folder = folder
        self._reading = threading.Lock()
        self._row_of: dict[str, int] = {}
        self._query_texts: list[str] = []
        self._frequent_queries: list[str] | None = None

    def history(self, user_id: Any, item_ids: Sequence[Any], where: str = "user") -> list[dict[str, Any]]:
        """All of the user's clicks, oldest first, as a request's history. Raises RequestError for an unknown
        user."""
        row = self.row(user_id, where)
        items, tasks, queries = (column[self._clicks_of(row)].tolist() for column in self._columns)
        return [
            {"item_id": item_ids[item], "task": TASKS[task]}
            | ({"query": self._query_text(query)} if query != NO_QUERY else {})
            for item, task, query in zip(items, tasks, queries, strict=True)
        ]

    def row(self, user_id: Any, where: str = "user") -> int:
        """The user's row in the users table. Raises RequestError for an unknown user."""
        self.read()
        if id_text(user_id) not in self._row_of:
            raise RequestError(
                f"{where}: user {user_id!r} is not in the training data. Give a history instead"
            )
        return self._row_of[id_text(user_id)]

    def items(self, user_id: Any) -> np.ndarray:
        """Rows of the items that the user clicked, oldest first."""
        return self._columns[0][self._clicks_of(self.row(user_id))]

    def some(self, count: int) -> list[str]:
        """The first `count` users with at least one click."""
        self.read()
        clicked = (
            user_id for user_id, row in self._row_of.items() if self._starts[row] < self._starts[row + 1]
        )
        return list(itertools.islice(clicked, count))

    def _clicks_of(self, row: int) -> slice:
        return slice(self._starts[row], self._starts[row + 1])

    def _query_text(self, query: int) -> str:
        if not self._query_texts:
            self._query_texts = self.folder.query_texts()
        return self._query_texts[query]

    def popular(self, count: int) -> np.ndarray:
        """Rows of the `count` items with the most clicks in all histories, the most clicked first."""
        self.read()
        counts = np.bincount(self._columns[0])
        order = np.argsort(-counts, kind="stable")[:count]
        return order[counts[order] > 0]

    def frequent_queries(self, count: int) -> list[str]:
        """The `count` most frequent queries of the training split, as a request's query; the most frequent
        first."""
        if self._frequent_queries is None:
            rows = self.folder.columns("train", ["query"])["query"]
            counts = np.bincount(rows[rows != NO_QUERY], minlength=self.folder.manifest.num_queries)
            order = np.argsort(-counts, kind="stable")[:MAX_EXAMPLES]
            texts = self.folder.query_texts()
            self._frequent_queries = [texts[int(row)] for row in order if counts[row]]
        return self._frequent_queries[:count]

    def read(self) -> None:
        """Read the clicks, unless they are."""
        with self._reading:  # who comes meanwhile waits, and does not read it again
            if not self.are_read:
                self._read_clicks()
                self.are_read = True

    def _read_clicks(self) -> None:
        clicks = read_clicks(self.folder)
        keep = in_histories(clicks.user, clicks.time, clicks.item, clicks.task)
        types = (np.int32, np.int8, np.int32)
        columns = (clicks.item, clicks.task, clicks.query)
        self._columns = [column[keep].astype(kind) for column, kind in zip(columns, types, strict=True)]
        num_users = self.folder.manifest.num_users
        self._starts = np.searchsorted(clicks.user[keep], np.arange(num_users + 1)).tolist()
        self._row_of = {id_text(user_id): row for row, user_id in enumerate(self.folder.user_ids())}


class NoUsers(Users):
    """Stands for the users of a folder that is not here: none is known. Clients of a service read the reason,
    so it names no folder."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def read(self) -> None:
        """There is nothing to read."""

    def row(self, user_id: Any, where: str = "user") -> int:
        raise RequestError(f"{where}: {self.reason}")

    def history(self, user_id: Any, item_ids: Sequence[Any], where: str = "user") -> list[dict[str, Any]]:
        raise RequestError(f"{where}: {self.reason}")

    def some(self, count: int) -> list[str]:
        return []

    def popular(self, count: int) -> np.ndarray:
        return np.zeros(0, np.int64)

    def frequent_queries(self, count: int) -> list[str]:
        return []


def open_users(folder: str | Path, manifest_hash: str, must_be_there: bool) -> Users:
    """Users of a prepared folder, if it is the one the model was trained on; else NoUsers.

    Raises DataError instead when must_be_there.
    """
    try:
        found = read_manifest(folder).hash if folder else None
    except DataError:
        if must_be_there:
            raise
        found = None
    if found == manifest_hash:
        return Users(PreparedFolder.at(folder))
    if must_be_there:
        raise DataError(
            f"{folder} is not the data this model was trained on (manifest {str(found)[:12]}, the model says "
            f"{manifest_hash[:12]})"
        )
    return NoUsers(
        "user_id cannot be looked up: the prepared folder of the training data is not here. Give a history "
        "instead, or start with --data FOLDER"
    )


def read_history(path: Path) -> list[Any]:
    """A history file: a JSON list of {"item_id": …, "task": "rec" | "src"}, oldest first, or one such object
    a line. Raises RequestError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from error
    try:
        if text.lstrip().startswith("["):
            entries: list[Any] = json.loads(text)
            return entries
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError, MemoryError) as error:
        raise RequestError(
            f'{path}: not a JSON list of {{"item_id": …, "task": "rec"}}, nor one such object a line: {error}'
        ) from error
