"""gensr cf: what each table may see, determinism, and the file."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.hashing import click_fold
from data_shards.prepare import prepare
from data_shards.schema import REC, SRC, Manifest, read_manifest
from tests.tiny_folder import make_tiny_folder
from tests.worlds import DAY_MS, START_MS, write_tables
from trainer.cf.build import (
    fold_table,
    held_in,
    last_clicks,
    rotate_onto,
    train_cf,
    train_tables,
    unique_rec_clicks,
)
from trainer.cf.partial import CfWork, Slot
from trainer.cf.training import TableTrainer, choose_batch_size, sampled_ndcg, unique_clicks
from trainer.config import CfConfig
from trainer.data.cf_table import cf_path, load_cf
from trainer.errors import ConfigError, DataError, RunError
from trainer.runtime.files import file_sha256

NUM_USERS, NUM_ITEMS, NUM_TOPICS = 60, 40, 4
MANIFEST = Manifest(
    raw={"counts": {"users": NUM_USERS, "items": NUM_ITEMS}, "split": {"fingerprint": "f" * 64}}, hash=""
)
QUICK = ("cf.max_epochs=2", "cf.dim=8", "overwrite=true")


def planted_columns(seed: int = 0) -> dict[str, np.ndarray]:
    """Ten clicks of each user, all on items of the user's topic (item % 4 == user % 4)."""
    generator = np.random.default_rng(seed)
    user = np.repeat(np.arange(NUM_USERS), 10)
    item = generator.integers(NUM_ITEMS // NUM_TOPICS, size=len(user)) * NUM_TOPICS + user % NUM_TOPICS
    return {
        "user": user,
        "item": item,
        "task": np.full(len(user), REC),
        "time": np.arange(len(user)),
        "event_id": np.arange(len(user)),
    }


def planted_valid(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """An item of the user's topic against nine of other topics."""
    generator = np.random.default_rng(seed)
    users = np.arange(NUM_USERS)
    own = generator.integers(NUM_ITEMS // NUM_TOPICS, size=NUM_USERS) * NUM_TOPICS + users % NUM_TOPICS
    others = (
        generator.integers(NUM_ITEMS // NUM_TOPICS, size=(NUM_USERS, 9)) * NUM_TOPICS
        + (users[:, None] + generator.integers(1, 4, (NUM_USERS, 9))) % 4
    )
    return users, np.concatenate([own[:, None], others], axis=1)


def work_in(folder: Path, save_every_s: float = 1e9) -> CfWork:
    return CfWork(folder / "partial", "test", save_every_s)


def train(config: CfConfig, folder: Path, messages: list[str] | None = None, save_every_s: float = 1e9):
    columns = planted_columns()
    say = messages.append if messages is not None else lambda message: None
    return train_tables(
        unique_rec_clicks(columns, MANIFEST),
        columns,
        planted_valid(),
        MANIFEST,
        config,
        work_in(folder, save_every_s),
        say,
    )


def test_the_full_table_finds_the_planted_topics(tmp_path):
    messages: list[str] = []
    table = train(CfConfig(holdout="none", dim=16), tmp_path, messages)
    assert sampled_ndcg(table.user, table.item, *planted_valid()) > 0.8  # chance is .45
    assert table.item_folds.shape == (0, NUM_ITEMS, 16)
    assert table.num_folds == 0
    assert re.search(r"an epoch of 0\.0*[1-9]\d? s\), at most \d+ epochs each: [\d.]+ s ", messages[0])
    assert re.search(r" without validations, about [\d.]+ [kM]B of memory$", messages[0])


def test_training_is_deterministic_and_depends_on_the_seed(tmp_path):
    config = CfConfig(dim=8, max_epochs=4, num_folds=2)
    configs = {"first": config, "second": config, "other": CfConfig(dim=8, max_epochs=4, num_folds=2, seed=1)}
    first, second, other = (train(each, tmp_path / name) for name, each in configs.items())
    assert torch.equal(first.item, second.item)
    assert torch.equal(first.item_folds, second.item_folds)
    assert not torch.equal(first.item, other.item)


def test_each_fold_table_is_trained_without_its_clicks(tmp_path):
    """Table f equals, up to rotation, a table trained on a log in which fold f's clicks never happened."""
    config = CfConfig(dim=8, max_epochs=6, num_folds=3)
    clicks = unique_rec_clicks(planted_columns(), MANIFEST)
    table = train(config, tmp_path)
    assert table.num_folds == 3
    for fold in range(3):
        part = clicks.keep(click_fold(clicks.users, clicks.items, 3) != fold)
        alone = TableTrainer(part, config, print).fit(
            table.validation["epochs"], work_in(tmp_path).slot(f"alone-{fold}")
        )[1]
        torch.testing.assert_close(
            table.item_folds[fold] @ table.item_folds[fold].T, alone @ alone.T, atol=1e-4, rtol=1e-4
        )


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "settings", [{}, {"shared_epochs": 0.5}, {"holdout": "last"}], ids=["crossfit", "shared", "last"]
)
def test_an_interrupted_training_ends_as_the_undisturbed_one(settings, tmp_path, monkeypatch):
    """Ended after each of its saves in turn: the same bits as without an interruption."""
    config = CfConfig(dim=8, max_epochs=8, num_folds=2, **settings)
    undisturbed = train(config, tmp_path / "undisturbed")
    save, ended = Slot.save, 0

    def save_and_die(slot: Slot, *args) -> None:
        save(slot, *args)
        raise Killed

    monkeypatch.setattr(Slot, "save", save_and_die)
    while True:
        try:
            table = train(config, tmp_path / "killed", save_every_s=0)
            break
        except Killed:
            ended += 1
    assert ended > 8
    assert torch.equal(table.user, undisturbed.user)
    assert torch.equal(table.item, undisturbed.item)
    assert torch.equal(table.item_folds, undisturbed.item_folds)
    assert table.validation == undisturbed.validation


def test_what_other_settings_left_behind_is_not_used(folder):
    stale = CfWork(cf_path(folder).parent / "partial", "another run", 0).slot("full")
    stale.save({"user": torch.zeros(1), "item": torch.zeros(1)}, {})
    messages: list[str] = []
    train_cf(folder, QUICK, messages.append)
    assert "holds full.safetensors of a training with other settings" in messages[0]
    assert load_cf(folder, read_manifest(folder)).item.shape[1] == 8
    assert not stale.path.exists()


def test_tables_that_share_a_start_never_saw_their_clicks(tmp_path):
    """Fold 0's table is the same whatever fold 0's clicks are."""
    config, columns = CfConfig(dim=8, max_epochs=4, num_folds=2, shared_epochs=0.5), planted_columns()
    clicks = unique_rec_clicks(columns, MANIFEST)
    in_fold = click_fold(clicks.users, clicks.items, 2) == 0
    tables = []
    for name, kept in (
        ("all", np.ones(len(in_fold), bool)),
        ("without", ~in_fold | (np.arange(len(in_fold)) % 2 == 0)),
    ):
        part, work = clicks.keep(kept), work_in(tmp_path / name)
        masks = held_in(part, config, None)
        target = torch.eye(NUM_ITEMS, 8)
        tables.append(fold_table(0, part, masks[0], masks, target, 4, config, work, print))
    assert torch.equal(*tables)


def test_last_holds_out_one_click_of_each_user(tmp_path):
    columns = planted_columns()
    table = train(CfConfig(dim=8, max_epochs=3, holdout="last"), tmp_path)
    assert table.item_folds.shape == (1, NUM_ITEMS, 8)
    assert table.num_folds == 0  # not folds of click_fold
    assert table.heldout_item is not None
    assert table.heldout_item.tolist() == [
        int(columns["item"][columns["user"] == user][-1]) for user in range(NUM_USERS)
    ]


def test_last_click_is_by_time_then_event_and_ignores_searches():
    columns = {
        "user": np.array([0, 0, 0, 0, 2]),
        "item": np.array([10, 11, 12, 13, 14]),
        "task": np.array([REC, REC, REC, SRC, SRC]),
        "time": np.array([5, 9, 9, 20, 1]),
        "event_id": np.array([0, 2, 1, 3, 4]),
    }
    assert last_clicks(columns, 3).tolist() == [11, -1, -1]


def test_folds_partition_the_clicks():
    clicks = unique_rec_clicks(planted_columns(), MANIFEST)
    masks = held_in(clicks, CfConfig(num_folds=4), None)
    assert np.stack([~mask for mask in masks]).sum(0).tolist() == [1] * len(clicks.users)


def test_unclicked_items_and_an_empty_fold_are_zero_rows(tmp_path):
    columns = {key: values[:10] for key, values in planted_columns().items()}  # one user
    clicks = unique_rec_clicks(columns, MANIFEST)
    user, item = TableTrainer(clicks, CfConfig(dim=8), print).fit(2, work_in(tmp_path).slot("table"))
    table = clicks.in_catalog(item)
    assert table.shape == (NUM_ITEMS, 8)
    assert not table[np.setdiff1d(np.arange(NUM_ITEMS), columns["item"])].any()
    assert not user[1:].any()
    assert table[columns["item"]].abs().sum(1).gt(0).all()
    user, item = TableTrainer(clicks.keep(np.zeros(len(clicks.users), bool)), CfConfig(dim=8), print).fit(
        2, work_in(tmp_path).slot("table")
    )
    assert not user.any()
    assert not item.any()


def test_items_that_nobody_clicked_cost_no_row_but_are_ranked() -> None:
    """Early stopping sees what a ranking of catalogue items would, those without a vector included."""
    clicks = unique_clicks(
        np.array([0, 0, 1, 1]), np.array([30, 3, 30, 7]), num_users=3, catalog_size=NUM_ITEMS
    )
    assert clicks.item_ids.tolist() == [3, 7, 30]
    assert clicks.items_in_catalog.tolist() == [3, 30, 7, 30]
    assert clicks.rows_of(np.array([[30, 0], [7, 39]])).tolist() == [[2, 3], [1, 3]]
    generator = torch.Generator().manual_seed(0)
    user, item = torch.randn(3, 8, generator=generator), torch.randn(3, 8, generator=generator)
    users, candidates = np.arange(3), np.array([[30, 0, 7], [3, 39, 30], [12, 7, 3]])
    assert sampled_ndcg(user, item, users, clicks.rows_of(candidates)) == sampled_ndcg(
        user, clicks.in_catalog(item), users, candidates
    )


def test_clicks_are_sorted_not_hashed() -> None:
    """np.unique of numpy ≥ 2.3 takes 60 sorts at this size, and 40 s at 15 million clicks."""
    generator, size = np.random.default_rng(0), 200_000
    users, items = generator.integers(10_000, size=size), generator.integers(300_000, size=size)
    started_s = time.process_time()
    np.sort(users * 300_000 + items)
    sorted_s = time.process_time()
    clicks = unique_clicks(users, items, 10_000, 300_000)
    assert time.process_time() - sorted_s < 15 * (sorted_s - started_s)
    pairs = set(zip(clicks.users.tolist(), clicks.items_in_catalog.tolist(), strict=True))
    assert pairs == set(zip(users.tolist(), items.tolist(), strict=True))
    assert len(pairs) == len(clicks.users)
    assert len(clicks.item_ids) == clicks.items.max() + 1 == len({item for _, item in pairs})


def test_rotation_keeps_scores_and_undoes_a_rotation():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(50, 6, generator=generator)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    torch.testing.assert_close(rotate_onto(target @ turn, target), target, atol=1e-5, rtol=1e-5)
    source = torch.randn(50, 6, generator=generator)
    turned = rotate_onto(source, target)
    torch.testing.assert_close(turned @ turned.T, source @ source.T, atol=1e-4, rtol=1e-4)


def test_negatives_avoid_the_users_clicks():
    users = np.repeat([0, 1], [NUM_ITEMS - 20, 3])
    items = np.concatenate([np.arange(NUM_ITEMS - 20), [0, 1, 2]])
    trainer = TableTrainer(unique_clicks(users, items, 2, NUM_ITEMS), CfConfig(dim=8), print)
    negative = trainer.draw_negatives(torch.zeros(4000, dtype=torch.int64))
    # half of the draws without rejection; 2^-4 after three further rounds
    assert (negative < NUM_ITEMS - 20).double().mean() < 0.1
    assert trainer.draw_negatives(torch.ones(4000, dtype=torch.int64)).ge(3).double().mean() > 0.999


@pytest.mark.parametrize(
    ("clicks", "batch_size"),
    [(0, 512), (1_000, 512), (41_858, 2048), (2_500_000, 131_072), (14_600_000, 262_144)],
)
def test_batch_size_grows_with_the_graph(clicks, batch_size):
    assert choose_batch_size(clicks) == batch_size


# ---- the verb and its file ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return make_tiny_folder(tmp_path)


def test_a_table_of_tomorrow_lies_in_the_space_of_todays(tmp_path):
    """Another seed is another basis. Rotated onto yesterday's table, items lie near where they did, and every
    score is what it was without."""
    raw = write_tables(tmp_path / "raw", users=40, items=80)
    rows = [json.loads(line) for line in (raw / "events.jsonl").read_text().splitlines()]
    early = [row for row in rows if row["time"] < START_MS + 7 * DAY_MS]
    first = tmp_path / "first"
    first.mkdir()
    (first / "items.jsonl").write_bytes((raw / "items.jsonl").read_bytes())
    (first / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in early))
    prepare("tables", first, tmp_path / "old", ["vocab_size=300", "num_negatives=10"])
    prepare("tables", raw, tmp_path / "new", append=tmp_path / "old")
    quick = ["cf.dim=8", "cf.max_epochs=60", "cf.patience=60", "cf.num_folds=2"]
    train_cf(tmp_path / "old", [*quick, "cf.holdout=none"])
    train_cf(tmp_path / "new", [*quick, "cf.seed=1", "cf.holdout=none"])
    apart = load_cf(tmp_path / "new", read_manifest(tmp_path / "new"))
    train_cf(tmp_path / "new", [*quick, "cf.seed=1", f"cf.onto={tmp_path / 'old'}", "overwrite=true"])
    turned = load_cf(tmp_path / "new", read_manifest(tmp_path / "new"))
    before = load_cf(tmp_path / "old", read_manifest(tmp_path / "old")).item

    def likeness(table):
        return float(torch.cosine_similarity(table[: len(before)], before, dim=1).mean())

    torch.testing.assert_close(turned.user @ turned.item.T, apart.user @ apart.item.T, atol=1e-5, rtol=1e-4)
    assert likeness(apart.item) + 0.4 < likeness(turned.item)
    assert min(likeness(fold) for fold in turned.item_folds) > likeness(apart.item) + 0.2
    with pytest.raises(ConfigError, match="does not go on from it"):
        train_cf(tmp_path / "old", [*quick, f"cf.onto={tmp_path / 'new'}", "overwrite=true"])
    with pytest.raises(ConfigError, match=r"Use cf\.dim=8"):
        train_cf(tmp_path / "new", ["cf.dim=4", f"cf.onto={tmp_path / 'old'}", "overwrite=true"])


def test_train_cf_writes_a_table_that_load_cf_reads(folder):
    manifest = read_manifest(folder)
    path = train_cf(folder, [*QUICK, "cf.num_folds=3"])
    table = load_cf(folder, manifest)
    assert path == cf_path(folder)
    assert table.user.shape == (manifest.num_users, 8)
    assert table.item_folds.shape == (3, manifest.num_items, 8)
    assert table.settings["num_folds"] == table.num_folds == 3
    assert table.split_fingerprint == manifest.fingerprint
    assert table.validation["num_events"] == 20
    light = load_cf(folder, manifest, users=False, folds=False)
    assert torch.equal(light.item, table.item)
    assert light.user.shape == (0, 8)
    assert light.item_folds.shape == (0, manifest.num_items, 8)
    # no temporary file
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, "lightgcn.sha256"]
    assert path.with_suffix(".sha256").read_text().split() == [
        file_sha256(path),
        str(path.stat().st_size),
        path.name,
    ]


def test_an_existing_table_is_reused_or_refused(folder):
    messages: list[str] = []
    path = train_cf(folder, QUICK)
    before = path.read_bytes()
    assert train_cf(folder, QUICK[:2], messages.append) == path
    assert "up to date" in messages[-1]
    with pytest.raises(RunError, match=r"cf\.dim 8 → 16.*overwrite=true"):
        train_cf(folder, ["cf.max_epochs=2", "cf.dim=16"])
    assert path.read_bytes() == before
    digest = file_sha256(path)
    path.with_suffix(".sha256").unlink()
    train_cf(folder, QUICK[:2])
    assert path.with_suffix(".sha256").read_text().split()[0] == digest
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(RunError, match=r"differs from its checksum in lightgcn\.sha256.*overwrite=true"):
        train_cf(folder, QUICK[:2])
    train_cf(folder, ["cf.max_epochs=2", "cf.dim=16", "overwrite=true"])
    assert load_cf(folder, read_manifest(folder)).item.shape[1] == 16


def test_missing_foreign_and_corrupt_tables_are_named(folder):
    manifest, path = read_manifest(folder), cf_path(folder)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["split"]["fingerprint"] = "1" * 64
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match="another split"):
        load_cf(folder, read_manifest(folder))
    with pytest.raises(RunError, match=r"another split.*overwrite=true"):
        train_cf(folder, QUICK[:2])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        load_cf(folder, manifest)
    path.unlink()
    with pytest.raises(DataError, match="gensr cf"):
        load_cf(folder, manifest)


def test_settings_mistakes_are_reported_before_anything_is_read(folder):
    with pytest.raises(ConfigError, match=r"cf\.dims.*unknown key"):
        train_cf(folder, ["cf.dims=3"])
