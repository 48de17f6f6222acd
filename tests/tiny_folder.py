"""A prepared folder small enough for a training test: made in a moment, with the files, types and checksums
of a real one."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from data_shards.blocks import decode_blocks, tar_entries
from data_shards.schema import FORMAT_VERSION, NO_QUERY, REC, SRC, TRAIN_SCHEMA, eval_schema, read_manifest
from data_shards.write import describe_file
from trainer.data.cf_table import CfTable, save_cf

WORDS = ["<pad>", "</s>", "<unk>", "Yes", "No", "Recommend", "Search", ":", ",", ";", "?"]
WORDS += ["user", "item", "click", "match", "query", "red", "blue", "green", "old", "new", "big"]
ITEM_TOKENS, QUERY_TOKENS = 8, 4


def make_tiny_folder(
    folder: Path,
    num_train: int = 96,
    num_valid: int = 40,
    num_users: int = 24,
    num_items: int = 130,
    seed: int = 0,
    train_blocks: Sequence[Sequence[int]] = (),
) -> Path:
    """Write a prepared folder with random events (search and recommendation alternate) and a random CF table
    with two folds.

    train_blocks: sizes of the blocks of each training shard, instead of one shard of two blocks.
    """
    rng = np.random.default_rng(seed)
    for part in ("shards", "catalog", "tokenizer", "cf"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    num_queries = 12
    np.save(
        folder / "catalog" / "item_tokens-000000.npy",
        rng.integers(3, len(WORDS), (num_items, ITEM_TOKENS)).astype(np.uint16),
    )
    np.save(
        folder / "catalog" / "query_tokens-000000.npy",
        rng.integers(3, len(WORDS), (num_queries, QUERY_TOKENS)).astype(np.uint16),
    )
    clicks = pa.array(rng.integers(0, 9, num_items), pa.int64())
    items = {
        "item_id": [f"i{i}" for i in range(num_items)],
        "text": [f"item {i}" for i in range(num_items)],
        "category": [""] * num_items,
    }
    pq.write_table(
        pa.table({**items, "train_rec_clicks": clicks, "train_src_clicks": clicks}),
        folder / "catalog" / "items.parquet",
    )
    pq.write_table(
        pa.table({"text": [f"query {q}" for q in range(num_queries)]}), folder / "catalog" / "queries.parquet"
    )
    pq.write_table(
        pa.table({"user_id": [f"u{u}" for u in range(num_users)]}), folder / "catalog" / "users.parquet"
    )

    shards: dict[str, list[dict[str, Any]]] = {}
    counts: dict[str, dict[str, int]] = {}
    first_id = 0
    halves = {
        name: [[count // 2, count - count // 2]]
        for name, count in (("train", num_train), ("valid", num_valid), ("test", num_valid))
    }
    for split, shard_sizes in {**halves, "train": train_blocks or halves["train"]}.items():
        shards[split] = []
        counts[split] = {
            "rec": sum((n + 1) // 2 for sizes in shard_sizes for n in sizes),
            "src": sum(n // 2 for sizes in shard_sizes for n in sizes),
        }
        for number, sizes in enumerate(shard_sizes):
            starts = [first_id + sum(sizes[:i]) for i in range(len(sizes))]
            blocks = [
                _block(rng, start, size, split, num_users, num_items, num_queries)
                for start, size in zip(starts, sizes, strict=True)
            ]
            shards[split].append(_write_shard(folder, f"shards/{split}-{number:06d}.tar", blocks))
            first_id += sum(sizes)
    manifest = {
        "format_version": FORMAT_VERSION,
        "gensr_version": "0",
        "source": {"name": "tiny"},
        "settings": {"num_negatives": 99, "history_max": 20},
        "counts": {"users": num_users, "items": num_items, "queries": num_queries, **counts},
        "split": {
            "rule": "time",
            "boundaries": {},
            "fingerprint": hashlib.sha256(f"{seed}/{num_train}".encode()).hexdigest(),
        },
        "seeds": {},
        "text": {
            "mode": "text",
            "num_words": 0,
            "vocab_size": len(WORDS),
            "item_tokens": ITEM_TOKENS,
            "query_tokens": QUERY_TOKENS,
        },
        "shards": shards,
        "catalog": [
            describe_file(folder, path)
            for part in ("catalog", "tokenizer")
            for path in sorted((folder / part).iterdir())
        ],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(num_items, 16, generator=generator)
    save_cf(
        folder,
        CfTable(
            user=torch.randn(num_users, 16, generator=generator),
            item=table,
            item_folds=torch.stack(
                [table + 0.1 * torch.randn(num_items, 16, generator=generator) for _ in range(2)]
            ),
            heldout_item=None,
            split_fingerprint=read_manifest(folder).fingerprint,
            settings={"holdout": "crossfit"},
            validation={},
            gensr_version="0",
        ),
    )
    return folder


def relist(folder: Path) -> None:
    """The manifest lists the files of catalog/ and tokenizer/ as they now are."""
    raw = json.loads((folder / "manifest.json").read_text())
    raw["catalog"] = [
        describe_file(folder, path)
        for part in ("catalog", "tokenizer")
        for path in sorted((folder / part).iterdir())
    ]
    (folder / "manifest.json").write_text(json.dumps(raw))


def change_events(folder: Path, split: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrites every block of a split; the manifest goes with it."""
    raw = json.loads((folder / "manifest.json").read_text())
    for shard in raw["shards"][split]:
        blocks = list(decode_blocks(tar_entries(folder / shard["name"]), shard["blocks"]))
        shard |= _write_shard(folder, shard["name"], [change(block) for block in blocks])
    (folder / "manifest.json").write_text(json.dumps(raw))


