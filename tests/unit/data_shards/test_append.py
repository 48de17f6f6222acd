"""`gensr prepare … --append OUT_OLD`: a log in two parts gives the events of the whole log, and what OUT_OLD
holds keeps its numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from data_shards.append import Base
from data_shards.blocks import decode_blocks, tar_entries
from data_shards.errors import ConfigError, DataError
from data_shards.matrices import matrix_parts
from data_shards.prepare import prepare
from data_shards.schema import SPLITS, Manifest, read_manifest
from data_shards.simulate import simulate
from data_shards.work import Work
from data_shards.write import describe_file
from tests.worlds import DAY_MS, START_MS, write_tables

FAST = ("vocab_size=300", "num_negatives=10", "block_events=64")
ROW_COUNTS = ("users", "items", "queries", "categories")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cut(raw: Path, until: int, old: Path, new: Path, items_again: bool = False) -> None:
    """Tables in two parts: what happened before a time, and the rest, with those items alone that nobody had
    clicked (items_again: with all of its own)."""
    events, items = rows_of(raw / "events.jsonl"), rows_of(raw / "items.jsonl")
    parts = [[row for row in events if (row["time"] < until) == before] for before in (True, False)]
    clicked = {row["item_id"] for row in parts[0] if row["clicked"]}
    there = [{row["item_id"] for row in part} for part in parts]
    if not items_again:
        there[1] -= clicked
    for folder, part, names in zip((old, new), parts, there, strict=True):
        write_rows(folder / "events.jsonl", part)
        if names:
            write_rows(folder / "items.jsonl", [row for row in items if row["item_id"] in names])


class Folder:
    """A prepared folder, read slowly and in the words of its log."""

    def __init__(self, path: Path) -> None:
        self.path, self.manifest = path, read_manifest(path)
        self.users, self.items = self.column("users", "user_id"), self.column("items", "item_id")
        self.queries = self.column("queries", "text")

    def column(self, table: str, name: str) -> list[Any]:
        return pq.read_table(self.path / "catalog" / f"{table}.parquet")[name].to_pylist()

    def matrix(self, stem: str) -> np.ndarray:
        return np.concatenate(matrix_parts(self.path / "catalog", stem, self.rows[stem]))

    @property
    def rows(self) -> dict[str, int]:
        sizes = {f"item_{kind}": self.manifest.num_items for kind in ("tokens", "words", "category")}
        return sizes | {f"query_{kind}": self.manifest.num_queries for kind in ("tokens", "words")}

    def events(self, split: str) -> list[dict[str, Any]]:
        return [
            event
            for shard in self.manifest.shards(split)
            for block in decode_blocks(tar_entries(self.path / shard.name), shard.blocks)
            for event in block.to_pylist()
        ]

    def clicks(self, split: str) -> list[tuple[Any, ...]]:
        """Events with their histories as sets: the order of one moment's clicks hangs on their numbers."""

        def query(number: int) -> str:
            return self.queries[number] if number >= 0 else ""

        return sorted(
            (
                str(self.users[event["user"]]),
                event["time"],
                str(self.items[event["item"]]),
                event["task"],
                query(event["query"]),
                sorted(
                    (str(self.items[item]), query(asked))
                    for item, asked in zip(event["history_items"], event["history_queries"], strict=True)
                ),
                sorted(str(self.items[item]) for item in event.get("impressions", [])),
            )
            for event in self.events(split)
        )


@pytest.fixture(scope="module", params=["words", "text"])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, ...]:
    """Of one log: its first six days, these with the last two appended, and all of it prepared at once."""
    root = tmp_path_factory.mktemp(request.param)
    raw = write_tables(root / "raw", users=30, items=80, anonymised=request.param == "words")
    cut(raw, START_MS + 6 * DAY_MS, root / "first", root / "rest")
    prepare("tables", root / "first", root / "old", (*FAST, "history_max=12"))
    prepare("tables", root / "rest", root / "new", append=root / "old")
    prepare("tables", raw, root / "whole", (*FAST, "history_max=12"))
    return tuple(Folder(root / name) for name in ("old", "new", "whole"))


def test_the_parts_of_a_log_give_the_events_of_the_whole(parts: tuple[Folder, ...]) -> None:
    old, new, whole = parts
    for split in ("valid", "test"):
        assert new.clicks(split) == whole.clicks(split)
    # what was validation and test yesterday has no impressions there
    assert [row[:-1] for row in new.clicks("train")] == [row[:-1] for row in whole.clicks("train")]
    shown = [sum(len(row[-1]) for row in folder.clicks("train")) for folder in (old, new, whole)]
    assert shown[0] <= shown[1] < shown[2]


