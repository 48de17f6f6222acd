"""`gensr cf`: the collaborative-filtering table E_c of a prepared folder, and the tables training reads
instead of it.

    training rec clicks ─▶ full table (user, item): inference, LightGCN baseline
                       └─▶ without fold f's clicks (crossfit) or each user's last one (last)
                           ─▶ rotated into the full table's space ─▶ item_folds

Why more than one: a table that has seen a training target gives it away (history · target is far larger than
it will be in the future), so the model learns to trust a signal that is not there later. A training event
therefore reads a table that never saw its click.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import trainer
from data_shards import settings as s
from data_shards.checksum import has_sha256
from data_shards.hashing import click_fold, derive_seed, mix64
from data_shards.schema import REC, Manifest
from trainer.cf.partial import CfWork, Slot
from trainer.cf.training import Edges, TableTrainer, unique_clicks
from trainer.config import CfConfig, CfRoot
from trainer.data.cf_table import CfTable, cf_path, save_cf, write_checksum
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, DataError, RunError
from trainer.runtime.device import default_device
from trainer.runtime.memory import give_back_freed_memory, keep_freed_memory
from trainer.runtime.progress import Notify, in_bytes, in_time

WORK_LAYOUT = 2  # of the tensors in the work folder; raised when they change
MAX_VALID_EVENTS = 20_000  # of early stopping: a fixed hashed sample; NDCG@10 is then known to ± .005

Tensors = dict[str, Tensor]


def train_cf(out: str | Path, overrides: Sequence[str] = (), progress: Notify | None = None) -> Path:
    """Train and write OUT/cf/lightgcn.safetensors; returns its path. overrides: "cf.holdout=last", …,
    "overwrite=true".

    An existing table of the same split and settings is kept; an interrupted training resumes from
    OUT/cf/partial/. Deterministic on CPU for given settings. A log of searches alone gives a table of
    zeros, as items without clicks have. Raises RunError for an existing table of other settings or split
    without overwrite=true.
    """
    say = progress or (lambda message: None)
    root: CfRoot = s.load(CfRoot, overrides=overrides, keys_command="gensr config keys cf")
    folder = PreparedFolder.at(out)
    config, manifest = root.cf, folder.manifest
    path = cf_path(folder.path)
    if path.is_file() and not root.overwrite:
        _check_existing(folder, config)
        say(
            f"{path} is up to date: same split, same settings. Nothing to do (overwrite=true trains it "
            "again)."
        )
        return path
    columns = folder.columns("train", ["user", "item", "task", "time", "event_id"])
    clicks = unique_rec_clicks(columns, manifest)
    if len(clicks.users) == 0:
        say(f"{out} has no recommendation click in its training split: the table holds zeros")
        path = save_cf(out, empty_table(manifest, config))
        say(f"wrote {path} ({in_bytes(path.stat().st_size)})")
        return path
    work = cf_work(folder, root)
    if others := work.of_others():
        say(
            f"{work.folder} holds {', '.join(others)} of a training with other settings, split or version: "
            "not continued, soon replaced. Stop now to keep it."
        )
    target = items_before(folder, config) if config.onto else None
    keep_freed_memory()
    valid = valid_candidates(folder, config.seed)
    table = train_tables(clicks, columns, valid, manifest, config, work, say, target)
    save_cf(out, table)
    work.remove()
    say(f"wrote {path} ({in_bytes(path.stat().st_size)})")
    return path


def items_before(folder: PreparedFolder, config: CfConfig) -> Tensor:
    """Item vectors of the folder that cf.onto names, [J, K]: this one's first J items. Raises ConfigError
    when this folder does not go on from it, or for another width."""
    before = PreparedFolder.at(config.onto)
    if before.manifest.hash not in {one["manifest"] for one in folder.manifest.appended}:
        raise ConfigError(
            f"cf.onto={config.onto}: {folder.name} does not go on from it, so its items have other rows. "
            "Name the folder that gensr prepare --append was given, or leave it out."
        )
    item = before.cf(users=False, folds=False).item
    if item.shape[1] != config.dim:
        raise ConfigError(
            f"cf.onto={config.onto}: its vectors have {item.shape[1]} numbers. Use cf.dim={item.shape[1]}."
        )
    return item


def empty_table(manifest: Manifest, config: CfConfig) -> CfTable:
    """Of a split without recommendation clicks."""
    num_folds = {"none": 0, "last": 1, "crossfit": config.num_folds}[config.holdout]
    return CfTable(
        user=torch.zeros(manifest.num_users, config.dim),
        item=torch.zeros(manifest.num_items, config.dim),
        item_folds=torch.zeros(num_folds, manifest.num_items, config.dim),
        heldout_item=torch.full((manifest.num_users,), -1) if config.holdout == "last" else None,
        split_fingerprint=manifest.fingerprint,
        settings=asdict(config),
        validation={"epochs": 0, "ndcg@10": None, "num_events": 0, "curve": []},
        gensr_version=trainer.__version__,
    )


def _check_existing(folder: PreparedFolder, config: CfConfig) -> None:
    path = cf_path(folder.path)
    try:
        existing = folder.cf(users=False, folds=False)
    except DataError as error:
        raise RunError(str(error)) from error
    # a setting that is younger than the table has its default there
    theirs, ours = {**asdict(CfConfig()), **existing.settings}, asdict(config)
    changed = [f"cf.{key} {theirs[key]!r} → {ours[key]!r}" for key in ours if theirs[key] != ours[key]]
    if changed:
        raise RunError(
            f"{path} was trained with other settings ({', '.join(changed)}). "
            "Add overwrite=true to replace it."
        )
    checksum = path.with_suffix(".sha256")
    if not checksum.is_file():
        write_checksum(path)
    elif not has_sha256(path, checksum):
        raise RunError(
            f"{path} differs from its checksum in {checksum.name}. Add overwrite=true to train it again."
        )


def cf_work(folder: PreparedFolder, root: CfRoot) -> CfWork:
    """The work folder of this split, these settings, this version and kind of device (whose random numbers
    are others)."""
    identity = json.dumps(
        [trainer.__version__, WORK_LAYOUT, default_device(), folder.manifest.hash, asdict(root.cf)],
        sort_keys=True,
    )
    return CfWork(cf_path(folder.path).parent / "partial", identity, root.save_every_s)


def unique_rec_clicks(columns: dict[str, np.ndarray], manifest: Manifest) -> Edges:
    """Edges of the graph: each (user, item) of a training rec event once."""
    rec = columns["task"] == REC
    return unique_clicks(columns["user"][rec], columns["item"][rec], manifest.num_users, manifest.num_items)


def last_clicks(columns: dict[str, np.ndarray], num_users: int) -> np.ndarray:
    """Each user's last training rec click by (time, event_id) → [num_users] int64 items, -1 for users without
    one."""
    rec = np.flatnonzero(columns["task"] == REC)
    order = rec[np.lexsort((columns["event_id"][rec], columns["time"][rec]))]
    heldout = np.full(num_users, -1, np.int64)
    heldout[columns["user"][order]] = columns["item"][order]  # later writes win
    return heldout


def valid_candidates(folder: PreparedFolder, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Users [n] and candidates [n, 1 + num_negatives] (the positive first) of validation rec events, at most
    MAX_VALID_EVENTS by hash."""
    columns = folder.columns("valid", ["event_id", "user", "task", "item", "negatives"])
    rec = np.flatnonzero(columns["task"] == REC)
    if len(rec) > MAX_VALID_EVENTS:
        rec = rec[
            np.argsort(mix64(columns["event_id"][rec], derive_seed(seed, 23)), kind="stable")[
                :MAX_VALID_EVENTS
            ]
        ]
    if len(rec) == 0:
        return np.zeros(0, np.int64), np.zeros((0, 1 + folder.manifest.num_negatives), np.int64)
    candidates = np.concatenate([columns["item"][rec, None], columns["negatives"][rec]], axis=1)
    return columns["user"][rec].astype(np.int64), candidates.astype(np.int64)