def to_format_2(folder: Path) -> None:
    """Rewrites a prepared folder of either kind as format 2 had it: no history_queries, no categories."""
    raw = json.loads((folder / "manifest.json").read_text())
    for of_split in raw["shards"].values():
        for shard in of_split:
            blocks = list(decode_blocks(tar_entries(folder / shard["name"]), shard["blocks"]))
            without = [block.drop_columns("history_queries") for block in blocks]
            shard |= _write_shard(folder, shard["name"], without)
    for path in (folder / "catalog").glob("*categor*"):
        path.unlink()
    raw["catalog"] = [file for file in raw["catalog"] if "categor" not in file["name"]]
    counts = {name: value for name, value in raw["counts"].items() if "categor" not in name}
    (folder / "manifest.json").write_text(json.dumps({**raw, "format_version": 2, "counts": counts}))


def _block(
    rng: np.random.Generator,
    first_id: int,
    count: int,
    split: str,
    num_users: int,
    num_items: int,
    num_queries: int,
) -> pa.Table:
    task = np.where(np.arange(count) % 2 == 0, REC, SRC).astype(np.int8)
    lengths = rng.integers(0, 7, count)
    candidates = np.array([rng.permutation(num_items)[:100] for _ in range(count)], np.int32).reshape(
        count, 100
    )
    columns: dict[str, Any] = {
        "event_id": np.arange(first_id, first_id + count),
        "user": rng.integers(0, num_users, count).astype(np.int32),
        "task": task,
        "item": candidates[:, 0],
        "query": np.where(task == SRC, rng.integers(0, num_queries, count), NO_QUERY).astype(np.int32),
        "time": np.arange(first_id, first_id + count),
        "history_items": [rng.integers(0, num_items, n).tolist() for n in lengths],
        "history_tasks": [rng.integers(0, 2, n).tolist() for n in lengths],
    }
    columns["history_queries"] = [  # no draw: the other columns stay what they are for a seed
        [place % num_queries if task == SRC else NO_QUERY for place, task in enumerate(tasks)]
        for tasks in columns["history_tasks"]
    ]
    if split == "train":
        return pa.table({**columns, "impressions": [[] for _ in range(count)]}, schema=TRAIN_SCHEMA)
    return pa.table({**columns, "negatives": candidates[:, 1:].tolist()}, schema=eval_schema(99))


def _write_shard(folder: Path, name: str, blocks: list[pa.Table]) -> dict[str, object]:
    with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, table in enumerate(blocks):
            sink = io.BytesIO()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table.combine_chunks())
            entry = tarfile.TarInfo(f"{number:06d}.arrow")
            entry.size = len(sink.getvalue())
            tar.addfile(entry, io.BytesIO(sink.getvalue()))
    content = (folder / name).read_bytes()
    searches = [int((table["task"].to_numpy() == SRC).sum()) for table in blocks]
    sizes = [table.num_rows for table in blocks]
    return {
        "name": name,
        "num_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "blocks": sizes,
        "searches": searches,
    }
