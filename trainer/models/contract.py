"""The contract of every model: what it is built from (`World`), and what the trainer, evaluation, registry
and service call (`Ranker`).

A model is one file: trainer/models/baselines/NAME.py (or a folder, as gensr/) that ends with `MODEL = Name`.
zoo.py finds it by the file's name, and `gensr train NAME` trains it. Letters of tensor names:
trainer/README.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from data_shards.schema import REC, SRC, TASKS
from trainer.batch import Batch, ItemTables, TrainClicks
from trainer.config import DataConfig, ModelSettings
from trainer.errors import RequestError

GatherRows = Callable[[Tensor], tuple[Tensor, int]]
"""Rows of this rank [n, …] → (rows of all ranks with gradient [R·n, …], index of this rank's first row)."""

Report = Callable[[str, int, int], None]
"""(what is counted, how many are done, of how many)."""

ITEMS_AT_ONCE = 1024  # of score_catalogue(): bounds memory
ITEMS_AT_ONCE_CPU = 256  # activations stay in its caches: measured, up to twice as fast
UNREACHED = -1e4  # score of what no beam reached: finite, and below everything that is spelled


@dataclass(frozen=True)
class Ranks:
    """What a model may know of the processes that train it: how many, and how to gather rows from all."""

    size: int = 1
    gather: GatherRows | None = None

    def gathered(self, rows: Tensor) -> tuple[Tensor, int]:
        """Rows of all ranks, with gradient, and the index of this rank's first; of one process, its own."""
        return self.gather(rows) if self.gather is not None else (rows, 0)


ONE_PROCESS = Ranks()


@dataclass(frozen=True)
class World:
    """What any model is built from. The same for training, evaluation and serving; where the prepared folder
    is not at hand (a registered version), `clicks` and `texts` raise."""

    num_users: int
    num_items: int
    num_queries: int
    num_words: int  # of the anonymised vocabulary; 0 for natural text
    vocab_size: int  # of the tokenizer
    num_categories: int  # ids of ItemTables.item_category are 1 … num_categories; 0: the folder has none
    data: DataConfig
    tables: ItemTables  # only what the model's `needs` names is filled
    tokenizer: Callable[[], Any] | None  # None: only sizes are asked for (dry run)
    clicks: Callable[[], TrainClicks]  # of the training split
    texts: Callable[[], tuple[list[str], list[str]]]  # all text of each item, and of each query
    precision: Literal["fp32", "bf16"] = "fp32"  # run.precision
    ranks: Ranks = ONE_PROCESS
    # what save_extra() wrote, when the weights are loaded afterwards; None: a new model
    saved: Path | None = None
    # names from the root down of category 0 (none: no names), 1, … num_categories; raises as `clicks` does
    categories: Callable[[], list[tuple[str, ...]]] = lambda: [()]
    report: Report = lambda what, done, total: None  # how far fit() is, which may take minutes

    @property
    def is_new(self) -> bool:
        """Whether a model with weights of its own is made: neither sizes only, nor one to be loaded."""
        return self.tokenizer is not None and self.saved is None

    @property
    def num_terms(self) -> int:
        """Ids of ItemTables.item_terms and query_terms are 1 … num_terms, 0 is padding."""
        return self.num_words or self.vocab_size - 1


@dataclass(frozen=True)
class View:
    """Vectors for retrieval: an index over items, and vectors to search it with. Zero rows are not indexed,
    and a zero vector finds nothing."""

    width: int
    items: Callable[[Tensor], Tensor]  # rows of items [n] → [n, width] float32
    # (events, mean of the items' vectors [width]) → [B, width] float32
    ask: Callable[[Batch, Tensor], Tensor]
    share: Mapping[int, float]  # task → share of the candidates that come from this view
    # the index holds items minus their mean: what all items share tells none apart
    centred: bool = False
    # a request searches with all of its history, not only the newest data.history_max that score() reads
    whole_history: bool = False


@dataclass(frozen=True)
class PreRanking:
    """How retrieval chooses what the model ranks, where the model knows better than the shares of its views:
    everything that the views and propose() find is sorted by score()."""

    propose: Callable[[Batch], Tensor]  # events → items that no vector finds, [B, P] rows; num_items: none
    score: Callable[[Batch], Tensor]  # → [B, C] float32 as Ranker.score, for a small part of its cost


@dataclass(frozen=True)
class Cost:
    """What one training event costs besides parameters, gradients and optimizer state. Estimates: the model
    says where its constants come from."""

    flops: float  # forward and backward of one event, all its candidates
    activation_bytes: float  # of one event, kept for the backward pass
    cast_bytes: float = 0.0  # low-precision copies of weights that live until the backward pass
    saved_bytes: float = 0.0  # frozen weights that are held in less than float32


def numel(parameter: Any) -> int:
    """Number of elements, also of a parameter that ZeRO-3 has partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class Ranker(nn.Module):
    """A model that ranks candidates for events: recommendations, searches, or both.

    Required: `score`, and `loss` unless `trained` is False. The rest has defaults. Wrappers (DDP, ZeRO) hook
    forward() only, so the trainer always calls model(batch) and model(batch, mode="score"). Item tables are
    frozen and live outside the module tree: never trained, sharded or saved with the weights.
    """

    Settings: ClassVar[type[ModelSettings]]
    title: ClassVar[str] = ""  # how tables call it; "": by the class's name
    tasks: ClassVar[tuple[int, ...]] = (REC, SRC)  # stream, validation and reports follow it
    # of: cf, cf_users, item_text, history_queries, users, item_category, texts
    needs: ClassVar[frozenset[str]] = frozenset()
    may_read: ClassVar[frozenset[str]] = frozenset()  # of the same, what it reads where a folder holds it
    trained: ClassVar[bool] = True  # False: fit() learns everything, no steps are made
    # counted buffers with a row an item that trained weights rely on: where a folder goes on from that of an
    # earlier run, fit() finds that run's rows in them and keeps them
    kept: ClassVar[tuple[str, ...]] = ()
    # True: the loss compares events of a batch with each other (in-batch negatives, batch statistics)
    in_batch: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        cls.title = vars(cls).get("title") or cls.__name__

    def __init__(self, settings: ModelSettings, world: World) -> None:
        super().__init__()
        self.settings = settings
        self._world = [world]  # a list hides tensors from nn.Module
        self._request_texts: list[str] | None = None

    # ---- required ------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """→ (mean loss of the events, detached scalars for the log; "loss" is added by forward).

        Micro-batches of equal size must add up to the whole batch's gradient, and so must the ranks' batches.
        With `in_batch` only the latter: what is compared is gathered by world.ranks. Every trained weight has
        a gradient, if only 0, whatever the events are: DDP and ZeRO wait for it on all ranks. A model of both
        tasks weighs each event's loss by event_weights()."""
        raise NotImplementedError

    def score(self, batch: Batch) -> Tensor:
        """→ scores_BC, float32, higher is better, finite. A score depends neither on the other rows of the
        batch, nor on the other candidates, nor on padding."""
        raise NotImplementedError

    # ---- optional ------------------------------------------------------------------------------------------

    @classmethod
    def reads(cls, settings: ModelSettings) -> frozenset[str]:
        """`needs` of a model with these settings."""
        return cls.needs

    def fit(self) -> None:
        """What is counted, not learned: called once for a new model, before the first step. Keep the result
        in buffers, which are saved with the weights."""

    def prepare(self, batch: Batch) -> Batch:
        """What the loader's thread can do for a batch while it is on the CPU."""
        return batch

    def score_catalogue(self, batch: Batch) -> Tensor:
        """Scores of every item for every event, [B, num_items] float32. Two-tower-like models override it
        with one product."""

        def scores(items: Tensor) -> Tensor:
            candidates = items.expand(batch.num_events, -1)
            labels = torch.zeros(candidates.shape, device=candidates.device)
            return self.score(self.prepare(batch.with_candidates(candidates, labels)))

        return self.by_slices(scores)

    def views(self) -> dict[str, View]:
        """Vectors for retrieval by name. {}: the whole catalogue is ranked by score_catalogue()."""
        return {}

    def pre_ranking(self) -> PreRanking | None:
        """None: retrieval takes of each view its share. Asked once the weights are loaded."""
        return None

    def probability(self, scores: Tensor) -> Tensor:
        """What a request is answered with, in the order of the scores."""
        return scores.sigmoid()

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        """What the analyses look at, [B, D] each, for the clicked item: "history" (what of the history is
        read), "input" (that, the item and the query), "hidden" (the last layer before the score). {}: the
        analyses record the layers of score() and say so."""
        return {}

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """Weights of history items for each candidate by view, [B, C, N] each, rows sum to 1 (0 without
        history). {}: the model has none."""
        return {}

    def cost(self) -> Cost | None:
        """None: the dry run counts parameters only."""
        return None

    def save_extra(self, folder: Path) -> None:
        """Files beside the weights that World.saved needs to build the model again (backbone, tokenizer)."""

    def saved_names(self) -> set[str]:
        """Names of parameters and buffers that RUN/model holds. Frozen weights that can be had again by name
        may stay out."""
        return set(self.state_dict())

    def ready_to_serve(self) -> None:
        """Called once after the weights are loaded and before the first score: may fold or cast weights."""

    def beams(self, catalogue: bool = False) -> int | None:
        """How many beams score(), or score_catalogue(), decodes with. What no beam spells scores UNREACHED;
        evaluations report how much that is. 0: everything is spelled. None: the model does not decode."""
        return None

    @classmethod
    def stages(cls) -> tuple[tuple[str, ...], ...]:
        """KEY=VALUE of the runs that make one model, each started with run.init_from of the one before."""
        return ((),)

    @classmethod
    def check_tokenizer(cls, tokenizer: Any, settings: ModelSettings, is_trained: bool) -> None:
        """Raises DataError when a model with these settings cannot work with a folder's tokenizer.
        is_trained: whether it was made from the folder's texts."""

    @classmethod
    def retrieves(cls) -> bool:
        """Whether it may find candidates for another model (serving.retriever), because it finds the best of
        the whole catalogue cheaply. A model that overrides score_catalogue() or views() for another reason
        says False."""
        return cls.score_catalogue is not Ranker.score_catalogue or cls.views is not Ranker.views

    @classmethod
    def refusals(cls, settings: ModelSettings, zero_stage: int | None) -> list[str]:
        """Settings that cannot be used under a ZeRO stage, as `model.key=value` with the reason."""
        return []

    # ---- final ---------------------------------------------------------------------------------------------

    def by_slices(self, scores: Callable[[Tensor], Tensor]) -> Tensor:
        """score_catalogue() slice by slice: scores takes rows of items [n] → [B, n]."""
        at_once = ITEMS_AT_ONCE_CPU if self.device.type == "cpu" else ITEMS_AT_ONCE
        slices = torch.arange(self.world.num_items, device=self.device).split(at_once)
        return torch.cat([scores(rows) for rows in slices], 1)

    def forward(self, batch: Batch, mode: str = "loss") -> Any:
        """Not to be overridden. mode "loss": (loss, report of detached scalars). mode "score": scores_BC."""
        if mode == "score":
            return self.score(batch)
        loss, report = self.loss(batch)
        report["loss"] = loss.detach()
        return loss, report

    def event_weights(self, batch: Batch) -> Tensor:
        """How much each event's loss weighs by its task, [B] float32: data.weight_rec or data.weight_src."""
        data = self.world.data
        return torch.where(batch.task == SRC, data.weight_src, data.weight_rec).float()

    @property
    def world(self) -> World:
        return self._world[0]

    def set_asked(self, texts: list[str] | None) -> None:
        """Texts of the queries that rows of the query tables stand for while requests are answered; None:
        those of the prepared folder."""
        self._request_texts = texts

    def query_text(self, row: int) -> str:
        """Of a row of the query tables, "" for none (row -1). For models that need `texts`."""
        texts = self._folder_texts[1] if self._request_texts is None else self._request_texts
        return texts[row] if row >= 0 else ""

    @cached_property
    def _folder_texts(self) -> tuple[list[str], list[str]]:
        return self.world.texts()

    def set_tasks(self, tasks: tuple[int, ...]) -> None:
        """Those of the model's tasks that its training data has: a log without searches teaches nothing about
        them."""
        self.__dict__["tasks"] = tasks

    @property
    def tables(self) -> ItemTables:
        return self._world[0].tables

    def set_tables(self, tables: ItemTables) -> None:
        self._world[0] = replace(self._world[0], tables=tables)

    @property
    def device(self) -> torch.device:
        """Where the model computes: that of its tables; a batch may still be on its way there."""
        return self.tables.device

    def check_history(self, batch: Batch, reads_users: bool = False) -> None:
        """Raises RequestError for a history given by hand to a model that only knows the users it was trained
        on. Not asked in training, whose events have users and whose steps should not wait for the device."""
        asked = (reads_users or "users" in self.needs) and not (self.training and self.trained)
        if asked and bool((batch.user < 0).any()):
            raise RequestError(
                f"{self.settings.name} knows users by their rows, not by a history given by hand. "
                "Name a user of the training data (user_id)"
            )


def clicked_only(batch: Batch) -> Batch:
    """The events with one candidate each: the clicked item."""
    item_B1 = batch.clicked[:, None]
    return replace(batch, groups=None).with_candidates(item_B1, torch.ones_like(item_B1, dtype=torch.float32))


def task_names(model: Ranker) -> tuple[str, ...]:
    """("rec", "src") or the one it serves."""
    return tuple(TASKS[task] for task in model.tasks)
