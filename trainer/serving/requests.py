"""From requests to rows.

A request:  {"user_id"?: …, "history": [{"item_id": …, "task": "rec" | "src", "query"?: …}, … oldest first],
             "task": "rec" | "src", "query": text, list of anonymised words, or null, "candidates": [item
             ids]}
Item ids are the original ones, as text or numbers. Every mistake is a RequestError that says where.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_shards.schema import SRC, TASKS
from trainer.errors import RequestError


@dataclass(frozen=True)
class ParsedRequest:
    """Rows instead of ids."""

    items: list[int]  # history, oldest first, all of it; the model reads the newest history_max
    tasks: list[int]
    task: int
    query: str | None
    candidates: list[int]
    history_queries: list[str | None] = field(
        default_factory=list
    )  # of each history item; empty: none is known
    user: int = -1  # row of the training data's users table, -1 for a history given by hand


class RequestReader:
    """Knows the catalogue's ids and how queries are written."""

    def __init__(self, item_ids: Sequence[Any], query_mode: str, tasks: tuple[int, ...]) -> None:
        """query_mode: natural, words, digits or drop (data_shards/text.py). tasks: what the model serves."""
        self._row_of = {id_text(item_id): row for row, item_id in enumerate(item_ids)}
        self._query_mode, self._tasks = query_mode, tasks

    def parse(self, request: Mapping[str, Any], where: str, needs_candidates: bool = True) -> ParsedRequest:
        """`where` begins the message of the RequestError that a bad request raises."""
        task = _task(request.get("task"), where)
        if task not in self._tasks:
            served = "searches" if task != SRC else "recommendations"
            raise RequestError(f"{where}: this model answers {served} only, and task is {TASKS[task]!r}")
        query = request.get("query")
        query = None if missing(query) else self.query_text(query, where)
        if task == SRC and query is None:
            raise RequestError(
                f"{where}: task is 'src' and query is missing: give text, or a list of word numbers for "
                "anonymised data"
            )
        if task != SRC and query is not None:
            raise RequestError(
                f"{where}: a recommendation takes no query: leave it out, or search (task 'src'; over HTTP "
                "/search)"
            )
        history = listed(request.get("history"), f"{where}: history")
        entries = [self._history_entry(entry, where) for entry in history]
        candidates = listed(request.get("candidates"), f"{where}: candidates")
        if needs_candidates and not candidates:
            raise RequestError(f"{where}: candidates is empty: give the item ids to score")
        return ParsedRequest(
            items=self._rows([item for item, _, _ in entries], f"{where}: history"),
            tasks=[task for _, task, _ in entries],
            task=task,
            query=query,
            candidates=self._rows(candidates, f"{where}: candidates"),
            history_queries=[text for _, _, text in entries],
        )

    def _history_entry(self, entry: Any, where: str) -> tuple[Any, int, str | None]:
        if not isinstance(entry, Mapping) or "item_id" not in entry:
            raise RequestError(
                f'{where}: history entries look like {{"item_id": …, "task": "rec"}}, got {entry!r}'
            )
        query = entry.get("query")
        text = None if missing(query) else self.query_text(query, f"{where}: history")
        return entry["item_id"], _task(entry.get("task"), f"{where}: history"), text

    def query_text(self, query: Any, where: str) -> str:
        """A query as preparation writes it: text, or anonymised words separated by spaces."""
        if isinstance(query, list | tuple | np.ndarray):
            if not all(isinstance(word, str | int | np.integer) for word in query):
                raise RequestError(f"{where}: query must be text or a list of word numbers, got {query!r}")
            query = " ".join(str(word) for word in query)
        if not isinstance(query, str):
            raise RequestError(f"{where}: query must be text or a list of word numbers, got {query!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in query):  # no tokenizer takes one
            raise RequestError(f"{where}: query holds half of a surrogate pair, which is not text: {query!r}")
        if self._query_mode == "words" and not all(_is_word_number(word) for word in query.split()):
            raise RequestError(
                f"{where}: this model reads queries of anonymised words: a list of word numbers, got "
                f"{query!r}"
            )
        return query

    def _rows(self, item_ids: Sequence[Any], where: str) -> list[int]:
        unknown = [item_id for item_id in item_ids if id_text(item_id) not in self._row_of]
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise RequestError(
                f"{where}: the model does not know the items {', '.join(map(repr, unknown[:5]))}{more}"
            )
        return [self._row_of[id_text(item_id)] for item_id in item_ids]


def _is_word_number(word: str) -> bool:
    """Digits that int64 holds: Python also counts ² and ٣ among them."""
    return word.isascii() and word.isdigit() and len(word) < 19


def _task(task: Any, where: str) -> int:
    if not isinstance(task, str) or task not in TASKS:
        raise RequestError(f"{where}: task must be 'rec' or 'src', got {task!r}")
    return TASKS.index(task)


def is_absent(value: Any) -> bool:
    """None, or NaN, which is how pandas writes None."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def missing(value: Any) -> bool:
    """Absent, blank text and []."""
    if isinstance(value, str):
        return not value.strip()
    return is_absent(value) or (isinstance(value, list | tuple | np.ndarray) and len(value) == 0)


def id_text(value: Any) -> str:
    """An id as its log writes it. pandas makes 7.0 of 7 where another row of the column has none."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def listed(value: Any, where: str) -> list[Any]:
    if missing(value):
        return []
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    raise RequestError(f"{where} must be a list, got {value!r}")
