"""Tomorrow's log: the events of a prepared folder beside new raw logs, and a numbering that goes on.

    OUT_OLD ─ shards/, catalog/ ─▶ canonical tables ─┐
    RAW_NEW ─ source ────────────▶ canonical tables ─┴─▶ the story of prepare.py ─▶ OUT_NEW

Users, items, queries and categories of OUT_OLD keep their rows, new ones follow; tokenizer and word table are
OUT_OLD's. So a model of OUT_OLD knows what its rows and tokens mean in OUT_NEW.
"""

import dataclasses
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_shards.blocks import decode_blocks, tar_entries
from data_shards.categories import PATH_MARK, read_categories
from data_shards.encode import ID_TABLES
from data_shards.errors import ConfigError, DataError
from data_shards.matrices import matrix_parts
from data_shards.options import PrepareSettings, load_prepare_settings
from data_shards.schema import SPLITS, Manifest, read_manifest
from data_shards.sources import NOT_IN_ITEMS, ItemSql, Source, Tables
from data_shards.sources.reading import no_words, words_text
from data_shards.sql import file_literal, literal, parquet_scan
from data_shards.text import Words
from data_shards.verify import verify
from data_shards.work import Work

# what a row of tokens or words means
VOCABULARY = ("tokenizer", "vocab_size", "lowercase", "words", "min_word_count")
GO_ON = ("kuaisar", "tables")  # sources whose days can be read one after the other
KEYS = {"users": "user_id", "items": "item_id", "queries": "text"}  # columns of the catalogue's tables
# the words at the end of an item's text in a folder of anonymised logs (catalog/items.parquet), where no
# num_words says how many they are: in folders from before there were any
LAST_WORDS = r"(^| )[0-9]+( [0-9]+)*$"


@dataclass(frozen=True)
class Base:
    """The prepared folder that another one goes on from."""

    folder: Path
    manifest: Manifest

    @property
    def words(self) -> Words:
        """The word table, of a folder that has one."""
        return Words(np.load(self.folder / "catalog" / "words.npy", allow_pickle=False))

    @cached_property
    def categories(self) -> list[tuple[str, ...]]:
        """Names from the root down of categories 1, 2, …"""
        return read_categories(self.folder / "catalog") if self.manifest.num_categories else []

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """The manifest's "appended" of a folder that goes on from this one: its forebears, oldest first."""
        manifest = self.manifest
        itself = {
            "manifest": manifest.hash,
            "users": manifest.num_users,
            "items": manifest.num_items,
            "queries": manifest.num_queries,
            "categories": manifest.num_categories,
        }
        return [*manifest.appended, itself]

    def settings(self, source: str, overrides: Any) -> PrepareSettings:
        """Its own settings ← overrides. Raises ConfigError for another vocabulary."""
        known = {field.name for field in dataclasses.fields(PrepareSettings)}
        own = {key: value for key, value in self.manifest.raw["settings"].items() if key in known}
        own["tokenizer"] = str(self.folder / "tokenizer")
        settings, unchanged = (load_prepare_settings(source, words, own) for words in (overrides, ()))
        other = [key for key in VOCABULARY if getattr(settings, key) != getattr(unchanged, key)]
        if other:
            raise ConfigError(
                f"{', '.join(other)}: with --append the vocabulary is that of {self.folder}, so that a model "
                "trained there reads the new texts. Leave it out, or prepare the whole log anew without "
                "--append."
            )
        return settings

    def check_kept(self, work: Work) -> None:
        """Raises DataError unless the filter has kept all that this folder holds."""
        for plural, singular in ID_TABLES.items():
            count = self.manifest.raw["counts"][plural]
            kept = np.asarray(work.column(f"{singular}_code", "i4")[:count])
            lost = count - int((kept < count).sum())
            if lost:
                raise DataError(
                    f"{lost:,} of the {count:,} {plural} of {self.folder} would go: the filter is stricter "
                    "than the one it was made with (min_interactions, both_behaviours; kcore=false counts "
                    "clicks that are there no more). Use its settings, or prepare the whole log anew."
                )


