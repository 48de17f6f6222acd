"""The contract between preparation and training: names, types and shapes of everything in a prepared folder.

data_shards/README.md shows the same as a picture. Change FORMAT_VERSION when a reader of the old version
would misread the new one.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_shards.documents import parse_json
from data_shards.errors import DataError
from data_shards.manifest import manifest_problem

# 2: catalogue matrices in parts, words as uint16 where they fit, searches of each block in the manifest
# 3: history_queries in blocks, categories of items
FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
SPLITS = ("train", "valid", "test")
TASKS = ("rec", "src")  # the index is the code stored in shards: 0 = recommendation, 1 = search
REC, SRC = 0, 1
NO_QUERY = -1  # value of `query` in a recommendation event
PAD = 0  # padding id in token, word and category arrays; real words and categories start at 1

_EVENT_FIELDS = [
    # position in (user, time, tie-break) order over all splits: unique, the same on every run
    ("event_id", pa.int64()),
    ("user", pa.int32()),  # row of catalog/users.parquet
    ("task", pa.int8()),  # REC or SRC
    ("item", pa.int32()),  # the clicked item; row of catalog/items.parquet
    ("query", pa.int32()),  # row of catalog/queries.parquet, or NO_QUERY
    ("time", pa.int64()),  # ms since 1970 (sources without a clock: position in the user's list)
    # oldest first, at most settings.history_max, strictly earlier than `time`
    ("history_items", pa.list_(pa.int32())),
    ("history_tasks", pa.list_(pa.int8())),  # REC or SRC for each history item
    ("history_queries", pa.list_(pa.int32())),  # the query of each search in the history, NO_QUERY otherwise
]
# shown beside the click, not clicked (may be empty)
TRAIN_SCHEMA = pa.schema([*_EVENT_FIELDS, ("impressions", pa.list_(pa.int32()))])


def eval_schema(num_negatives: int, num_hard_negatives: int = 0) -> pa.Schema:
    """Schema of valid and test blocks: the stored negatives make every model rank the same candidates.
    Without hard negatives there is no column for them."""
    widths = {"negatives": num_negatives, "hard_negatives": num_hard_negatives}
    fields = [(name, pa.list_(pa.int32(), width)) for name, width in widths.items()]
    return pa.schema([*_EVENT_FIELDS, *(fields if num_hard_negatives else fields[:1])])


@dataclass(frozen=True)
class Shard:
    """One tar file of a split. `blocks` holds the number of events of each entry, in the order of the
    entries."""

    name: str  # path inside the prepared folder: shards/train-000000.tar
    num_bytes: int
    sha256: str
    blocks: tuple[int, ...]
    searches: tuple[int, ...] | None = None  # how many events of each block are searches; None in format 1

    @property
    def num_events(self) -> int:
        return sum(self.blocks)


@dataclass(frozen=True)
class Manifest:
    """manifest.json, parsed. `raw` is the whole document (keys: README.md)."""

    raw: dict[str, Any]
    hash: str  # sha256 of the canonical JSON: the identity of a prepared folder

    @property
    def fingerprint(self) -> str:
        """Identity of the split alone: which user clicked what, when, and on which side of the boundaries."""
        return self.raw["split"]["fingerprint"]

    @property
    def source(self) -> str:
        """kuaisar, amazon, …: what read the raw logs."""
        return self.raw["source"]["name"]

    @property
    def num_items(self) -> int:
        return self.raw["counts"]["items"]

    @property
    def num_users(self) -> int:
        return self.raw["counts"]["users"]

    @property
    def num_queries(self) -> int:
        return self.raw["counts"]["queries"]

    @property
    def num_words(self) -> int:
        """Size of the anonymised-word vocabulary, 0 for natural text. Word ids are 1 … num_words; 0 is
        padding."""
        return self.raw["text"]["num_words"]

    @property
    def has_history_queries(self) -> bool:
        """Whether blocks say which query led to each search of a history."""
        return self.raw["format_version"] >= 3

    @property
    def num_categories(self) -> int:
        """Category ids are 1 … num_categories; 0 is none. 0 where the source or the format has none."""
        return self.raw["counts"].get("categories", 0)

    @property
    def category_depth(self) -> int:
        """Levels of the longest category path = columns of item_category."""
        return self.raw["counts"].get("category_depth", 0)

    @property
    def appended(self) -> list[dict[str, Any]]:
        """The folders whose row numbers this one keeps, oldest first: the hash of each one's manifest, and
        how many users, items, queries and categories it had."""
        return self.raw.get("appended", [])

    def check_holds(self, needs: Iterable[str], folder: str | Path) -> None:
        """Raises DataError naming what a model needs and this folder lacks. needs: names of which
        history_queries and item_category are looked at."""
        needs = set(needs)
        lacking = []
        if "history_queries" in needs and not self.has_history_queries:
            lacking.append("the queries of histories (history_queries)")
        if "item_category" in needs and not self.num_categories:
            lacking.append("categories of items (item_category)")
        if not lacking:
            return
        version = self.raw["format_version"]
        if version < 3:
            why = (
                f"It has format {version}; format 3 holds them. Prepare it again with: gensr prepare SOURCE "
                f"RAW {folder} overwrite=true"
            )
        else:
            why = "Its source gives no item a category. Choose another model, or add categories to the logs."
        raise DataError(f"{folder} lacks {' and '.join(lacking)}, which the model needs. {why}")

    @property
    def num_negatives(self) -> int:
        return self.raw["settings"]["num_negatives"]

    @property
    def num_hard_negatives(self) -> int:
        """0 in a folder that was prepared without them."""
        return self.raw["settings"].get("hard_negatives", 0)

    @property
    def history_max(self) -> int:
        return self.raw["settings"]["history_max"]

    def shards(self, split: str) -> tuple[Shard, ...]:
        return tuple(
            Shard(
                s["name"],
                s["num_bytes"],
                s["sha256"],
                tuple(s["blocks"]),
                tuple(s["searches"]) if "searches" in s else None,
            )
            for s in self.raw["shards"][split]
        )

    def num_events(self, split: str) -> int:
        return sum(shard.num_events for shard in self.shards(split))


def manifest_hash(raw: dict[str, Any]) -> str:
    """sha256 of the manifest as canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check OUT/manifest.json.

    Raises DataError when the folder is no prepared folder, or was written by a format version that is not
    readable.
    """
    path = Path(folder) / "manifest.json"
    if "://" in str(folder) or str(folder).startswith("pipe:"):
        raise DataError(
            f"{folder} is a URL. Training and evaluation read URLs; this needs a folder on this machine."
        )
    try:
        if not path.is_file():
            raise DataError(
                f"{folder} is not a prepared folder: {path} is missing. Make one with: gensr prepare SOURCE "
                f"RAW {folder}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Correct its permissions.") from error
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """The content of a manifest.json. Raises DataError naming `where`, and the key that is not what it should
    be."""
    fix = "Prepare the folder again."
    raw = parse_json(content, where, fix)
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is not int or version not in READABLE_VERSIONS:
        readable = ", ".join(map(str, READABLE_VERSIONS))
        raise DataError(f"{where} has format version {version!r:.40}, this gensr reads {readable}. {fix}")
    if problem := manifest_problem(raw):
        raise DataError(f"{where}: {problem}. {fix}")
    try:
        return Manifest(raw=raw, hash=manifest_hash(raw))
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply. {fix}") from error
