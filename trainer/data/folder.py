"""The prepared folder: the one object that is passed around, and the one way to its files."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_shards.categories import read_categories
from data_shards.schema import TASKS, Manifest, read_manifest
from data_shards.secrets import mask_secrets
from trainer.batch import ItemTables, TrainClicks
from trainer.config import DataConfig
from trainer.data.blocks import read_blocks, to_numpy
from trainer.data.cf_table import CfTable, cf_digest, cf_path, load_cf, same_cf
from trainer.data.item_tables import load_tables
from trainer.data.node_cache import CF_DIGEST, check_origin, local_folder, parse_cf_digest
from trainer.data.verified import Known, check_files
from trainer.errors import ConfigError

# tables of the catalogue → the column that says what their rows are
KEYS = {"users.parquet": "user_id", "items.parquet": "item_id", "queries.parquet": "text"}


@dataclass(frozen=True)
class PreparedFolder:
    """A prepared folder on this machine, or the node's copy of one behind a URL."""

    path: Path
    manifest: Manifest
    name: str  # as the user gave it, secrets masked

    def __post_init__(self) -> None:
        """Raises DataError for a folder that would run a command (node_cache.check_origin)."""
        check_origin(self.path)

    @classmethod
    def open(cls, data: DataConfig) -> "PreparedFolder":
        """data.dir, fetched into the node's cache where it is a URL. Raises DataError when it is not a
        prepared folder."""
        path = local_folder(data)
        return cls(Path(path), read_manifest(path), mask_secrets(data.dir))

    @classmethod
    def at(cls, path: str | Path) -> "PreparedFolder":
        return cls(Path(path), read_manifest(path), str(path))

    @property
    def catalog(self) -> Path:
        return self.path / "catalog"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    def check_settings(self, data: DataConfig) -> None:
        """Raises ConfigError for settings that ask for more than the folder holds."""
        if data.history_max > self.manifest.history_max:
            raise ConfigError(
                f"data.history_max={data.history_max}, but {self.name} was prepared with history_max="
                f"{self.manifest.history_max}: longer histories are not in it. Set data.history_max="
                f"{self.manifest.history_max} or less, or prepare it again with "
                f"history_max={data.history_max}"
            )

    # ---- tables --------------------------------------------------------------------------------------------

    @property
    def has_cf(self) -> bool:
        return cf_path(self.path).is_file()

    def cf(self, users: bool = True, folds: bool = True) -> CfTable:
        """Raises DataError when `gensr cf` has not made it, or made it for another split."""
        return load_cf(self.path, self.manifest, users=users, folds=folds)

    @cached_property
    def cf_digest(self) -> str:
        """Identity of the CF table; "" where there is none."""
        return cf_digest(cf_path(self.path)) if self.has_cf else ""

    @property
    def cf_file_sha256(self) -> str:
        """Of the CF table's file, as noted beside it; "" where nothing is."""
        return next((sha256 for _, _, sha256 in self._cf_file()), "")

    def cf_digest_as(self, recorded: str) -> str:
        """`recorded` where it names this table, also in the way of an older run; else cf_digest."""
        return recorded if recorded and same_cf(recorded, cf_path(self.path)) else self.cf_digest

    def catalogue_files(self) -> list[Known]:
        """What the manifest lists of catalog/ and tokenizer/."""
        return [(file["name"], file["num_bytes"], file["sha256"]) for file in self.manifest.raw["catalog"]]

    def _cf_file(self) -> list[Known]:
        """The CF table as its .sha256 describes it; none where that is missing (tables of before there was
        one)."""
        path = self.path / CF_DIGEST
        return [parse_cf_digest(path.read_bytes(), str(path))] if path.is_file() else []

    def tables(self, needs: frozenset[str], with_folds: bool = False) -> ItemTables:
        """What a model's `needs` name, on the CPU; the rest is empty. Raises DataError, with the command that
        makes it, for something that the folder does not hold, and for files that are not what the manifest
        says."""
        self.manifest.check_holds(needs, self.name)
        reads_cf = bool(needs & {"cf", "cf_users"})
        check_files(self.path, self.catalogue_files() + (self._cf_file() if reads_cf else []))
        cf = self.cf(users="cf_users" in needs, folds=with_folds) if reads_cf else None
        return load_tables(self.path, self.manifest, cf, with_folds)

    # ---- events --------------------------------------------------------------------------------------------

    def tasks(self, split: str) -> tuple[int, ...]:
        """Tasks of which a split has events."""
        counts = self.manifest.raw["counts"][split]
        return tuple(task for task, name in enumerate(TASKS) if counts[name])

    def columns(self, split: str, names: list[str]) -> dict[str, np.ndarray]:
        """Whole columns of a split, in stored order. Fixed-size lists come as [n, k]."""
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for shard in self.manifest.shards(split):
            for table in read_blocks(self.path, shard, columns=names, manifest=self.manifest):
                for name in names:
                    parts[name].append(to_numpy(table[name]))
        empty = np.zeros(0, np.int64)
        return {name: np.concatenate(arrays) if arrays else empty for name, arrays in parts.items()}

    def clicks(self) -> TrainClicks:
        """The clicks of the training split, by user and time."""
        names = ["user", "task", "item", "query", "time", "event_id"]
        columns = self.columns("train", names)
        order = np.argsort(columns.pop("event_id"), kind="stable")
        as_tensors = {n: torch.from_numpy(column[order].astype(np.int64)) for n, column in columns.items()}
        return TrainClicks(**as_tensors)

    def item_clicks(self) -> np.ndarray:
        """Training clicks of each item [num_items], both tasks."""
        table = self.items("train_rec_clicks", "train_src_clicks")
        return np.asarray(
            table["train_rec_clicks"].to_numpy() + table["train_src_clicks"].to_numpy(), dtype=np.int64
        )

    # ---- originals -----------------------------------------------------------------------------------------

    def items(self, *columns: str) -> pa.Table:
        """Columns of catalog/items.parquet: item_id, text, category, train_rec_clicks, train_src_clicks."""
        return pq.read_table(self.catalog / "items.parquet", columns=list(columns))

    def has_rows_of(self, other: "PreparedFolder") -> bool:
        """Whether each row is the same user, item and query in both, whatever the events and their split."""
        return all(
            pq.read_table(self.catalog / name, columns=[column]).equals(
                pq.read_table(other.catalog / name, columns=[column])
            )
            for name, column in KEYS.items()
        )

    def item_ids(self) -> list[Any]:
        ids: list[Any] = self.items("item_id")["item_id"].to_pylist()
        return ids

    def texts(self) -> tuple[list[str], list[str]]:
        """All text of each item, and of each query; "" for none."""
        return [text or "" for text in self.items("text")["text"].to_pylist()], self.query_texts()

    def query_texts(self) -> list[str]:
        queries = pq.read_table(self.catalog / "queries.parquet", columns=["text"])
        return [text or "" for text in queries["text"].to_pylist()]

    def category_paths(self) -> list[tuple[str, ...]]:
        """Names from the root down of categories 0 (none), 1, … num_categories."""
        return [(), *(read_categories(self.catalog) if self.manifest.num_categories else ())]

    def user_ids(self) -> list[Any]:
        ids: list[Any] = pq.read_table(self.catalog / "users.parquet", columns=["user_id"])[
            "user_id"
        ].to_pylist()
        return ids