def open_base(folder: Path, source: str, out: Path) -> Base:
    """Raises ConfigError for a log that means something only as a whole, DataError for a folder that it
    cannot go on from. Only its manifest is read."""
    if source not in GO_ON:
        raise ConfigError(
            f"--append goes on with logs of {' and '.join(GO_ON)}: those of {source} have no clock, splits "
            "of their own, or queries made from the whole log. Prepare the whole log anew."
        )
    manifest = read_manifest(folder)
    if (made_by := manifest.source) != source:
        raise DataError(
            f"{folder} was prepared from {made_by} logs, and ids of one source mean nothing in another. Use: "
            f"gensr prepare {made_by} RAW OUT --append {shlex.quote(str(folder))}"
        )
    if folder.resolve() == out.resolve():
        raise DataError(f"--append {folder}: OUT is the same folder. Choose another OUT.")
    return Base(folder, manifest)


def appended(source: Source, base: Base) -> Source:
    """The source whose tables hold the clicks and items of `base`, too. Raises DataError when the folder is
    damaged: all of it is read, so this comes after what takes no time to refuse."""
    verify(base.folder, base.manifest)
    return dataclasses.replace(source, read=lambda work: _both(work, source.read(work), base))


def _both(work: Work, new: Tables, base: Base) -> Tables:
    mode = base.manifest.raw["text"]["mode"]
    if new.anonymised != (mode != "natural"):
        kinds = "lists of integers", "text"
        raise DataError(
            f"queries and texts are {kinds[not new.anonymised]} in the new log and "
            f"{kinds[mode == 'natural']} in {base.folder}: they cannot be joined."
        )
    types = _id_types(work, new, base)
    for plural, column in KEYS.items():
        _known_keys(work, base, plural, column, types.get(column, "VARCHAR"))
    return dataclasses.replace(
        new, events=_events(work, new, base, types), items=_items(work, new, base, types["item_id"])
    )


def _id_types(work: Work, new: Tables, base: Base) -> dict[str, str]:
    """Ids are integers if they are in both, else text."""
    fresh = work.con.sql(f"SELECT user_id, item_id FROM ({new.events})").types
    types = {}
    for column, stem, kind in zip(("user_id", "item_id"), ("users", "items"), fresh, strict=True):
        old = pq.read_schema(base.folder / "catalog" / f"{stem}.parquet").field(column).type
        both = pa.types.is_integer(old) and str(kind) == "BIGINT"
        types[column] = "BIGINT" if both else "VARCHAR"
    return types


def _rows(base: Base, stem: str) -> str:
    """SQL that scans a table of the catalogue, with its row numbers."""
    path = file_literal(base.folder / "catalog" / f"{stem}.parquet")
    return f"read_parquet({path}, hive_partitioning=false, file_row_number=true)"


def _known_keys(work: Work, base: Base, plural: str, column: str, kind: str) -> None:
    """Table known_{plural} (key, code): a key's code is its row in the old folder."""
    work.con.execute(
        f"CREATE OR REPLACE TABLE known_{plural} AS SELECT CAST({column} AS {kind}) AS key, "
        f"CAST(file_row_number AS INTEGER) AS code FROM {_rows(base, plural)}"
    )
    if twice := work.con.execute(
        f"SELECT key FROM known_{plural} GROUP BY key HAVING count(*) > 1 ORDER BY key LIMIT 1"
    ).fetchall():
        raise DataError(
            f"{base.folder}: {twice[0][0]!r} is there twice among its {plural}, written in two ways in its "
            "raw log. Prepare the whole log anew, without --append."
        )


def _events(work: Work, new: Tables, base: Base, types: dict[str, str]) -> str:
    path = work.folder / "old_rows.parquet"
    _write_old_rows(path, base)
    query = "query"
    if new.anonymised:  # in one writing, that of the old folder; what is none is named later
        query = f"CASE WHEN {no_words('query')} THEN query ELSE {words_text('query')} END"
    user, item = (f"CAST({column} AS {types[column]}) AS {column}" for column in ("user_id", "item_id"))
    described = f"problem = {literal(NOT_IN_ITEMS)} AND item_id IN (SELECT key FROM known_items)"
    return (
        f"SELECT {user}, {item}, time, task, CAST({query} AS VARCHAR) AS query, clicked, "
        f"CASE WHEN {described} THEN NULL ELSE problem END AS problem FROM ({new.events}) "
        f"UNION ALL SELECT {user}, {item}, o.time, o.task, q.text, o.clicked, NULL "
        f"FROM {parquet_scan(path)} o JOIN {_rows(base, 'users')} u ON o.user = u.file_row_number "
        f"JOIN {_rows(base, 'items')} i ON o.item = i.file_row_number "
        f"LEFT JOIN {_rows(base, 'queries')} q ON o.query = q.file_row_number"
    )