def test_what_was_there_keeps_its_numbers_tokens_and_words(parts: tuple[Folder, ...]) -> None:
    old, new, _ = parts
    for name in ("users", "items", "queries"):
        before, after = getattr(old, name), getattr(new, name)
        assert after[: len(before)] == before and len(set(after)) == len(after)
    stems = ["item_tokens", "query_tokens", "item_category"]
    stems += ["item_words", "query_words"] if old.manifest.num_words else []
    for stem in stems:
        assert (new.matrix(stem)[: old.rows[stem]] == old.matrix(stem)).all(), stem
    for name in ("tokenizer/tokenizer.json", *(["catalog/words.npy"] if old.manifest.num_words else [])):
        assert (new.path / name).read_bytes() == (old.path / name).read_bytes()
    texts = old.column("items", "text")
    assert new.column("items", "text")[: len(texts)] == texts
    assert Base(new.path, new.manifest).categories[: old.manifest.num_categories] == (
        Base(old.path, old.manifest).categories
    )
    assert new.manifest.raw["text"]["tokenizer"] == "trained"
    assert new.manifest.raw["settings"]["tokenizer"] == ""


def test_events_of_before_are_what_they_were(parts: tuple[Folder, ...]) -> None:
    old, new, _ = parts

    def by_click(folder: Folder) -> dict[tuple[int, ...], tuple[Any, ...]]:
        return {
            tuple(event[name] for name in ("user", "item", "time", "task", "query")): tuple(
                tuple(event[name]) for name in ("history_items", "history_tasks", "history_queries")
            )
            for split in SPLITS
            for event in folder.events(split)
        }

    before, after = by_click(old), by_click(new)
    assert before.items() <= after.items()


def test_the_manifest_names_its_forebears(parts: tuple[Folder, ...], tmp_path: Path) -> None:
    old, new, _ = parts
    entry = {"manifest": old.manifest.hash, **{name: old.manifest.raw["counts"][name] for name in ROW_COUNTS}}
    assert new.manifest.raw["appended"] == [entry]
    later = tmp_path / "later"
    event = {"user_id": "u1", "item_id": "i1", "time": START_MS + 9 * DAY_MS, "task": "rec"}
    write_rows(later / "events.jsonl", [event])
    item: dict[str, Any] = {"item_id": "i999", "text": "late"}
    write_rows(later / "items.jsonl", [{**item, "words": [1000]} if new.manifest.num_words else item])
    last = prepare("tables", later, tmp_path / "out", ["valid_days=2"], append=new.path)
    assert [entry["manifest"] for entry in last.raw["appended"]] == [old.manifest.hash, new.manifest.hash]
    assert last.raw["counts"]["test"] == {"rec": 1, "src": 0}


def test_a_log_that_holds_old_clicks_again_counts_them_once(tmp_path: Path) -> None:
    raw = write_tables(tmp_path / "raw", users=12, items=60, days=4)
    old = prepare("tables", raw, tmp_path / "old", FAST)
    new = prepare("tables", raw, tmp_path / "new", append=tmp_path / "old")
    assert new.fingerprint == old.fingerprint
    assert {name: new.raw["counts"][name] for name in ROW_COUNTS} == {
        name: old.raw["counts"][name] for name in ROW_COUNTS
    }


def test_after_a_day_without_clicks_two_days_are_appended_at_once(tmp_path: Path) -> None:
    raw = write_tables(tmp_path / "raw", users=30, items=80)
    cut(raw, START_MS + 5 * DAY_MS, tmp_path / "old", tmp_path / "rest")
    cut(tmp_path / "rest", START_MS + 6 * DAY_MS, tmp_path / "lost", tmp_path / "two", items_again=True)
    cut(tmp_path / "two", START_MS + 7 * DAY_MS, tmp_path / "one", tmp_path / "last", items_again=True)
    prepare("tables", tmp_path / "old", tmp_path / "base", FAST)
    with pytest.raises(DataError, match="append those of two days at once") as refused:
        prepare("tables", tmp_path / "one", tmp_path / "out", FAST, append=tmp_path / "base")
    assert "leave_one_out" not in str(refused.value)
    whole = prepare("tables", tmp_path / "two", tmp_path / "out", FAST, append=tmp_path / "base")
    assert whole.num_events("valid") and whole.num_events("test")


