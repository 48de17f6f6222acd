"""Batches of the training stream, negatives, evaluation batches, damaged shards. (The order of events:
test_order.py, test_resume.py.)"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_shards.hashing import click_fold
from data_shards.schema import Manifest, read_manifest
from tests.tiny_folder import change_events, make_tiny_folder
from trainer.batch import no_tables, query_terms_of
from trainer.cf.build import held_in, last_clicks, unique_rec_clicks
from trainer.config import CfConfig, DataConfig
from trainer.data import EvalStream, TrainStream, blocks, prefetched
from trainer.data.blocks import check_ids, check_shard
from trainer.data.folder import PreparedFolder
from trainer.data.item_tables import _at_least_one_row
from trainer.data.negatives import NegativeSampler
from trainer.errors import ConfigError, DataError

CONFIG = DataConfig(history_max=6, num_negatives=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny"))


def test_a_batch_does_not_depend_on_ranks(folder: Path) -> None:
    """Negatives and histories of an event too, not only its id."""
    read_manifest(folder)

    def by_event(ranks: int) -> dict[int, tuple[list[int], list[int]]]:
        found = {}
        for rank in range(ranks):
            for batch in itertools.islice(
                TrainStream(PreparedFolder.at(folder), CONFIG, 5, 24, 24 // ranks, rank, ranks), 4
            ):
                for row in range(batch.num_events):
                    found[int(batch.event_id[row])] = (
                        batch.candidates[row].tolist(),
                        batch.history_items[row].tolist(),
                    )
        return found

    assert by_event(1) == by_event(4)


def test_negatives_avoid_positive_history_and_each_other(folder: Path) -> None:
    read_manifest(folder)
    for batch in itertools.islice(TrainStream(PreparedFolder.at(folder), CONFIG, 5, 48, 48), 6):
        for row in range(48):
            candidates = batch.candidates[row].tolist()
            history = batch.history_items[row][batch.history_mask[row]].tolist()
            assert len(set(candidates)) == len(candidates) and not set(candidates[1:]) & set(history)
            assert batch.labels[row].tolist() == [1.0, 0, 0, 0, 0]


def test_negatives_change_with_the_epoch_and_follow_popularity() -> None:
    clicks = np.array([0] * 50 + [1000] * 50)
    sampler = NegativeSampler(100, 4, seed=1, kind="popularity", clicks=clicks, alpha=1.0)
    ids, nobody = np.arange(500), np.zeros((500, 1), np.int64)
    first = sampler.draw(ids, np.zeros(500, np.int64), nobody[:, 0], nobody, nobody.astype(bool))
    second = sampler.draw(ids, np.ones(500, np.int64), nobody[:, 0], nobody, nobody.astype(bool))
    assert (first != second).mean() > 0.9 and (first >= 50).mean() > 0.98
    uniform = NegativeSampler(100, 4, seed=1).draw(
        ids, np.zeros(500, np.int64), nobody[:, 0], nobody, nobody.astype(bool)
    )
    counts = np.bincount(uniform.ravel(), minlength=100)
    assert counts[0] == 0 and counts[1:].min() > 3 and abs((uniform >= 50).mean() - 0.5) < 0.06


def test_fold_is_that_of_the_click(folder: Path) -> None:
    read_manifest(folder)
    batch = next(iter(TrainStream(PreparedFolder.at(folder), CONFIG, 5, 24, 24, num_folds=2)))
    assert batch.fold.tolist() == click_fold(batch.user.numpy(), batch.candidates[:, 0].numpy(), 2).tolist()
    assert next(iter(TrainStream(PreparedFolder.at(folder), CONFIG, 5, 24, 24))).fold.tolist() == [-1] * 24


def test_held_out_clicks_alone_are_trained_on(folder: Path) -> None:
    manifest = read_manifest(folder)
    columns = PreparedFolder.at(folder).columns("train", ["user", "task", "item", "event_id"])
    heldout = np.full(manifest.num_users, -1)
    recommended = columns["task"] == 0
    heldout[columns["user"][recommended]] = columns["item"][recommended]  # the last one wins
    stream = TrainStream(PreparedFolder.at(folder), CONFIG, 5, 4, 4, heldout_item=heldout)
    assert 0 < stream.num_events < 96
    seen = [
        event
        for batch in itertools.islice(stream, stream.num_events // 4)
        for event in batch.event_id.tolist()
    ]
    usable = columns["event_id"][(columns["task"] == 1) | (heldout[columns["user"]] == columns["item"])]
    assert len(set(seen)) == len(seen) and set(seen) <= set(usable.tolist())


@pytest.mark.parametrize("holdout", ["last", "crossfit"])
def test_no_event_reads_a_cf_table_that_has_seen_its_click(tmp_path: Path, holdout: Any) -> None:
    """Slowly, click by click, in a log where users search for what they were recommended."""
    folder = PreparedFolder.at(make_tiny_folder(tmp_path, num_train=600, num_users=2, num_items=100))
    config = CfConfig(holdout=holdout, num_folds=3)
    columns = folder.columns("train", ["user", "item", "task", "time", "event_id"])
    clicks = unique_rec_clicks(columns, folder.manifest)
    last = last_clicks(columns, folder.manifest.num_users) if holdout == "last" else None
    pairs = list(zip(clicks.users.tolist(), clicks.items_in_catalog.tolist(), strict=True))
    tables = [
        {pair for pair, is_in in zip(pairs, mask, strict=True) if is_in}
        for mask in held_in(clicks, config, last)
    ]
    num_folds = 3 if holdout == "crossfit" else 0
    stream = TrainStream(folder, CONFIG, 5, 4, 4, num_folds=num_folds, heldout_item=last)
    tasks = set()
    for batch in itertools.islice(stream, -(-stream.num_events // 4)):
        clicked = batch.candidates[:, 0].tolist()
        for user, item, fold in zip(batch.user.tolist(), clicked, batch.fold.tolist(), strict=True):
            assert (user, item) not in tables[fold]
        tasks |= set(batch.task.tolist())
    assert tasks == {0, 1}
    if holdout == "crossfit":
        assert stream.num_events == 600


@pytest.mark.parametrize(
    ("name", "value"), [("item", -5), ("item", 130), ("user", 24), ("query", 12), ("history_items", 130)]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_ids_that_the_folder_does_not_have_are_named(
    tmp_path: Path, name: str, value: int, split: str
) -> None:
    folder = make_tiny_folder(tmp_path)
    blocks = itertools.count()

    def spoil(block: pa.Table) -> pa.Table:
        column = block[name].to_pylist()
        if next(blocks) == 1:
            column[7] = [value] if isinstance(column[7], list) else value
        place = block.column_names.index(name)
        return block.set_column(place, name, pa.array(column, block.schema.field(name).type))

    change_events(folder, split, spoil)
    opened = PreparedFolder.at(folder)
    stream = (
        TrainStream(opened, CONFIG, 5, 24, 24) if split == "train" else EvalStream(opened, split, CONFIG, 8)
    )
    where = rf"{split}-000000\.tar: block 1: {name} {value} is not among the folder's ids"
    with pytest.raises(DataError, match=where):
        list(itertools.islice(stream, 8))
    with pytest.raises(DataError, match=where):
        opened.columns(split, [name])


def test_hard_negatives_are_among_the_checked_ids(tmp_path: Path) -> None:
    hard = pa.array([[3, 130]], pa.list_(pa.int32(), 2))
    with pytest.raises(DataError, match=r"x: hard_negatives 130 is not among"):
        check_ids(pa.table({"hard_negatives": hard}), read_manifest(make_tiny_folder(tmp_path)), "x")


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("max_events", [0, 17, 1000])
def test_evaluation_sees_each_event_once_with_equal_batches(
    folder: Path, ranks: int, max_events: int
) -> None:
    manifest = read_manifest(folder)
    seen: list[int] = []
    places = []
    lengths = set()
    for rank in range(ranks):
        stream = EvalStream(PreparedFolder.at(folder), "test", CONFIG, 8, rank, ranks, max_events)
        lengths.add(len(stream))
        again = [batch.event_id.tolist() for batch in stream]
        for batch, ids in zip(stream, again, strict=True):
            assert batch.event_id.tolist() == ids  # a second pass is the first
            assert (
                batch.num_events == 8
                and batch.candidates.shape == (8, 100)
                and (batch.labels.sum(1) == 1).all()
            )
            seen += batch.event_id.tolist()
            places += batch.labels.argmax(1).tolist()
    real = [event for event in seen if event >= 0]
    assert len(lengths) == 1 and len(real) == len(set(real)) == min(
        max_events or 1000, manifest.num_events("test")
    )
    assert len(set(places)) > 5  # the clicked item stands anywhere


def test_micro_batch_that_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="micro_batch_size"):
        TrainStream(PreparedFolder.at(folder), CONFIG, 5, 24, 7)


def _damaged(folder: Path, target: Path, change: str) -> tuple[Path, Manifest]:
    import shutil

    shutil.copytree(folder, target)
    shard = target / "shards" / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    if change == "none":
        pass
    elif change == "missing":
        shard.unlink()
    elif change == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 3] ^= 0xFF
        shard.write_bytes(content)
    return target, read_manifest(target)


@pytest.mark.parametrize(
    ("change", "message"), [("missing", "missing shard"), ("truncated", "truncated"), ("corrupt", "checksum")]
)
def test_a_damaged_shard_is_named(folder: Path, tmp_path: Path, change: str, message: str) -> None:
    target, _manifest = _damaged(folder, tmp_path / "copy", change)
    with pytest.raises(DataError, match=message) as error:
        next(iter(prefetched(TrainStream(PreparedFolder.at(target), CONFIG, 5, 24, 24))))
    assert "train-000000.tar" in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_is_deleted_in_training_is_named_by_either_loader(
    folder: Path, tmp_path: Path, num_workers: int
) -> None:
    """As soon as it is opened again; until then its events are those of the file that was open."""
    target, _manifest = _damaged(folder, tmp_path / "copy", "none")
    stream = TrainStream(PreparedFolder.at(target), CONFIG, 5, 24, 24)
    undisturbed = [batch.event_id.tolist() for batch in itertools.islice(stream, 80)]
    batches = prefetched(stream, num_workers)
    seen = [next(batches).event_id.tolist()]
    (target / "shards" / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        seen.extend(batch.event_id.tolist() for batch in itertools.islice(batches, 80))
    assert seen == undisturbed[: len(seen)]


@pytest.mark.parametrize("step", ["stat", "read"])
def test_a_shard_that_is_deleted_while_it_is_checked_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target, manifest = _damaged(folder, tmp_path / "copy", "none")
    shard, is_file = target / "shards" / "train-000000.tar", Path.is_file

    def deleted(path: Path) -> bool:
        there = is_file(path)
        if path == shard:
            path.unlink()
        return there

    if step == "stat":
        monkeypatch.setattr(Path, "is_file", deleted)
    else:
        monkeypatch.setattr(blocks, "file_sha256", lambda path: deleted(path) and path.read_bytes())
    with pytest.raises(DataError, match=r"train-000000\.tar: missing shard"):
        check_shard(target, manifest.shards("train")[0])


def test_a_damaged_shard_is_skipped_and_counted_when_asked(prepared: Path, tmp_path: Path) -> None:
    manifest = read_manifest(prepared)
    assert len(manifest.shards("train")) > 1
    target, manifest = _damaged(prepared, tmp_path / "copy", "corrupt")
    config = DataConfig(history_max=6, on_bad_shard="skip")
    with pytest.warns(UserWarning, match="skipped"):
        stream = TrainStream(PreparedFolder.at(target), config, 5, 8, 8)
    assert stream.num_events == manifest.num_events("train") - manifest.shards("train")[0].num_events
    assert next(iter(stream)).num_events == 8


def test_words_reach_the_model(prepared_words: Path) -> None:
    from trainer.data.cf_table import CfTable
    from trainer.data.item_tables import load_tables

    manifest = read_manifest(prepared_words)
    table = torch.randn(manifest.num_items, 16)
    cf = CfTable(
        torch.zeros(0, 16), table, table[None][:0], None, manifest.fingerprint, {"holdout": "none"}, {}, "0"
    )
    tables = load_tables(prepared_words, manifest, cf)
    assert (
        manifest.num_words > 0
        and tables.item_words.shape[0] == manifest.num_items
        and int(tables.item_words.int().max()) <= manifest.num_words
    )
    assert int(tables.query_words.max()) <= manifest.num_words and bool((tables.query_words[:, 0] > 0).any())


def test_words_of_no_query_are_padding_also_where_there_are_no_queries() -> None:
    tables = no_tables(num_items=3, num_queries=2)
    tables.query_words = torch.tensor([[5, 0], [6, 7]])
    assert query_terms_of(tables, torch.tensor([[1, -1]])).tolist() == [[[6, 7], [0, 0]]]
    tables.query_words = _at_least_one_row(tables.query_words[:0])
    assert query_terms_of(tables, torch.tensor([-1])).tolist() == [[0, 0]]


def test_tasks_are_mixed_by_share_whatever_the_manifest_says(folder: Path) -> None:
    """Format 1 does not count the searches of a block: they are read."""
    manifest = read_manifest(folder)
    config = DataConfig(history_max=6, search_share=0.75)
    old = Manifest(
        {
            **manifest.raw,
            "shards": {
                "train": [
                    {k: v for k, v in s.items() if k != "searches"} for s in manifest.raw["shards"]["train"]
                ]
            },
        },
        "",
    )
    new_stream, old_stream = (
        TrainStream(PreparedFolder(folder, m, str(folder)), config, 5, 24, 24) for m in (manifest, old)
    )
    for batch, other in itertools.islice(zip(new_stream, old_stream, strict=False), 12):
        assert batch.event_id.tolist() == other.event_id.tolist() and int(batch.task.sum()) == 18
    with pytest.raises(DataError, match="no recommendation events"):  # none was held out of the CF table
        TrainStream(
            PreparedFolder.at(folder), config, 5, 24, 24, heldout_item=np.full(manifest.num_users, -1)
        )
