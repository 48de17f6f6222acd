"""Prepared events against an obvious, slow reading of the same raw files."""

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_shards.blocks import decode_blocks, tar_entries
from data_shards.prepare import prepare
from data_shards.schema import SPLITS, TASKS, read_manifest

HISTORY_MAX = 6
# "new" and "x" are each several categories; text around and between > is trimmed and left out where empty
CATEGORIES = (
    "cars > new > x",
    "bikes>new",
    None,
    "cars > old",
    "bikes > new > x > y",
    "",
    "bikes",
    " new >> x",
)


def read_back(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Every event of a prepared folder with original ids."""
    users = pq.read_table(out / "catalog" / "users.parquet")["user_id"].to_pylist()
    items = pq.read_table(out / "catalog" / "items.parquet")["item_id"].to_pylist()
    queries = pq.read_table(out / "catalog" / "queries.parquet")["text"].to_pylist()
    events: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for shard in read_manifest(out).shards(split):
            for block in decode_blocks(tar_entries(out / shard.name), shard.blocks):
                for row in block.to_pylist():
                    history = list(
                        zip(
                            (items[i] for i in row["history_items"]),
                            (TASKS[t] for t in row["history_tasks"]),
                            strict=True,
                        )
                    )
                    history_queries = [queries[q] if q >= 0 else None for q in row["history_queries"]]
                    events[split].append({
                        "user": users[row["user"]], "item": items[row["item"]], "task": TASKS[row["task"]],
        "time": row["time"],
                        "query": queries[row["query"]] if row["query"] >= 0 else None, "history": history,
                        "history_queries": history_queries,
                        "impressions": [items[i] for i in row.get("impressions", [])],
        "event_id": row["event_id"],
                    })  # fmt: skip
    return events


def write_tied_log(folder: Path, seed: int) -> Path:
    """Many clicks share a moment, some repeat exactly, some are of both tasks; five days."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    day = 86_400_000
    (folder / "items.jsonl").write_text(
        "".join(
            json.dumps({"item_id": i, "text": f"item {i}", "category": CATEGORIES[i % len(CATEGORIES)]})
            + "\n"
            for i in range(40)
        )
    )
    rows = []
    for user in range(12):
        for _ in range(int(rng.integers(1, 40))):
            task = ("rec", "src")[int(rng.integers(2))]
            time = 20_000 * day + int(rng.integers(5)) * day + int(rng.integers(3)) * 1000
            row = {
                "user_id": user,
                "item_id": int(rng.integers(25)),
                "time": time,
                "task": task,
                "query": f"q{rng.integers(4)}" if task == "src" else None,
            }
            rows += [{**row, "clicked": int(rng.random() < 0.7)}] * int(rng.integers(1, 3))
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def expected_events(raw: Path, rule: str) -> dict[str, list[dict[str, Any]]]:
    """The same by loops over the raw rows, straight from the definitions."""
    rows = [json.loads(line) for line in (raw / "events.jsonl").read_text().splitlines()]
    clicks = sorted(
        {(r["user_id"], r["time"], r["item_id"], r["task"], r["query"] or "") for r in rows if r["clicked"]}
    )
    last_day = max(time for _, time, *_ in clicks) // 86_400_000
    of_user: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for click in clicks:
        of_user[click[0]].append(click)
    events: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for user, mine in of_user.items():
        times = sorted({time for _, time, *_ in mine})
        for _, time, item, task, query in mine:
            if rule == "time":
                split = {0: "test", 1: "valid"}.get(last_day - time // 86_400_000, "train")
            else:
                split = (
                    "train" if len(times) < 3 else {times[-1]: "test", times[-2]: "valid"}.get(time, "train")
                )
            before: dict[tuple[int, int], str] = {}
            asked: dict[tuple[int, int], set[str]] = defaultdict(set)
            for _, earlier, other, kind, words in mine:
                if earlier < time:
                    before[earlier, other] = "src" if "src" in (kind, before.get((earlier, other))) else "rec"
                    asked[earlier, other] |= {words} - {""}
            events[split].append(
                {
                    "user": user,
                    "item": item,
                    "task": task,
                    "time": time,
                    "query": query or None,
                    "before": before,
                    "asked": asked,
                }
            )
    return events


@pytest.mark.parametrize(("rule", "seed"), [("time", 1), ("leave_one_out", 2)])
def test_events_splits_and_histories_equal_the_slow_reading(tmp_path: Path, rule: str, seed: int) -> None:
    raw = write_tied_log(tmp_path / "raw", seed)
    settings = [
        f"split={rule}",
        "num_negatives=5",
        f"history_max={HISTORY_MAX}",
        "block_events=16",
        "shard_events=64",
        "vocab_size=300",
    ]
    prepare("tables", raw, tmp_path / "out", settings)
    got, expected = read_back(tmp_path / "out"), expected_events(raw, rule)

    def key(event: dict[str, Any]) -> tuple[Any, ...]:
        return event["user"], event["time"], event["item"], event["task"], event["query"] or ""

    for split in SPLITS:
        assert sorted(map(key, got[split])) == sorted(map(key, expected[split]))
        expected_of = {key(event): event for event in expected[split]}
        for event in got[split]:
            before, asked = (expected_of[key(event)][name] for name in ("before", "asked"))
            assert len(event["history"]) == min(HISTORY_MAX, len(before))
            times = sorted(time for time, _ in before)[-len(event["history"]) :] if event["history"] else []
            assert all(
                before.get((time, item)) == task
                for time, (item, task) in zip(times, event["history"], strict=True)
            ), "oldest first, searches win"
            assert len(set(zip(times, event["history"], strict=True))) == len(times), (
                "an item of one moment is there once"
            )
            for time, (item, task), query in zip(
                times, event["history"], event["history_queries"], strict=True
            ):
                # an item found by two queries at one moment is there with one of them
                assert query in asked[time, item] if task == "src" else query is None


def test_categories_equal_the_slow_reading(tmp_path: Path) -> None:
    raw = write_tied_log(tmp_path / "raw", 6)
    settings = ["num_negatives=5", "vocab_size=300", "category_levels=3"]
    manifest = prepare("tables", raw, tmp_path / "out", settings)
    catalog = tmp_path / "out" / "catalog"
    written = [json.loads(line) for line in (raw / "items.jsonl").read_text().splitlines()]
    path_of = {
        row["item_id"]: tuple(name.strip() for name in (row["category"] or "").split(">") if name.strip())[:3]
        for row in written
    }
    items = pq.read_table(catalog / "items.parquet")["item_id"].to_pylist()
    matrix = np.load(catalog / "item_category-000000.npy")
    places = {path_of[item][: level + 1] for item in items for level in range(len(path_of[item]))}
    assert (
        (manifest.num_categories, manifest.category_depth)
        == (len(places), 3)
        == (len(places), matrix.shape[1])
    )
    assert matrix.dtype == np.int32 and len(matrix) == len(items)
    rows = pq.read_table(catalog / "categories.parquet").to_pylist()
    assert [row["id"] for row in rows] == list(range(1, len(places) + 1))
    path_of_id: dict[int, tuple[str, ...]] = {0: ()}
    for row in rows:  # a parent's id is smaller
        path_of_id[row["id"]] = (*path_of_id[row["parent"]], row["name"])
        assert row["level"] == len(path_of_id[row["id"]]) - 1
    assert set(path_of_id.values()) == places | {()}
    for item, ids in zip(items, matrix.tolist(), strict=True):
        path = path_of[item]
        assert [path_of_id[number] for number in ids[: len(path)]] == [
            path[: level + 1] for level in range(len(path))
        ]
        assert ids[len(path) :] == [0] * (3 - len(path))


def test_one_moment_has_one_order_in_all_histories(tmp_path: Path) -> None:
    """Ties are broken by a hash: the order is the same wherever it is seen, and is not that of item ids."""
    prepare(
        "tables",
        write_tied_log(tmp_path / "raw", 3),
        tmp_path / "out",
        ["num_negatives=5", "history_max=200", "vocab_size=300"],
    )
    histories: dict[int, list[list[Any]]] = defaultdict(list)
    for events in read_back(tmp_path / "out").values():
        for event in events:
            histories[event["user"]].append(event["history"])
    ascending = []
    for of_user in histories.values():
        longest = max(of_user, key=len)
        assert all(history == longest[: len(history)] for history in of_user)
        ascending += [first[0] < second[0] for first, second in itertools.pairwise(longest)]
    assert 0.25 < np.mean(ascending) < 0.75


def test_impressions_were_shown_with_the_click_and_not_clicked_then(tmp_path: Path) -> None:
    raw = write_tied_log(tmp_path / "raw", 4)
    prepare("tables", raw, tmp_path / "out", ["num_negatives=5", "num_impressions=3", "vocab_size=300"])
    shown: dict[Any, set[int]] = defaultdict(set)
    clicked: dict[Any, set[int]] = defaultdict(set)
    for line in (raw / "events.jsonl").read_text().splitlines():
        row = json.loads(line)
        (clicked if row["clicked"] else shown)[row["user_id"], row["time"], row["task"], row["query"]].add(
            row["item_id"]
        )
    every_click = set().union(*clicked.values())
    some = 0
    for event in read_back(tmp_path / "out")["train"]:
        moment = event["user"], event["time"], event["task"], event["query"]
        possible = (shown[moment] - clicked[moment]) & every_click  # the catalogue holds clicked items
        assert set(event["impressions"]) <= possible
        assert len(event["impressions"]) == min(3, len(possible)), "as many as there are, none twice"
        some += bool(possible)
    assert some > 10


def test_catalogue_counts_are_those_of_training_clicks(prepared: Path) -> None:
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for event in read_back(prepared)["train"]:
        counts[event["item"], event["task"]] += 1
    for row in pq.read_table(prepared / "catalog" / "items.parquet").to_pylist():
        assert row["train_rec_clicks"] == counts[row["item_id"], "rec"]
        assert row["train_src_clicks"] == counts[row["item_id"], "src"]


def test_training_events_are_shuffled_and_others_in_order(prepared: Path) -> None:
    events = read_back(prepared)
    train = [event["event_id"] for event in events["train"]]
    assert abs(np.corrcoef(train, np.arange(len(train)))[0, 1]) < 0.15
    for split in ("valid", "test"):
        ids = [event["event_id"] for event in events[split]]
        assert ids == sorted(ids)


def test_items_never_clicked_are_in_the_catalogue_on_request(tmp_path: Path) -> None:
    raw = write_tied_log(tmp_path / "raw", 5)  # 40 items, of which at most 25 are clicked
    manifest = prepare(
        "tables", raw, tmp_path / "out", ["num_negatives=5", "vocab_size=300", "min_interactions=0"]
    )
    assert manifest.num_items == 40
    assert sorted(
        pq.read_table(tmp_path / "out" / "catalog" / "items.parquet")["item_id"].to_pylist()
    ) == list(range(40))