# ---- training ----------------------------------------------------------------------------------------------


def train_tables(
    clicks: Edges,
    columns: dict[str, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
    manifest: Manifest,
    config: CfConfig,
    work: CfWork,
    say: Notify,
    target: Tensor | None = None,
) -> CfTable:
    """The full table, then those of cf.holdout for as many epochs as the full one took (validation is asked
    once). target: vectors of the first items of the catalogue, whose space the tables get."""
    heldout = last_clicks(columns, clicks.num_users) if config.holdout == "last" else None
    keep = held_in(clicks, config, heldout)
    started = time.monotonic()

    def train_full(slot: Slot) -> tuple[Tensors, dict[str, Any]]:
        full = TableTrainer(clicks, config, say)
        say(describe_cost(clicks, config, 1 + len(keep), full.batch_size, full.step_seconds()))
        user, item, validation = full.fit_until_valid(valid, slot)
        if target is not None:
            turn = rotation(clicks.in_catalog(item)[: len(target)], target)
            user, item = user @ turn, item @ turn
        return {"user": user, "item": item}, validation

    tables, validation = finished_or(work, "full", train_full)
    item, epochs = tables["item"], int(validation["epochs"])
    say(
        f"full table: best after {epochs} epochs, validation NDCG@10 {validation['ndcg@10']} (sampled), "
        f"{time.monotonic() - started:.0f} s"
    )
    folds = []
    for fold, mask in enumerate(keep):
        folds.append(fold_table(fold, clicks, mask, keep, item, epochs, config, work, say))
        say(
            f"table {fold + 1} of {len(keep)} without {int((~mask).sum()):,} clicks: done, "
            f"{time.monotonic() - started:.0f} s in all"
        )
    give_back_freed_memory()
    return CfTable(
        user=tables["user"],
        item=clicks.in_catalog(item),
        item_folds=torch.stack([clicks.in_catalog(fold) for fold in folds])
        if folds
        else item.new_zeros(0, clicks.catalog_size, config.dim),
        heldout_item=None if heldout is None else torch.from_numpy(heldout),
        split_fingerprint=manifest.fingerprint,
        settings=asdict(config),
        validation=validation,
        gensr_version=trainer.__version__,
    )


def finished_or(
    work: CfWork, name: str, train: Callable[[Slot], tuple[Tensors, dict[str, Any]]]
) -> tuple[Tensors, dict[str, Any]]:
    """What an interrupted run finished under `name`, or train it now and keep it."""
    finished, training = work.slot(name), work.slot(f"{name}-training")
    if saved := finished.load():
        return saved
    tensors, document = train(training)
    finished.save(tensors, document)
    training.remove()
    return tensors, document


def fold_table(
    fold: int,
    clicks: Edges,
    mask: np.ndarray,
    keep: list[np.ndarray],
    target: Tensor,
    epochs: int,
    config: CfConfig,
    work: CfWork,
    say: Notify,
) -> Tensor:
    """Item vectors [I, K] (of clicks.item_ids) that never saw the clicks outside `mask`, rotated into
    `target`'s space."""

    def train_fold(slot: Slot) -> tuple[Tensors, dict[str, Any]]:
        table = TableTrainer(clicks.keep(mask), config, say)
        shared_epochs = round(config.shared_epochs * epochs)
        if shared_epochs and (pair := fold ^ 1) < len(keep):
            table.load_state(
                *_shared_start(
                    min(fold, pair), clicks.keep(mask & keep[pair]), shared_epochs, config, work, say
                )
            )
        return {"item": rotate_onto(table.fit(epochs, slot)[1], target)}, {}

    return finished_or(work, f"fold-{fold}", train_fold)[0]["item"]


def _shared_start(
    first: int, clicks: Edges, epochs: int, config: CfConfig, work: CfWork, say: Notify
) -> tuple[Tensors, dict[str, Any]]:
    """State of a table that saw neither of two folds: where both of their tables start. It cannot tell
    either of them its held-out clicks."""

    def train_pair(slot: Slot) -> tuple[Tensors, dict[str, Any]]:
        table = TableTrainer(clicks, config, say)
        table.fit(epochs, slot)
        return table.state()

    return finished_or(work, f"folds-{first}-{first + 1}", train_pair)


def held_in(clicks: Edges, config: CfConfig, heldout: np.ndarray | None) -> list[np.ndarray]:
    """For each further table the mask [E] of the clicks it may see."""
    if config.holdout == "crossfit":
        fold = click_fold(clicks.users, clicks.items_in_catalog, config.num_folds)
        return [fold != f for f in range(config.num_folds)]
    if config.holdout == "last":
        assert heldout is not None
        return [heldout[clicks.users] != clicks.items_in_catalog]
    return []


def rotate_onto(source: Tensor, target: Tensor) -> Tensor:
    """source in the space of target, [I, K] each. Scores inside a table do not change; the tables become
    interchangeable for what reads them."""
    return source @ rotation(source, target)


def rotation(source: Tensor, target: Tensor) -> Tensor:
    """Orthogonal Procrustes: R [K, K] = argmin ‖source R − target‖ over rotations. Zero rows do not take
    part."""
    left, _, right = torch.linalg.svd(source.double().T @ target.double())
    return (left @ right).to(source.dtype)


def describe_cost(clicks: Edges, config: CfConfig, num_tables: int, batch_size: int, step_s: float) -> str:
    """What is about to be trained, its memory, and how long all of its steps take (from one measured step of
    `step_s` seconds)."""
    nodes, edges = clicks.num_users + clicks.num_items, len(clicks.users)
    steps = -(-edges // batch_size)
    epoch_s = step_s * steps
    vector_bytes = config.dim * 4
    # parameters, Adam's two moments, gradient, two layers of it, the best vectors so far and four that lie in
    # holes (measured); CSR twice, clicks and keys
    training_bytes = (
        nodes * vector_bytes * 11
        + edges * (2 * 8 + 4 * 8)
        + batch_size * vector_bytes * 8
        + clicks.num_items * vector_bytes * num_tables
    )
    written_bytes = (clicks.num_items + 2 * clicks.catalog_size) * vector_bytes * num_tables
    return (
        f"LightGCN on {edges:,} clicks of {clicks.num_users:,} users × {clicks.num_items:,} of "
        f"{clicks.catalog_size:,} items, "
        f"d {config.dim}, {config.layers} layers: "
        f"{num_tables} table{'s' if num_tables > 1 else ''} (holdout={config.holdout}), batch {batch_size:,} "
        f"({steps} step{'s' if steps > 1 else ''} an epoch of {in_time(epoch_s)}), at most "
        f"{config.max_epochs} epochs each: {in_time(epoch_s * config.max_epochs * num_tables)} without "
        f"validations, about {in_bytes(max(training_bytes, written_bytes))} of memory"
    )
