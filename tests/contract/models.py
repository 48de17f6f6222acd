"""What the contract test does with a model of any kind: its configuration, a fitted one, batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data_shards.schema import NO_QUERY, REC, SRC
from trainer.batch import Batch
from trainer.config import Config
from trainer.configs import load_config
from trainer.data import EvalStream, TrainStream
from trainer.data.folder import PreparedFolder
from trainer.models.contract import Ranker
from trainer.models.zoo import model_class, model_names, settings_class
from trainer.runs.weights import build_model
from trainer.serving.artifacts import query_format, read_words
from trainer.serving.scorer import Scorer

# what makes a model small; a model that is not named here is small by default, or should be
TINY = {
    "gensr": (
        "model.backbone=scratch:nano",
        "model.gather_negatives=true",
        "model.evidence=true",
        "model.evidence_queries=true",
        "model.mined_negatives=2",
        "model.listwise_weight=1",
    ),
    # a beam spells some items of the catalogue; 0 spells all of them, as sampled candidates are
    "idgenrec": ("model.catalogue_beams=0",),
    "collm": ("model.backbone=scratch:qwen3_nano", "model.dropout=0"),
    "bsr": ("model.backbone=scratch:nano",),
    "two_tower": ("model.categories=true",),
    "user": ("model.dim=16", "model.ffn_dim=32", "model.head_dim=8"),
    # each token draws its own replacement: two halves of a batch cannot repeat what the whole one drew
    "query_seqrec": ("model.item_replace=0", "model.query_replace=0"),
}
BASE = (
    "data.history_max=6",
    "data.history_tokens=4",
    "data.item_tokens=8",
    "optim.global_batch_size=16",
    "optim.micro_batch_size=8",
    "optim.warmup_steps=1",
    "run.log_every_steps=1",
    "run.valid_events=8",
    "run.eval_batch_size=4",
    "run.threads=1",
    "tracking.enabled=false",
)
MODELS = model_names()
TRAINED = [name for name in MODELS if model_class(name).trained]
COUNTED = [name for name in MODELS if not model_class(name).trained]
NUM_FIT_EVENTS, FIT_BATCH, FIT_STEPS = 64, 16, 40


def config_of(name: str, *overrides: str) -> Config:
    return load_config(None, [f"model.name={name}", *BASE, *TINY.get(name, ()), *overrides])


def no_dropout(name: str) -> list[str]:
    """An override of every setting whose name says dropout."""
    return [f"model.{key}=0" for key in _keys(settings_class(name)()) if "dropout" in key]


def _keys(section: Any) -> Iterator[str]:
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from (f"{field.name}.{key}" for key in _keys(value))
        else:
            yield field.name


# ---- models ------------------------------------------------------------------------------------------------


def new_model(name: str, folder: PreparedFolder, *overrides: str) -> Ranker:
    """As set_up() makes it: the same for the same name."""
    torch.manual_seed(0)
    config = config_of(name, *overrides)
    needs = model_class(name).reads(config.model)
    model = build_model(config, folder, folder.tables(needs, with_folds=True))
    model.fit()
    return model


def scorer_of(model: Ranker, folder: PreparedFolder) -> Scorer:
    """What answers requests, without a run. It changes the model's query tables."""
    form = query_format(folder.manifest)
    tokenizer = Tokenizer.from_file(str(folder.tokenizer / "tokenizer.json"))
    words = read_words(folder.catalog / "words.npy", form)
    return Scorer(model, folder.item_ids(), tokenizer, form, words, "fp32")


