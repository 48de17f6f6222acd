"""What each step of a preparation removed: in the manifest, and beside the published counts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.filters import keep_users_and_items
from data_shards.inspect import describe, inspect, query_lines
from data_shards.prepare import prepare
from data_shards.schema import SPLITS, TASKS, parse_manifest, read_manifest
from data_shards.steps import ADDED, COUNTS, difference_table, removed_table, states
from tests.worlds import write_tables

FEW_USERS, FEW_ITEMS = "users with fewer than 2 clicks", "items with fewer than 2 clicks"
ONE_TASK = "users without both tasks"


def removed_of(clicks: list[tuple[int, int, int]], both: bool, repeat: bool) -> list[dict[str, Any]]:
    """clicks: (user, item, task)."""
    user, item, task = (np.array(column) for column in zip(*clicks, strict=True))
    sizes = int(user.max()) + 1, int(item.max()) + 1
    keep_user, keep_item, removed = keep_users_and_items(user, item, task, *sizes, 2, both, repeat)
    kept = keep_user[user] & keep_item[item]
    for code, name in enumerate(TASKS):
        gone = sum(step[name] for step in removed)
        assert gone == ((task == code) & ~kept).sum()
    return removed


def test_each_round_says_what_it_removed() -> None:
    """User 0 has too few clicks; without it item 5 has too few, and then user 1."""
    clicks = [(0, 5, 0), (1, 5, 0), (1, 1, 1), (2, 1, 0), (2, 2, 1), (3, 1, 0), (3, 2, 0), (3, 2, 1)]
    assert removed_of(clicks, both=False, repeat=True) == [
        {"step": FEW_USERS, "round": 1, "users": 1, "rec": 1, "src": 0},
        # items 0, 3 and 4 are no one's from the beginning; item 5 follows user 0 a round later
        {"step": FEW_ITEMS, "round": 1, "items": 3, "rec": 0, "src": 0},
        {"step": FEW_ITEMS, "round": 2, "items": 1, "rec": 1, "src": 0},
        {"step": FEW_USERS, "round": 3, "users": 1, "rec": 0, "src": 1},
    ]
    assert removed_of(clicks, both=False, repeat=False) == [
        {"step": FEW_USERS, "round": 1, "users": 1, "rec": 1, "src": 0},
        {"step": FEW_ITEMS, "round": 1, "items": 3, "rec": 0, "src": 0},
    ]


@pytest.mark.parametrize("repeat", [True, False])
def test_users_of_one_task_go_first(repeat: bool) -> None:
    clicks = [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 0), (2, 1, 0), (2, 0, 1)]
    first = removed_of(clicks, both=True, repeat=repeat)[0]
    assert first == {"step": ONE_TASK, "round": 1, "users": 1, "rec": 2, "src": 0}


def counts_here(manifest: dict[str, Any]) -> dict[str, int]:
    counts = manifest["counts"]
    return {
        **{name: counts[name] for name in ("users", "items", "queries")},
        **{task: sum(counts[split][task] for split in SPLITS) for task in TASKS},
    }


@pytest.mark.parametrize("settings", [["min_interactions=5", "both_behaviours=true"], ["min_interactions=0"]])
def test_raw_counts_less_every_step_are_those_of_the_folder(tmp_path: Path, settings: list[str]) -> None:
    raw = write_tables(tmp_path / "raw", users=40, items=150, days=5)
    rows = (raw / "events.jsonl").read_text().splitlines()
    clicked = [row for row in rows if json.loads(row).get("clicked", 1)]
    more = [json.loads(row) for row in clicked[:60]]
    shown = [{**row, "clicked": 0} for row in more[:30]]
    unknown = [{**row, "item_id": "nowhere"} for row in more[30:40]]
    lines = [*rows, *clicked[:25], *(json.dumps(row) for row in [*shown, *unknown])]
    (raw / "events.jsonl").write_text("\n".join(lines) + "\n")
    few = ["num_negatives=5", "vocab_size=300"]
    manifest = prepare("tables", raw, tmp_path / "out", [*few, *settings]).raw
    steps = manifest["removed"]
    assert states(manifest["counts"]["raw"], steps)[-1][1] == counts_here(manifest)
    of_step = {step["step"]: step for step in steps}
    repeated = of_step["repeated clicks"]
    assert repeated["rec"] + repeated["src"] == manifest["dropped"]["duplicate click"] == 25
    assert of_step["rows that are no usable click"]["items"] >= 1  # "nowhere"
    gained = [step["step"] for step in steps if any(step.get(name, 0) < 0 for name in COUNTS)]
    assert gained == ([ADDED] if settings == ["min_interactions=0"] else [])
    filtered = sum(step.get("rec", 0) + step.get("src", 0) for step in steps if "round" in step)
    assert filtered == manifest["dropped"].get("filtered click", 0)
    assert (filtered > 0) == (settings[0] == "min_interactions=5")
    lines = describe(inspect(tmp_path / "out"))
    assert any("rows that are no usable click" in line for line in lines)
    (last,) = [line for line in lines if line.split()[:1] == ["here"]]
    assert [int(word.replace(",", "")) for word in last.split()[1:]] == list(counts_here(manifest).values())


def test_an_older_folder_keeps_its_hash_and_is_shown_without_steps(prepared: Path) -> None:
    raw = json.loads((prepared / "manifest.json").read_text())
    assert read_manifest(prepared).raw == raw
    del raw["removed"]
    older = parse_manifest(json.dumps(raw).encode(), "m.json")
    assert older.raw == raw and older.hash != read_manifest(prepared).hash
    assert removed_table(older.raw) == difference_table(older.raw) == []


RAW = {"users": 100, "items": 1000, "queries": 50, "rec": 4000, "src": 900}
STEPS = [
    {"step": "repeated clicks", "rec": 100},
    {"step": FEW_USERS, "round": 1, "users": 10, "rec": 500, "src": 20},
    {"step": FEW_ITEMS, "round": 1, "items": 400, "rec": 300, "src": 80},
    {"step": FEW_USERS, "round": 2, "users": 3, "rec": 7},
    {"step": FEW_ITEMS, "round": 3, "items": 5, "rec": 3, "src": 1},
    {"step": "queries of no kept click", "queries": 8},
]


def facts(**published: dict[str, int]) -> dict[str, Any]:
    return {"counts": {"raw": RAW}, "removed": STEPS, "published": published}


def test_later_rounds_are_one_line_and_the_last_line_is_what_is_left() -> None:
    lines = removed_table(facts())
    assert lines[0].split()[-5:] == list(COUNTS)
    assert lines[1].split() == ["raw", "rows", "100", "1,000", "50", "4,000", "900"]
    (later,) = [line for line in lines if "the same again" in line]
    assert later.split() == ["the", "same", "again,", "rounds", "2", "to", "3", "-3", "-5", "-10", "-1"]
    assert lines[-1].split() == ["here", "87", "595", "42", "3,090", "799"]
    assert len(lines) == 2 + 3 + 1 + 1 + 1


def test_published_counts_stand_beside_the_nearest_step() -> None:
    lines = difference_table(
        facts(
            whole={**RAW, "rec": 4007}, filtered={"users": 86, "items": 595}, other={"users": 5, "items": 9}
        )
    )
    assert lines[1].split() == ["whole,", "less", "raw", "rows", "+0", "+0", "+0", "+7", "+0"]
    assert "filtered, less after: " + FEW_ITEMS in lines[2] and lines[2].split()[-2:] == ["-1", "+0"]
    assert len(lines) == 3, "counts of another log are no comparison"


def test_what_became_of_category_paths_is_said() -> None:
    source = {"paths_of_one_item": 1_234, "items_with_shorter_query": 56, "items_without_query": 7}
    first, second = query_lines(source, 4_298)
    assert "4,298 category paths of bought items, 1,234 of one item only" in first
    assert "56 items took a shorter path's query, 7 none" in second
