"""`gensr cf`: the collaborative-filtering table E_c of a prepared folder, and the tables training reads instead of it.

    training rec clicks ─▶ full table (user, item): inference, LightGCN baseline
                       └─▶ without fold f's clicks (crossfit) or each user's last one (last) ─▶ rotated into the full table's space ─▶ item_folds

Why more than one: a table that has seen a training target gives it away (history · target is far larger than it will be in the future), so the
model learns to trust a signal that is not there later. A training event therefore reads a table that never saw its click.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import trainer
from data_shards import settings as s
from data_shards.hashing import click_fold, derive_seed, mix64
from data_shards.schema import REC, Manifest, read_manifest
from trainer.cf_table import CfTable, cf_path, load_cf, save_cf
from trainer.config import CfConfig, CfRoot
from trainer.data import split_columns, train_clicks
from trainer.errors import DataError, RunError
from trainer.metrics import expected_ranks, metric_values
from trainer.model.lightgcn import Graph, LightGCN, build_graph

MAX_VALID_EVENTS = 20_000  # of early stopping: a fixed hashed sample; NDCG@10 is then known to ± .005
MIN_STEPS_BETWEEN_VALIDATIONS = 50
VALID_CHUNK = 2048  # events scored at once: 2048 × 100 candidates × 64 floats = 52 MB

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Clicks:
    """Unique training rec clicks, sorted by (user, item)."""

    users: np.ndarray  # [E] int64
    items: np.ndarray  # [E] int64
    num_users: int
    num_items: int

    def keep(self, mask: np.ndarray) -> "Clicks":
        return Clicks(self.users[mask], self.items[mask], self.num_users, self.num_items)

    @property
    def keys(self) -> np.ndarray:
        return self.users * self.num_items + self.items


def train_cf(folder: str | Path, overrides: Sequence[str] = (), progress: Progress | None = None) -> Path:
    """Train and write OUT/cf/lightgcn.safetensors; returns its path. overrides: "cf.holdout=last", …, "overwrite=true".

    An existing table of the same split and settings is kept. Deterministic on CPU for given settings.
    Raises DataError for a folder without training rec clicks, RunError for an existing table of other settings or split without overwrite=true.
    """
    say = progress or (lambda message: None)
    root: CfRoot = s.load(CfRoot, overrides=overrides)
    config, manifest = root.cf, read_manifest(folder)
    path = cf_path(folder)
    if path.is_file() and not root.overwrite:
        _check_existing(folder, manifest, config)
        say(f"{path} is up to date: same split, same settings. Nothing to do (overwrite=true trains it again).")
        return path
    columns = train_clicks(folder, manifest)
    clicks = unique_rec_clicks(columns, manifest)
    if len(clicks.users) == 0:
        raise DataError(
            f"{folder}: no recommendation click in the training split, LightGCN has nothing to learn from. Look at: gensr inspect {folder}"
        )
    table = train_tables(clicks, columns, valid_candidates(folder, manifest, config.seed), manifest, config, say)
    save_cf(folder, table)
    say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


def _check_existing(folder: str | Path, manifest: Manifest, config: CfConfig) -> None:
    try:
        existing = load_cf(folder, manifest, users=False, folds=False)
    except DataError as error:
        raise RunError(str(error)) from error
    theirs, ours = existing.settings, asdict(config)
    changed = [f"cf.{key} {theirs.get(key)!r} → {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
    if changed:
        raise RunError(f"{cf_path(folder)} was trained with other settings ({', '.join(changed)}). Add overwrite=true to replace it.")


def unique_rec_clicks(columns: dict[str, np.ndarray], manifest: Manifest) -> Clicks:
    """Edges of the graph: each (user, item) of a training rec event once."""
    rec = columns["task"] == REC
    keys = np.unique(columns["user"][rec].astype(np.int64) * manifest.num_items + columns["item"][rec])
    return Clicks(keys // manifest.num_items, keys % manifest.num_items, manifest.num_users, manifest.num_items)


def last_clicks(columns: dict[str, np.ndarray], num_users: int) -> np.ndarray:
    """Each user's last training rec click by (time, event_id) → [num_users] int64 items, -1 for users without one."""
    rec = np.flatnonzero(columns["task"] == REC)
    order = rec[np.lexsort((columns["event_id"][rec], columns["time"][rec]))]
    heldout = np.full(num_users, -1, np.int64)
    heldout[columns["user"][order]] = columns["item"][order]  # later writes win
    return heldout


