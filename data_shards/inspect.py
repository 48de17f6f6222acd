"""What a prepared folder holds: counts beside the published ones, splits, shard sizes, leak checks, one event
with original ids."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.blocks import decode_blocks, tar_entries
from data_shards.schema import NO_QUERY, SPLITS, SRC, TASKS, Manifest, read_manifest
from data_shards.steps import aligned, difference_table, removed_table
from data_shards.verify import verify

SHOWN_CLICKS = 5  # of the example's history


def inspect(out: str | Path) -> dict[str, Any]:
    """Facts of a prepared folder: counts, published, dropped, splits, shards, catalog, text, leak_checks,
    example, manifest_hash.

    All of it is read. Raises DataError when it is no prepared folder, a file is missing or not what the
    manifest says, or holds a number out of range.
    """
    folder = Path(out)
    manifest = read_manifest(folder)
    verify(folder, manifest)
    raw = manifest.raw
    shards = {}
    for split in SPLITS:
        of_split = manifest.shards(split)
        num_bytes = sum(shard.num_bytes for shard in of_split)
        events = manifest.num_events(split)
        shards[split] = {
            "shards": len(of_split),
            "blocks": sum(len(shard.blocks) for shard in of_split),
            "events": events,
            "num_bytes": num_bytes,
            "bytes_per_event": round(num_bytes / events, 1) if events else None,
        }
    return {
        "folder": str(out),
        "source": raw["source"],
        "manifest_hash": manifest.hash,
        "fingerprint": manifest.fingerprint,
        "counts": raw["counts"],
        "published": raw.get("published", {}),
        "dropped": raw.get("dropped", {}),
        # older folders have no "removed", and most no "appended"
        **{key: raw[key] for key in ("removed", "appended") if key in raw},
        "splits": {**raw["split"], **{split: raw["counts"][split] for split in SPLITS}},
        "shards": shards,
        "catalog": {file["name"]: file["num_bytes"] for file in raw["catalog"]},
        "text": raw["text"],
        "leak_checks": raw.get("leak_checks", {}),
        "settings": raw["settings"],
        "example": _example(folder, manifest),
    }


def describe(facts: dict[str, Any]) -> list[str]:
    """The facts as lines for a terminal."""
    counts, text, splits = facts["counts"], facts["text"], facts["splits"]
    lines = [
        f"{facts['folder']}: {facts['source']['name']}, split {splits['rule']}, "
        f"manifest {facts['manifest_hash'][:12]}, split fingerprint {facts['fingerprint'][:12]}"
    ]
    lines += [f"  {counts['users']:,} users, {counts['items']:,} items, {counts['queries']:,} queries"]
    if counts.get("categories"):
        lines += [f"  {counts['categories']:,} categories of items in {counts['category_depth']} levels"]
    lines += [f"  {name} {bound['utc']}" for name, bound in splits["boundaries"].items()]
    head = ("split", "recommendation", "search", "shards", "blocks", "bytes", "bytes/event")
    rows = []
    for split in SPLITS:
        shard = facts["shards"][split]
        numbers = (counts[split]["rec"], counts[split]["src"], shard["shards"], shard["blocks"])
        written = (*numbers, shard["num_bytes"], shard["bytes_per_event"] or 0)
        rows.append((split, *(f"{number:,}" for number in written)))
    lines += [
        "",
        *aligned(head, rows),
        "",
        f"  text: {text['mode']}, tokenizer {text.get('tokenizer', '?')} ({text['vocab_size']:,} entries), "
        f"{text['num_words']:,} anonymised words",
    ]
    lines += tables(facts)
    # with split=stored, violations that the raw files hold themselves are kept and counted
    violated = "KEPT" if splits["rule"] == "stored" else "FAIL"
    lines += ["", "  leak checks"]
    lines += [
        f"    {violated if check['violations'] else 'OK  '}  {name}: {check['checked']:,} checked, "
        f"{check['violations']:,} violations"
        for name, check in facts["leak_checks"].items()
    ]
    if example := facts["example"]:
        clicks = ", ".join(
            f"{click['task']} {click['item_id']}" + (f" ({click['query']!r})" if click["query"] else "")
            for click in example["history"][-SHOWN_CLICKS:]
        )
        lines += [
            "",
            f"  one {example['split']} event: user {example['user_id']}, {example['task']}, query "
            f"{example['query']!r}, time {example['time']}",
        ]
        lines += [f"    clicked  {example['item_id']}: {example['item_text'][:90]}"]
        lines += [f"    history  {len(example['history'])} items, the newest: {clicks or 'none'}"]
        lines += [
            f"    against  {len(example['negatives'])} negatives: "
            f"{', '.join(str(item) for item in example['negatives'][:5])}, …"
        ]
    return lines


def tables(facts: dict[str, Any]) -> list[str]:
    """Counts, and what became of the rows, as lines: a blank one before each table. facts: with the counts,
    published, dropped and removed of a manifest."""
    found = (count_table(facts), removed_table(facts), difference_table(facts), _dropped_table(facts))
    return [line for table in found if table for line in ("", *table)]


def count_table(facts: dict[str, Any]) -> list[str]:
    """Raw and filtered counts beside those the data's authors publish, as lines. facts: with the counts and
    published of a manifest."""
    names = ("users", "items", "queries", "rec", "src")
    counts = facts["counts"]
    kept = {
        **{name: counts[name] for name in names[:3]},
        **{task: sum(counts[split][task] for split in SPLITS) for task in TASKS},
    }
    rows = {
        "here, raw rows": counts.get("raw", {}),
        "here, clicks after filtering": kept,
        **{f"published: {name}": row for name, row in facts["published"].items()},
    }
    shown = [(name, *(f"{row[key]:,}" if key in row else "" for key in names)) for name, row in rows.items()]
    lines = aligned(("", *names), shown)
    for before in facts.get("appended", [])[-1:]:
        sizes = ", ".join(f"{before[name]:,} {name}" for name in ("users", "items", "queries"))
        lines += ["", f"  goes on from {before['manifest'][:12]}: its numbers stay ({sizes})"]
    if paths := facts["source"].get("paths"):
        lines += ["", *query_lines(facts["source"], paths)]
    if levels := facts["source"].get("category_levels"):
        found = ", ".join(f"{count:,} of {depth}" for depth, count in levels.items())
        separator = facts["source"]["category_separator"]
        split = f"split at {separator!r}" if separator else "not split"
        lines += ["", f"  categories were {split}; levels: {found}"]
    return lines


def query_lines(source: dict[str, Any], paths: int) -> list[str]:
    """How the queries of `amazon` come from category paths."""
    return [
        f"  queries: {paths:,} category paths of bought items, {source['paths_of_one_item']:,} of one item "
        "only;",
        f"  {source['items_with_shorter_query']:,} items took a shorter path's query, "
        f"{source['items_without_query']:,} none (min_query_items)",
    ]


def _dropped_table(facts: dict[str, Any]) -> list[str]:
    """By reason."""
    if not facts["dropped"]:
        return []
    return ["  dropped", *(f"    {count:>12,}  {reason}" for reason, count in facts["dropped"].items())]


def _example(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The first test event (a search soon after another if its block has one) with original ids and
    texts."""
    for shard in manifest.shards("test"):
        block = next(decode_blocks(tar_entries(folder / shard.name), shard.blocks))
        events = block.slice(0, 512).to_pylist()
        event = max(
            events,
            key=lambda row: (
                row["task"] == SRC,
                len(row["history_items"]) > 0,
                SRC in row["history_tasks"][-SHOWN_CLICKS:],
            ),
        )  # max keeps the first of equals
        items = [event["item"], *event["history_items"], *event["negatives"]]
        found = _rows(folder / "catalog" / "items.parquet", ["item_id", "text"], items)
        # format 2 has no history_queries
        asked = event.get("history_queries", [NO_QUERY] * len(event["history_items"]))
        queries = _rows(folder / "catalog" / "queries.parquet", ["text"], [event["query"], *asked])
        text_of = {NO_QUERY: None, **{row: query["text"] for row, query in queries.items()}}
        return {
            "split": "test",
            "event_id": event["event_id"],
            "time": event["time"],
            "task": TASKS[event["task"]],
            "user_id": _rows(folder / "catalog" / "users.parquet", ["user_id"], [event["user"]])[
                event["user"]
            ]["user_id"],
            "item_id": found[event["item"]]["item_id"],
            "item_text": found[event["item"]]["text"],
            "query": text_of[event["query"]],
            "history": [
                {
                    "item_id": found[item]["item_id"],
                    "task": TASKS[task],
                    "query": text_of[query],
                    "text": found[item]["text"],
                }
                for item, task, query in zip(
                    event["history_items"], event["history_tasks"], asked, strict=True
                )
            ],
            "negatives": [found[item]["item_id"] for item in event["negatives"]],
        }
    return {}


def _rows(path: Path, columns: list[str], wanted: list[int]) -> dict[int, dict[str, Any]]:
    """Some rows of a parquet file by row number, one row group in memory at a time."""
    file, start = pq.ParquetFile(path), 0
    found: dict[int, dict[str, Any]] = {}
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        here = sorted({row for row in wanted if start <= row < start + size})
        if here:
            rows = (
                file.read_row_group(group, columns=columns)
                .take(pa.array([row - start for row in here]))
                .to_pylist()
            )
            found.update(zip(here, rows, strict=True))
        start += size
    return found