OLD_ROWS = pa.schema(
    {
        "user": pa.int32(),
        "item": pa.int32(),
        "query": pa.int32(),
        "time": pa.int64(),
        "task": pa.int8(),
        "clicked": pa.bool_(),
    }
)


def _write_old_rows(path: Path, base: Base) -> None:
    """Every event of the folder is a click; what its training events were shown beside is not clicked."""
    with pq.ParquetWriter(path, OLD_ROWS) as writer:
        for split in SPLITS:
            for shard in base.manifest.shards(split):
                for block in decode_blocks(tar_entries(base.folder / shard.name), shard.blocks):
                    clicks = block.select(["user", "item", "query", "time", "task"])
                    writer.write_table(_marked(clicks, clicked=True))
                    if "impressions" in block.column_names:
                        shown = block["impressions"].combine_chunks()
                        beside = clicks.drop_columns("item").take(pc.list_parent_indices(shown))
                        beside = beside.append_column("item", shown.flatten())
                        writer.write_table(_marked(beside, clicked=False))


def _marked(rows: pa.Table, clicked: bool) -> pa.Table:
    marked = rows.append_column("clicked", pa.array(np.full(rows.num_rows, clicked)))
    return marked.select(OLD_ROWS.names).cast(OLD_ROWS)


def _items(work: Work, new: Tables, base: Base, kind: str) -> ItemSql:
    """The items of the new log, and those of the old folder, for what the new log does not describe."""
    path = work.folder / "old_items.parquet"
    counted = _write_old_items(path, base)
    items = new.items
    text, words = "text", "NULL"
    if counted:
        parts = "string_split(text, ' ')"
        text = f"array_to_string(list_slice({parts}, 1, len({parts}) - num_words), ' ')"
        words = f"array_to_string(list_slice({parts}, len({parts}) - num_words + 1, len({parts})), ' ')"
        words = f"CASE WHEN num_words > 0 THEN {words} END"
    elif new.anonymised:
        text = f"trim(regexp_replace(text, {literal(LAST_WORDS)}, ''))"
        words = f"nullif(trim(regexp_extract(text, {literal(LAST_WORDS)})), '')"
    fresh = (
        f"SELECT CAST(item_id AS {kind}) AS item_id, {items.text} AS text, CAST({items.words} AS VARCHAR) "
        f"AS words, {items.category} AS category, {items.path} AS path FROM {items.scan}"
    )
    known = (
        f"SELECT CAST(item_id AS {kind}) AS item_id, {text} AS text, {words} AS words, category, path "
        f"FROM {parquet_scan(path)}"
    )
    return ItemSql(f"({fresh}) new_items", words="words", words_origin=items.words_origin, known=known)


def _write_old_items(path: Path, base: Base) -> bool:
    """item_id, text, category, path of catalog/items.parquet, a batch of rows at a time; and num_words, if
    that is there. Returns whether it is."""
    catalog, num_items = base.folder / "catalog", base.manifest.num_items
    category = np.zeros(num_items, np.int32)  # the last level of each item's
    if base.categories:
        parts = matrix_parts(catalog, "item_category", num_items)
        category = np.concatenate([part[np.arange(len(part)), _last_level(part)] for part in parts])
    paths = pa.array([None, *(PATH_MARK.join(names) for names in base.categories)], pa.string())
    file = pq.ParquetFile(catalog / "items.parquet")
    schema = file.schema_arrow
    names = ("item_id", "text", "category", "num_words")
    columns = [schema.field(name) for name in names if name in schema.names]
    done = 0
    with pq.ParquetWriter(path, pa.schema([*columns, pa.field("path", pa.string())])) as writer:
        for batch in file.iter_batches(columns=[field.name for field in columns]):
            rows = slice(done, done + batch.num_rows)
            writer.write_batch(batch.append_column("path", paths.take(pa.array(category[rows]))))
            done += batch.num_rows
    return "num_words" in schema.names


def _last_level(ids: np.ndarray) -> np.ndarray:
    """The last column of each row that is not 0; 0 where all are."""
    depth: np.ndarray = (ids > 0).sum(axis=1)
    return np.maximum(depth - 1, 0)
