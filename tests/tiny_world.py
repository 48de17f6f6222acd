"""Worlds and batches made by hand, for tests of one model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.batch import Batch, no_tables
from trainer.config import DataConfig
from trainer.models.contract import World


def no_folder():
    raise AssertionError("there is no prepared folder")


def make_world(
    num_items: int = 30,
    num_users: int = 5,
    num_queries: int = 7,
    num_words: int = 0,
    history_max: int = 8,
    **data: Any,
) -> World:
    """Items and queries have three random words each where num_words > 0."""
    tables = no_tables(num_items, num_queries, num_users=num_users)
    if num_words:
        generator = torch.Generator().manual_seed(0)
        tables.item_words = torch.randint(0, num_words + 1, (num_items, 3), generator=generator)
        tables.query_words = torch.randint(0, num_words + 1, (num_queries, 3), generator=generator)
    return World(
        num_users=num_users,
        num_items=num_items,
        num_queries=num_queries,
        num_words=num_words,
        vocab_size=1,
        num_categories=0,
        data=DataConfig(history_max=history_max, **data),
        tables=tables,
        tokenizer=None,
        clicks=no_folder,
        texts=no_folder,
    )


def make_batch(
    histories: list[list[int]],
    candidates: Tensor,
    tasks: list[list[int]] | None = None,
    queries: list[list[int]] | None = None,
    width: int | None = None,
    task: Tensor | None = None,
    query: Tensor | None = None,
    user: Tensor | None = None,
    labels: Tensor | None = None,
) -> Batch:
    """One event a history; by default recommendations, and the first candidate is the clicked one."""
    num_events, width = len(histories), width or max(map(len, histories))

    def padded(rows: list[list[int]] | None, fill: int) -> Tensor:
        rows = rows or [[fill] * len(history) for history in histories]
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.int64).view(
            num_events, width
        )

    if labels is None:
        labels = torch.zeros(candidates.shape)
        labels[:, 0] = 1
    mask = padded([[1] * len(history) for history in histories], 0) == 1
    nothing = torch.full((num_events,), -1)
    return Batch(
        event_id=torch.arange(num_events),
        user=nothing if user is None else user,
        task=torch.zeros(num_events, dtype=torch.int64) if task is None else task,
        query=nothing if query is None else query,
        fold=nothing,
        history_items=padded(histories, 0),
        history_tasks=padded(tasks, 0),
        history_queries=padded(queries, -1),
        history_mask=mask,
        candidates=candidates,
        labels=labels,
    )


def count_encoded(monkeypatch: pytest.MonkeyPatch, core: Any) -> list[int]:
    """How many items each call of core.item_vectors() gets, from here on."""
    encode = core.item_vectors
    encoded: list[int] = []

    def counted(ids: Tensor, *parts: Tensor) -> Any:
        encoded.append(ids.numel())
        return encode(ids, *parts)

    monkeypatch.setattr(core, "item_vectors", counted)
    return encoded