def valid_candidates(folder: str | Path, manifest: Manifest, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Users [n] and candidates [n, 1 + num_negatives] (the positive first) of validation rec events, at most MAX_VALID_EVENTS by hash."""
    columns = split_columns(folder, manifest, "valid", ["event_id", "user", "task", "item", "negatives"])
    rec = np.flatnonzero(columns["task"] == REC)
    if len(rec) > MAX_VALID_EVENTS:
        rec = rec[np.argsort(mix64(columns["event_id"][rec], derive_seed(seed, 23)), kind="stable")[:MAX_VALID_EVENTS]]
    if len(rec) == 0:
        return np.zeros(0, np.int64), np.zeros((0, 1 + manifest.num_negatives), np.int64)
    candidates = np.concatenate([columns["item"][rec, None], columns["negatives"][rec]], axis=1)
    return columns["user"][rec].astype(np.int64), candidates.astype(np.int64)


# ---- training --------------------------------------------------------------------------------------------------


def train_tables(
    clicks: Clicks,
    columns: dict[str, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
    manifest: Manifest,
    config: CfConfig,
    say: Progress,
) -> CfTable:
    """The full table, then those of cf.holdout for as many epochs as the full one took (validation is asked once)."""
    heldout = last_clicks(columns, clicks.num_users) if config.holdout == "last" else None
    keep = held_in(clicks, config, heldout)
    full = _Trainer(clicks, config, say)
    say(describe_cost(clicks, config, 1 + len(keep), full.batch_size, full.step_seconds()))
    started = time.monotonic()
    user, item, validation = full.fit_until_valid(valid)
    seconds = time.monotonic() - started
    say(f"full table: best after {validation['epochs']} epochs, validation NDCG@10 {validation['ndcg@10']} (sampled), {seconds:.0f} s")
    folds = []
    for fold, mask in enumerate(keep):
        part = clicks.keep(mask)
        fold_item = _Trainer(part, config, say).fit(validation["epochs"])[1]
        folds.append(rotate_onto(fold_item, item))
        say(f"table {fold + 1} of {len(keep)} without {int((~mask).sum()):,} clicks: done, {time.monotonic() - started:.0f} s in all")
    return CfTable(
        user=user,
        item=item,
        item_folds=torch.stack(folds) if folds else item.new_zeros(0, *item.shape),
        heldout_item=None if heldout is None else torch.from_numpy(heldout),
        split_fingerprint=manifest.fingerprint,
        settings=asdict(config),
        validation=validation,
        gensr_version=trainer.__version__,
    )


def held_in(clicks: Clicks, config: CfConfig, heldout: np.ndarray | None) -> list[np.ndarray]:
    """For each further table the mask [E] of the clicks it may see."""
    if config.holdout == "crossfit":
        fold = click_fold(clicks.users, clicks.items, config.num_folds)
        return [fold != f for f in range(config.num_folds)]
    if config.holdout == "last":
        assert heldout is not None
        return [heldout[clicks.users] != clicks.items]
    return []


def rotate_onto(source: Tensor, target: Tensor) -> Tensor:
    """Orthogonal Procrustes: source @ R with R = argmin ‖source R − target‖ over rotations, [I, K] each.

    Scores inside a table do not change; the tables become interchangeable for what reads them. Zero rows do not take part.
    """
    left, _, right = torch.linalg.svd(source.double().T @ target.double())
    return source @ (left @ right).to(source.dtype)


def choose_batch_size(num_clicks: int) -> int:
    """About a thirtieth of an epoch, as a power of two: 512 … 2^18. A step costs passes over the whole graph, so large graphs need few large steps."""
    return 1 << min(max((num_clicks // 32).bit_length(), 9), 18)


def describe_cost(clicks: Clicks, config: CfConfig, num_tables: int, batch_size: int, step_s: float) -> str:
    """What is about to be trained, its memory, and the longest it can take (from one measured step of `step_s` seconds)."""
    nodes, edges = clicks.num_users + clicks.num_items, len(clicks.users)
    epoch_s = step_s * -(-edges // batch_size)
    # parameters, gradient, Adam's two moments, output and its gradient, three working copies; CSR twice, clicks and their keys
    training_bytes = nodes * config.dim * 4 * 9 + edges * (2 * 8 + 4 * 8) + batch_size * config.dim * 4 * 8
    kept_bytes = clicks.num_items * config.dim * 4 * (2 * num_tables)  # finished tables, and the copy being written
    return (
        f"LightGCN on {edges:,} clicks of {clicks.num_users:,} users × {clicks.num_items:,} items, d {config.dim}, {config.layers} layers: "
        f"{num_tables} table{'s' if num_tables > 1 else ''} (holdout={config.holdout}), batch {batch_size:,} "
        f"({-(-edges // batch_size)} steps an epoch of {epoch_s:.1f} s), at most {config.max_epochs} epochs each: "
        f"at most {epoch_s * config.max_epochs * num_tables / 60:.1f} min, about {(training_bytes + kept_bytes) / 1e9:.2f} GB"
    )


class _Trainer:
    """One table: BPR over all clicks, uniform negatives that the user has not clicked *in this table's graph*.

    A held-out click may be drawn as a negative like any unknown item: avoiding it would tell the table about it.
    """

    def __init__(self, clicks: Clicks, config: CfConfig, say: Progress) -> None:
        self.clicks, self.config, self.say = clicks, config, say
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.graph: Graph = build_graph(clicks.users, clicks.items, clicks.num_users, clicks.num_items).to(self.device)
        # every table starts from the same vectors, so their spaces differ little even before the rotation
        self.model = LightGCN(clicks.num_users, clicks.num_items, config.dim, config.layers, derive_seed(config.seed, 1)).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True)
        self.generator = torch.Generator(self.device).manual_seed(derive_seed(config.seed, 2))
        self.users, self.items, self.keys = (torch.from_numpy(a).to(self.device) for a in (clicks.users, clicks.items, clicks.keys))
        self.batch_size = config.batch_size or choose_batch_size(len(clicks.users))
        self.steps_per_epoch = -(-len(clicks.users) // self.batch_size)

    def fit(self, num_epochs: int) -> tuple[Tensor, Tensor]:
        """→ user and item vectors on the CPU; zeros when there is no click (a fold of a tiny log)."""
        for _ in range(num_epochs if len(self.users) else 0):
            self.epoch()
        return self.vectors()

    def fit_until_valid(self, valid: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Early stopping on validation NDCG@10. Without validation rec events: cf.max_epochs. → best vectors, what was seen."""
        config = self.config
        if len(valid[0]) == 0:
            user, item = self.fit(config.max_epochs)
            return user, item, {"epochs": config.max_epochs, "ndcg@10": None, "num_events": 0, "curve": []}
        every = max(1, round(MIN_STEPS_BETWEEN_VALIDATIONS / self.steps_per_epoch))
        best: tuple[float, int, Tensor, Tensor] | None = None
        curve: list[tuple[int, float]] = []
        for epoch in range(1, config.max_epochs + 1):
            loss = self.epoch()
            if epoch % every and epoch != config.max_epochs:
                continue
            user, item = self.vectors()
            ndcg = sampled_ndcg(user, item, *valid)
            curve.append((epoch, round(ndcg, 5)))
            if best is None or ndcg > best[0]:
                best = (ndcg, epoch, user, item)
            self.say(f"epoch {epoch}: loss {loss:.4f}, validation NDCG@10 {ndcg:.4f} (best {best[0]:.4f} at {best[1]})")
            if sum(e > best[1] for e, _ in curve) >= config.patience:
                break
        assert best is not None
        figures = {"epochs": best[1], "ndcg@10": round(best[0], 5), "num_events": len(valid[0]), "curve": curve}
        return best[2], best[3], figures

    def epoch(self) -> float:
        """One pass over the clicks in random order → the last batch's loss."""
        order = torch.randperm(len(self.users), generator=self.generator, device=self.device)
        loss = torch.zeros(())
        for index in order.split(self.batch_size):
            user = self.users[index]
            loss = self.model.loss(self.graph, user, self.items[index], self.draw_negatives(user), self.config.reg)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        value = float(loss.detach())
        if not np.isfinite(value):
            raise RunError(f"LightGCN's loss is {value}: lower cf.lr (now {self.config.lr}).")
        return value

    def step_seconds(self) -> float:
        """Seconds of one step, measured without changing weights or random numbers."""
        user, item = self.users[: self.batch_size], self.items[: self.batch_size]
        started = time.monotonic()
        self.model.loss(self.graph, user, item, item, self.config.reg).backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.model.zero_grad(set_to_none=True)
        return time.monotonic() - started

    def draw_negatives(self, user: Tensor, rounds: int = 3) -> Tensor:
        """Uniform items; those clicked by the user are drawn again, `rounds` times at most (a user may have clicked nearly everything)."""
        num_items = self.clicks.num_items
        negative = torch.randint(num_items, user.shape, generator=self.generator, device=self.device)
        for _ in range(rounds):
            wanted = user * num_items + negative
            place = torch.searchsorted(self.keys, wanted).clamp_(max=len(self.keys) - 1)
            again = torch.randint(num_items, user.shape, generator=self.generator, device=self.device)
            negative = torch.where(self.keys[place] == wanted, again, negative)
        return negative

    @torch.no_grad()
    def vectors(self) -> tuple[Tensor, Tensor]:
        users_UK, items_IK = self.model(self.graph)
        return users_UK.cpu(), items_IK.cpu()


def sampled_ndcg(user: Tensor, item: Tensor, valid_users: np.ndarray, valid_candidates: np.ndarray) -> float:
    """NDCG@10 of e_u · e_i over the stored candidates, positive in column 0."""
    ranks = []
    for start in range(0, len(valid_users), VALID_CHUNK):
        users_B = torch.from_numpy(valid_users[start : start + VALID_CHUNK])
        candidates_BC = torch.from_numpy(valid_candidates[start : start + VALID_CHUNK])
        scores_BC = torch.einsum("bk,bck->bc", user[users_B], item[candidates_BC])
        labels_BC = torch.zeros_like(scores_BC)
        labels_BC[:, 0] = 1
        ranks.append(expected_ranks(scores_BC, labels_BC)[0])
    return float(metric_values(torch.cat(ranks))[:, 4].mean())
