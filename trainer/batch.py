"""The types that carry data from shards to the model. Index-only: vectors and text are looked up on the
device (ItemTables)."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from data_shards.schema import SRC

ITEM_SLICE = 65_536  # items whose text is read at once where all are: bounds memory


@dataclass(frozen=True)
class Group:
    """Events of a batch whose prompts are answered together (models/gensr/grouping.py)."""

    task: int
    rows: Tensor  # [G] int64, positions in the batch
    longest: int  # tokens or words of the longest query
    counts: bool = True  # False: the answers are thrown away, the call was made because other ranks make one


@dataclass(frozen=True)
class Batch:
    """B events, each with N history positions and C candidates. Letters: trainer/README.md."""

    event_id: Tensor  # [B] int64
    user: Tensor  # [B] int64, row of the users table; -1 for a history given by hand
    task: Tensor  # [B] int64, schema.REC or schema.SRC
    query: Tensor  # [B] int64, row of ItemTables.query_*; -1 for none
    # [B] int64, which CF table the event reads: -1 the full one, f ≥ 0 the one that never saw the event's
    # click
    fold: Tensor
    history_items: Tensor  # [B, N] int64, oldest first, padded at the end with 0
    history_tasks: Tensor  # [B, N] int64
    history_mask: Tensor  # [B, N] bool, True = a real item
    # [B, N] int64, row of the query of a search in the history; -1 for a recommendation, and everywhere in a
    # folder of format 2 (Manifest.has_history_queries)
    history_queries: Tensor
    candidates: Tensor  # [B, C] int64
    labels: Tensor  # [B, C] float32, 1 = the clicked item (anywhere in the row)
    groups: tuple[Group, ...] | None = None  # GenSR.prepare decides; None: not decided yet

    @property
    def num_events(self) -> int:
        return self.candidates.shape[0]

    @property
    def clicked(self) -> Tensor:
        """[B] int64, the clicked item of each event of a batch with labels."""
        return self.candidates.gather(1, self.labels.argmax(1, keepdim=True))[:, 0]

    @property
    def searched(self) -> Tensor:
        """[B, N] bool, the history's clicks of searches; `browsed`: all others, without padding."""
        return self.history_mask & (self.history_tasks == SRC)

    @property
    def browsed(self) -> Tensor:
        return self.history_mask & (self.history_tasks != SRC)

    def to(self, device: torch.device | str) -> "Batch":
        """On a device. From pinned memory nobody waits for the copy."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True), self.groups)

    def pin_memory(self) -> "Batch":
        """In memory that a GPU copies from by itself."""
        return self._with(lambda tensor: tensor.pin_memory(), self.groups)

    def rows(self, start: int, stop: int) -> "Batch":
        """Events start … stop-1 of this batch."""
        return self._with(lambda tensor: tensor[start:stop], None)

    def take(self, index: Tensor) -> "Batch":
        """Events chosen by indices or a mask [B]."""
        return self._with(lambda tensor: tensor[index], None)

    def _with(self, change: Callable[[Tensor], Tensor], groups: tuple[Group, ...] | None) -> "Batch":
        tensors = {f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "groups"}
        return Batch(
            **tensors, groups=groups and tuple(replace(group, rows=change(group.rows)) for group in groups)
        )

    def with_candidates(self, candidates: Tensor, labels: Tensor) -> "Batch":
        return replace(self, candidates=candidates, labels=labels)


@dataclass(frozen=True)
class TrainClicks:
    """The clicks of the training split, [n] int64 each, by user and time: what counting models use."""

    user: Tensor
    task: Tensor
    item: Tensor
    query: Tensor  # row of the queries table, -1 for a recommendation
    time: Tensor  # ms


@dataclass
class ItemTables:
    """Frozen look-up tables of one prepared folder, on one device. Not parameters: never sharded,
    checkpointed or trained."""

    cf: Tensor  # [num_items, K] float32, LightGCN table (the full one)
    # [F, num_items, K] float32, tables without the clicks of fold f; F = 0: every event reads `cf`
    cf_folds: Tensor
    # [num_items, L] uint16 or int32, padded with 0 at the end; may lie in a file shared by processes (read
    # with rows_of)
    item_tokens: Tensor
    item_words: Tensor  # [num_items, W] uint16 or int32, 0 = padding; W = 0 for natural text
    # [num_items, depth] int32, 0 = none: the category of each level from the root; depth = 0 where the folder
    # has none (data_shards/categories.py)
    item_category: Tensor
    query_tokens: Tensor  # [num_queries, L] int, padded with 0 at the end
    query_words: Tensor  # [num_queries, W] int, 0 = padding

    cf_users: Tensor  # [num_users, K] float32, LightGCN's user vectors (the full table)

    @property
    def num_items(self) -> int:
        return self.item_tokens.shape[0]

    @property
    def device(self) -> torch.device:
        return self.query_tokens.device

    @property
    def item_terms(self) -> Tensor:
        """[num_items, T] int, 0 = padding: anonymised words where the data has them, else tokens."""
        return self.item_words if self.item_words.shape[1] else self.item_tokens

    @property
    def query_terms(self) -> Tensor:
        """[num_queries, T] int, 0 = padding: words, or tokens of natural text."""
        return self.query_words if self.query_words.shape[1] else self.query_tokens

    @cached_property
    def query_lengths(self) -> Tensor:
        """[num_queries] int64, on the CPU wherever the tables are: words of each query, or tokens where
        queries have no words."""
        return (self.query_terms != 0).sum(1).cpu()

    def to(self, device: torch.device | str) -> "ItemTables":
        return ItemTables(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def no_tables(num_items: int, num_queries: int, cf_dim: int = 0, num_users: int = 0) -> ItemTables:
    """Tables that hold nothing, in the right shapes: padding, zero vectors, no folds."""
    empty = torch.zeros((num_items, 0), dtype=torch.int32)
    nothing = dict.fromkeys(("item_tokens", "item_words", "item_category"), empty)
    return ItemTables(
        cf=torch.zeros((num_items, cf_dim)),
        cf_folds=torch.zeros((0, num_items, cf_dim)),
        query_tokens=torch.zeros((num_queries, 0), dtype=torch.int32),
        query_words=torch.zeros((num_queries, 0), dtype=torch.int32),
        cf_users=torch.zeros((num_users, cf_dim)),
        **nothing,
    )


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """table[index] as int64. A uint16 table is read as int16: few of torch's kernels know uint16."""
    if table.dtype == torch.uint16:
        return table.view(torch.int16)[index].long() & 0xFFFF
    return table[index].long()


def query_terms_of(tables: ItemTables, rows: Tensor) -> Tensor:
    """Words or tokens of queries […, T], padding for row -1. Tables have a row also without any query."""
    return rows_of(tables.query_terms, rows.clamp(min=0)) * (rows >= 0)[..., None]


def first_of_each(terms: Tensor) -> Tensor:
    """Sorted words or tokens […, T] → bool: real ones at their first place."""
    new = torch.ones_like(terms, dtype=torch.bool)
    new[..., 1:] = terms[..., 1:] != terms[..., :-1]
    return new & (terms != 0)


def term_counts(table: Tensor, size: int) -> Tensor:
    """[size] int64 on the CPU: how often a table of words or tokens has each id below `size`."""
    counts = torch.zeros(size, dtype=torch.int64)
    for start in range(0, len(table), ITEM_SLICE):
        terms = rows_of(table, torch.arange(start, min(start + ITEM_SLICE, len(table))))
        counts += torch.bincount(terms.flatten().cpu(), minlength=size)
    return counts