def test_an_item_that_is_described_again_has_its_new_text(tmp_path: Path) -> None:
    raw = write_tables(tmp_path / "raw", users=12, items=60, days=4)
    cut(raw, START_MS + 3 * DAY_MS, tmp_path / "first", tmp_path / "rest", items_again=True)
    prepare("tables", tmp_path / "first", tmp_path / "old", FAST)
    old = Folder(tmp_path / "old")
    items = rows_of(tmp_path / "rest" / "items.jsonl")
    item = next(item for item in items if item["item_id"] in old.items)
    item |= {"text": "a new name", "category": "elsewhere > there"}
    write_rows(tmp_path / "rest" / "items.jsonl", items)
    prepare("tables", tmp_path / "rest", tmp_path / "new", append=tmp_path / "old")
    new, row = Folder(tmp_path / "new"), old.items.index(item["item_id"])
    assert new.column("items", "text")[row] == "a new name"
    base = Base(new.path, new.manifest)
    assert base.categories[: old.manifest.num_categories] == Base(old.path, old.manifest).categories
    found = [base.categories[number - 1] for number in new.matrix("item_category")[row] if number]
    assert found == [("elsewhere",), ("elsewhere", "there")]


def test_the_new_items_are_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of rows: the old items join those that were kept, and not the file."""
    simulate(tmp_path / "raw", users=60, items=300, days=4, seed=0)
    settings = ("min_interactions=1", "both_behaviours=false", "num_negatives=10", "vocab_size=300")
    prepare("kuaisar", tmp_path / "raw", tmp_path / "old", settings)
    execute, scans = Work.execute, []

    def counted(self: Work, sql: str, stage: str = "", rows: int = 0) -> None:
        scans.append((stage, sql.count("item_features.csv', header")))
        execute(self, sql, stage, rows)

    monkeypatch.setattr(Work, "execute", counted)
    prepare("kuaisar", tmp_path / "raw", tmp_path / "new", append=tmp_path / "old")
    assert ("items", 1) in scans
    old, new = Folder(tmp_path / "old"), Folder(tmp_path / "new")
    assert new.column("items", "text") == old.column("items", "text")


@pytest.mark.parametrize("counted", [True, False])
def test_a_number_that_ends_a_text_is_no_anonymised_word(tmp_path: Path, counted: bool) -> None:
    """Folders from before num_words cannot tell."""
    raw = write_tables(tmp_path / "raw", users=20, items=80, days=6, anonymised=True)
    rows = rows_of(raw / "items.jsonl")
    write_rows(raw / "items.jsonl", [{**row, "text": f"{row['text']}  size 1000"} for row in rows])
    cut(raw, START_MS + 5 * DAY_MS, tmp_path / "first", tmp_path / "rest")
    prepare("tables", tmp_path / "first", tmp_path / "old", FAST)
    if not counted:
        forget(tmp_path / "old", "num_words")
    prepare("tables", tmp_path / "rest", tmp_path / "new", append=tmp_path / "old")
    old, new = Folder(tmp_path / "old"), Folder(tmp_path / "new")
    for stem in ("item_tokens", "item_words"):
        same = (new.matrix(stem)[: old.rows[stem]] == old.matrix(stem)).all()
        assert same == counted, stem
    texts = old.column("items", "text")
    assert new.column("items", "text")[: len(texts)] == texts


def forget(folder: Path, column: str) -> None:
    """The folder without a column of items.parquet, as an older version has written it."""
    path = folder / "catalog" / "items.parquet"
    pq.write_table(pq.read_table(path).drop_columns(column), path)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [file for file in manifest["catalog"] if file["name"] != "catalog/items.parquet"]
    manifest["catalog"] = [*files, describe_file(folder, path)]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_filtered_log_of_kuaisar_goes_on(tmp_path: Path) -> None:
    """Anonymised words, k-core and both behaviours: who was kept stays; clicks of others begin at zero."""
    simulate(tmp_path / "raw", users=60, items=300, days=6, seed=0)
    columns = {"rec_inter.csv": "timestamp", "src_inter.csv": "search_session_timestamp"}
    until = None
    for name, column in columns.items():
        table = pd.read_csv(tmp_path / "raw" / name, dtype=str, keep_default_na=False)
        time = table[column].astype(float)
        until = until or (time.max() + 8 * 3_600_000) // DAY_MS * DAY_MS - 8 * 3_600_000
        for folder, rows in (("first", time < until), ("rest", time >= until)):
            (tmp_path / folder).mkdir(exist_ok=True)
            table[rows].to_csv(tmp_path / folder / name, index=False)
    items = pd.read_csv(tmp_path / "raw" / "item_features.csv", dtype=str, keep_default_na=False)
    for folder in ("first", "rest"):
        items.to_csv(tmp_path / folder / "item_features.csv", index=False)
    words = ("min_interactions=3", "num_negatives=10", "vocab_size=300")
    prepare("kuaisar", tmp_path / "first", tmp_path / "old", words)
    new_manifest = prepare("kuaisar", tmp_path / "rest", tmp_path / "new", append=tmp_path / "old")
    old, new = Folder(tmp_path / "old"), Folder(tmp_path / "new")
    assert new_manifest.raw["settings"]["min_interactions"] == 3
    assert new.items[: len(old.items)] == old.items and len(new.items) > len(old.items)
    assert new.queries[: len(old.queries)] == old.queries
    assert (new.matrix("item_words")[: len(old.items)] == old.matrix("item_words")).all()
    before, after = ({row[:5] for split in SPLITS for row in folder.clicks(split)} for folder in (old, new))
    assert before < after


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["tokenizer=other"], ConfigError, "the vocabulary is that of"),
        (["vocab_size=400"], ConfigError, "vocab_size"),
        (["min_interactions=6"], DataError, "would go: the filter is stricter"),
        (["split=stored"], ConfigError, "stores no splits"),
    ],
)
def test_settings_that_do_not_go_on_are_refused(
    parts: tuple[Folder, ...], tmp_path: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    old, *_ = parts
    with pytest.raises(error, match=message):
        prepare("tables", old.path.parent / "rest", tmp_path / "out", overrides, append=old.path)
    assert not (tmp_path / "out").exists()


def change_shard(folder: Path) -> None:
    shard = folder / "shards" / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 255
    shard.write_bytes(content)


def change_source(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    document["source"]["name"] = "kuaisar"
    (folder / "manifest.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_shard, "differs from the checksum"),
        (change_source, "was prepared from kuaisar logs"),
        (lambda folder: (folder / "manifest.json").unlink(), "not a prepared folder"),
    ],
)
def test_a_folder_that_cannot_be_gone_on_from_is_named(
    parts: tuple[Folder, ...], tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    old, *_ = parts
    copy = Path(shutil.copytree(old.path, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(DataError, match=message):
        prepare("tables", old.path.parent / "rest", tmp_path / "out", append=copy)


def test_a_log_that_means_something_only_as_a_whole_is_refused(tmp_path: Path) -> None:
    """amazon counts the items of a path in the whole log before it makes queries of it."""
    (tmp_path / "Tiny.inter.json").write_text(json.dumps({"0": [0, 1, 2, 3], "1": [3, 4, 0]}))
    items = {str(number): {"title": f"Title {number}", "categories": "Root,Kind"} for number in range(6)}
    (tmp_path / "Tiny.item.json").write_text(json.dumps(items))
    prepare("amazon", tmp_path, tmp_path / "old", ["num_negatives=1", "vocab_size=300"])
    with pytest.raises(ConfigError, match="--append goes on with logs of kuaisar and tables"):
        prepare("amazon", tmp_path, tmp_path / "new", append=tmp_path / "old")


def test_out_is_another_folder(parts: tuple[Folder, ...]) -> None:
    old, *_ = parts
    with pytest.raises(DataError, match="OUT is the same folder"):
        prepare("tables", old.path.parent / "rest", old.path, ["overwrite=true"], append=old.path)


def test_words_and_text_do_not_join(parts: tuple[Folder, ...], tmp_path: Path) -> None:
    old, *_ = parts
    raw = write_tables(tmp_path / "raw", users=5, items=20, days=3, anonymised=not old.manifest.num_words)
    with pytest.raises(DataError, match="cannot be joined"):
        prepare("tables", raw, tmp_path / "out", append=old.path)


def test_ids_that_look_like_numbers_are_those_of_before(tmp_path: Path) -> None:
    """A day whose ids are all digits goes on from a log whose ids are text."""

    def raw(name: str, ids: tuple[str, ...], day: int) -> Path:
        rows = [
            {"user_id": user, "item_id": item, "time": START_MS + day * DAY_MS + number * 1000}
            for number, (user, item) in enumerate((user, item) for user in ids for item in ("1", "2", "3"))
        ]
        write_rows(tmp_path / name / "events.jsonl", [{**row, "time": row["time"]} for row in rows])
        write_rows(
            tmp_path / name / "items.jsonl", [{"item_id": item, "text": f"thing {item}"} for item in "123"]
        )
        return tmp_path / name

    first = rows_of(raw("one", ("7", "x"), 0) / "events.jsonl")
    first += rows_of(raw("two", ("7", "x"), 1) / "events.jsonl")
    first += rows_of(raw("three", ("7", "x"), 2) / "events.jsonl")
    write_rows(tmp_path / "one" / "events.jsonl", first)
    words = ("num_negatives=1", "vocab_size=300", "min_interactions=0")
    items = [{"item_id": str(number), "text": f"thing {number}"} for number in range(9)]
    write_rows(tmp_path / "one" / "items.jsonl", items)
    prepare("tables", tmp_path / "one", tmp_path / "old", words)
    new: Manifest = prepare("tables", raw("four", ("7",), 3), tmp_path / "new", append=tmp_path / "old")
    assert (new.num_users, new.num_items) == (2, 9)
    old, now = Folder(tmp_path / "old"), Folder(tmp_path / "new")
    assert (now.users, now.items) == (old.users, old.items)