def trained_parameters(model: Ranker) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def training_batches(name: str, folder: PreparedFolder, num_events: int, size: int) -> list[Batch]:
    """The first events of the training stream, of the model's tasks."""
    data, tasks = config_of(name).data, model_class(name).tasks
    num_folds = folder.cf(users=False).num_folds
    stream = iter(TrainStream(folder, data, 0, size, size, num_folds=num_folds, tasks=tasks))
    return [next(stream) for _ in range(num_events // size)]


@cache
def fitted(name: str, path: Path) -> tuple[Ranker, list[float]]:
    """A model after FIT_STEPS steps of AdamW on the same few batches, in evaluation mode, with the loss of
    each step. Tests only score with it. A model that is counted comes without losses."""
    folder = PreparedFolder.at(path)
    model, losses = new_model(name, folder).train(), []
    if model.trained:
        batches = training_batches(name, folder, NUM_FIT_EVENTS, FIT_BATCH)
        optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=3e-3)
        for step in range(FIT_STEPS):
            loss, _ = model(model.prepare(batches[step % len(batches)]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    model.ready_to_serve()
    return model.eval(), losses


@torch.no_grad()
def scores_of(model: Ranker, batch: Batch) -> Tensor:
    scores: Tensor = model(model.prepare(batch), mode="score")
    return scores


# ---- batches -----------------------------------------------------------------------------------------------


def some_events(model: Ranker, folder: PreparedFolder, size: int = 6) -> Batch:
    """Events of the test split with a few of their stored candidates, of the model's tasks."""
    stream = EvalStream(folder, "test", model.world.data, 32, tasks=model.tasks)
    batch = next(iter(stream)).take(torch.arange(0, 32, 32 // size)[:size])
    return batch.with_candidates(batch.candidates[:, :7], batch.labels[:, :7])


def padded(batch: Batch, more: int) -> Batch:
    """With `more` slots of padding behind each history."""
    fills: dict[str, Any] = {
        "history_items": 0,
        "history_tasks": 0,
        "history_mask": 0,
        "history_queries": NO_QUERY,
    }
    pad = torch.nn.functional.pad
    wider: dict[str, Any] = {
        name: pad(getattr(batch, name), (0, more), value=fill) for name, fill in fills.items()
    }
    return replace(batch, **wider)


def without(batch: Batch, gone_BN: Tensor) -> Batch:
    """With the history items of a mask [B, N] taken out; the others move together."""
    kept_BN = batch.history_mask & ~gone_BN
    order_BN = (~kept_BN).long().argsort(dim=1, stable=True)
    kept_BN = kept_BN.gather(1, order_BN)
    moved = {name: getattr(batch, name).gather(1, order_BN) for name in HISTORY}
    moved["history_queries"] = moved["history_queries"].where(kept_BN, NO_QUERY)
    return replace(
        batch,
        history_mask=kept_BN,
        history_items=moved["history_items"] * kept_BN,
        history_tasks=moved["history_tasks"] * kept_BN,
        history_queries=moved["history_queries"],
    )


HISTORY = ("history_items", "history_tasks", "history_queries")


def odd_batches(batch: Batch) -> dict[str, Batch]:
    """What happens to a service and at the edges of a log. User −1 stands apart: see test_models.py."""
    all_gone = torch.ones_like(batch.history_mask)
    return {
        "no history": without(batch, all_gone),
        "recommendations only": without(batch, batch.history_tasks == SRC),
        "searches only": without(batch, batch.history_tasks == REC),
        "queries of the history unknown": replace(
            batch, history_queries=torch.full_like(batch.history_queries, NO_QUERY)
        ),
        "query unknown": replace(batch, query=torch.full_like(batch.query, NO_QUERY)),
        "one event": batch.rows(0, 1),
    }


@contextmanager
def queries_without_words(model: Ranker) -> Iterator[None]:
    """Every query of the tables is empty text."""
    tables = model.tables
    model.set_tables(
        replace(
            tables,
            query_tokens=torch.zeros_like(tables.query_tokens),
            query_words=torch.zeros_like(tables.query_words),
        )
    )
    yield
    model.set_tables(tables)


def cold_items(folder: PreparedFolder) -> Tensor:
    """Rows of items without a click in the training split."""
    return torch.from_numpy(folder.item_clicks() == 0).nonzero()[:, 0]


def model_files(run_dir: Path) -> set[str]:
    model = run_dir / "model"
    return {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
