"""The catalogue files: original ids, texts, token and word matrices, training click counts. Streamed: no
table lies in memory as a whole."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_shards.append import Base
from data_shards.categories import CategoryWriter
from data_shards.encode import ID_TABLES
from data_shards.errors import DataError
from data_shards.matrices import MatrixWriter, compact_type
from data_shards.options import PrepareSettings
from data_shards.schema import REC
from data_shards.sources.reading import no_words, readable, words_text
from data_shards.split import TRAIN
from data_shards.text import (
    Words,
    collect_words,
    encode_texts,
    get_tokenizer,
    split_words,
    training_texts,
    word_mode,
)
from data_shards.work import BATCH_ROWS, Work
from data_shards.write import EventColumns

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def name_ids(work: Work, read: dict[str, Any]) -> None:
    """Stage: tables final_users, final_items, final_queries (id, key = original), from the code of each final
    id.

    Also final_queries.text, and catalog_items (id, key, text, words BIGINT[], category, path): the only pass
    over the items' file.
    """
    for plural, singular in ID_TABLES.items():
        codes = work.column(f"{singular}_code", "i4")
        work.put_table(
            "kept",
            pa.table(
                {"code": pa.array(np.asarray(codes)), "id": pa.array(np.arange(len(codes)), pa.int32())}
            ),
        )
        work.con.execute(
            f"CREATE OR REPLACE TABLE final_{plural} AS SELECT id, key FROM kept JOIN {plural}_codes USING "
            "(code)"
        )
    work.con.execute("DROP TABLE kept")
    text = words_text("key") if read["anonymised"] else "key"
    work.con.execute(
        f"CREATE OR REPLACE TABLE final_queries AS SELECT id, key, coalesce(CAST({text} AS VARCHAR), '') AS "
        "text FROM final_queries"
    )
    items = read["items"]
    # the file streams past the kept items, never the other way round
    work.con.execute("SET disabled_optimizers='join_order,build_side_probe_side'")
    try:
        work.execute(
            f"""CREATE OR REPLACE TABLE catalog_items AS
            SELECT f.id, f.key, coalesce({items["text"]}, '') AS text, {_integers(items["words"])} AS words,
                {items["category"]} AS category, {items["path"]} AS path
            FROM {items["scan"]} JOIN final_items f ON item_id = f.key""",
            "items",
        )
    except duckdb.ConversionException as error:
        raise _locate_words(work, items) or readable(error) from error
    work.con.execute("RESET disabled_optimizers")
    if items["known"]:
        work.con.execute(
            f"INSERT INTO catalog_items SELECT f.id, f.key, coalesce(text, ''), {_integers('words')}, "
            f"category, path FROM ({items['known']}) JOIN final_items f ON item_id = f.key "
            "WHERE f.id NOT IN (SELECT id FROM catalog_items)"
        )
    work.con.execute(
        "INSERT INTO catalog_items SELECT id, key, '', NULL, NULL, NULL FROM final_items WHERE id NOT IN "
        "(SELECT id FROM catalog_items)"
    )  # clicked, but without features


def _integers(words: str) -> str:
    """SQL: a written list of integers as BIGINT[]; what is no such list ends the query."""
    unrounded = f"translate({words_text(f'CAST({words} AS VARCHAR)')}, '.eE', 'xxx')"  # duckdb reads 1.5 as 2
    return f"CAST(string_split({unrounded}, ' ') AS BIGINT[])"


def _locate_words(work: Work, items: dict[str, str]) -> DataError | None:
    """The first row of the items' file whose words are no list of integers."""
    words = f"CAST({items['words']} AS VARCHAR)"
    if not (found := work.first_row(items["scan"], no_words(words), words)):
        return None
    row = found[0] + 1  # the header is row 1
    return DataError(
        f"{items['words_origin']}:row {row}: must be a list of integers like [1, 2, 3], got {found[1]!r}"
    )


def train_click_counts(columns: EventColumns, num_items: int) -> np.ndarray:
    """Training clicks of each item, [2, num_items] int64: row 0 recommendation, row 1 search."""
    counts = np.zeros((2, num_items), np.int64)
    for start in range(0, len(columns.item), BATCH_ROWS):
        rows = slice(start, start + BATCH_ROWS)
        train = columns.split[rows] == TRAIN
        for task in (0, 1):
            counts[task] += np.bincount(
                columns.item[rows][train & (columns.task[rows] == task)], minlength=num_items
            )
    return counts


def mark_train_queries(work: Work, columns: EventColumns, num_queries: int) -> None:
    """Table train_queries (id): queries of training events. Vocabularies are made from these only."""
    used = np.zeros(num_queries, bool)
    for start in range(0, len(columns.item), BATCH_ROWS):
        rows = slice(start, start + BATCH_ROWS)
        used[columns.query[rows][(columns.split[rows] == TRAIN) & (columns.task[rows] != REC)]] = True
    work.put_table("train_queries", pa.table({"id": pa.array(np.flatnonzero(used), pa.int32())}))


def write_catalog(
    work: Work,
    settings: PrepareSettings,
    columns: EventColumns,
    read: dict[str, Any],
    sizes: dict[str, int],
    base: Base | None = None,
) -> dict[str, Any]:
    """Stage: catalog/ and tokenizer/ of the tree. `read`: result of the read stage; sizes: num_users,
    num_items, num_queries; base: the folder whose words and categories keep their ids."""
    mode = word_mode(settings, read["anonymised"])
    folder = work.tree / "catalog"
    folder.mkdir(parents=True, exist_ok=True)
    mark_train_queries(work, columns, sizes["num_queries"])
    words = None
    if mode == "words":
        words = base.words if base is not None else collect_words(work, settings.min_word_count)
    if words is not None:
        np.save(folder / "words.npy", words.vocabulary)  # so that queries asked later can be read
    tokenizer = get_tokenizer(settings, training_texts(work, with_queries=mode == "natural"))
    tokenizer_file = work.tree / "tokenizer" / "tokenizer.json"
    tokenizer_file.parent.mkdir(exist_ok=True)
    tokenizer.save(str(tokenizer_file))
    texts, clicks = Texts(settings, mode, tokenizer, words), train_click_counts(columns, sizes["num_items"])
    repeated, categories = _write_items(
        work, texts, read, clicks, base.categories if base is not None else ()
    )
    _write_queries(work, texts, sizes["num_queries"])
    _write_users(work, folder / "users.parquet")
    return {
        "text": {
            "mode": mode,
            "tokenizer": tokenizer_name(settings, base),
            "vocab_size": tokenizer.get_vocab_size(),
            "num_words": len(words) if words is not None else 0,
            "item_tokens": settings.item_tokens,
            "query_tokens": settings.query_tokens,
        },
        "repeated_items": repeated, "categories": categories,
    }  # fmt: skip


def tokenizer_name(settings: PrepareSettings, base: Base | None) -> str:
    if base is not None:
        return str(base.manifest.raw["text"].get("tokenizer", "trained"))
    return (settings.tokenizer and Path(settings.tokenizer).name) or "trained"


def _write_users(work: Work, path: Path) -> None:
    batches = work.batches("SELECT key AS user_id FROM final_users ORDER BY id", 1 << 20)
    first = next(batches)  # there is no folder without users
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        for batch in itertools.chain([first], batches):
            writer.write_batch(batch)


@dataclass(frozen=True)
class Texts:
    """How texts become rows of tokens and words."""

    settings: PrepareSettings
    mode: str  # text.word_mode()
    tokenizer: "Tokenizer"
    words: Words | None


def _write_items(
    work: Work, texts: Texts, read: dict[str, Any], clicks: np.ndarray, known: Sequence[tuple[str, ...]]
) -> tuple[int, dict[str, int]]:
    """→ rows left out as repeated, and counts of categories."""
    num_items, settings = clicks.shape[1], texts.settings
    widths = settings.item_tokens, settings.item_words
    writer = CatalogWriter(work.tree / "catalog", "items", num_items, widths, texts)
    categories = CategoryWriter(work.tree / "catalog", num_items, settings.category_levels, known)
    done = repeated = 0
    for batch, extra in item_batches(work, read["duplicate_items"]):
        repeated += extra
        rows = slice(done, done + batch.num_rows)
        plain = batch.column("text")
        captions = batch.column("words").cast(pa.list_(pa.int64()))
        counts = np.nan_to_num(pc.list_value_length(captions).to_numpy(zero_copy_only=False)).astype(np.int64)
        flat = captions.flatten().to_numpy(zero_copy_only=False)
        full, lengths = plain, {}
        if read["anonymised"]:
            lengths = {"num_words": pa.array(counts, pa.int32())}
            joined = pc.binary_join(captions.cast(pa.list_(pa.string())), " ").fill_null("")
            full = pc.utf8_trim_whitespace(pc.binary_join_element_wise(plain, joined, " "))
        table = pa.table(
            {
                "item_id": batch.column("key"),
                "text": full,
                "category": batch.column("category"),
                "train_rec_clicks": clicks[0, rows],
                "train_src_clicks": clicks[1, rows],
                **lengths,
            }
        )
        writer.append(table, full if texts.mode == "digits" else plain, (flat, counts))
        categories.append(batch.column("path"))
        done += batch.num_rows
        work.progress("items", done, num_items)
    writer.close(pa.table({}))
    return repeated, categories.close()


def _write_queries(work: Work, texts: Texts, num_queries: int) -> None:
    widths = texts.settings.query_tokens, texts.settings.query_words
    writer = CatalogWriter(work.tree / "catalog", "queries", num_queries, widths, texts)
    done = 0
    for batch in work.batches("SELECT text FROM final_queries ORDER BY id", 65_536):
        queries, none = batch.column("text"), np.zeros(batch.num_rows, np.int64)
        token_texts = queries if texts.mode in ("natural", "digits") else [""] * len(queries)
        word_lists = split_words(queries) if texts.mode == "words" else (none[:0], none)
        writer.append(pa.table({"text": queries}), token_texts, word_lists)
        done += batch.num_rows
        work.progress("queries", done, num_queries)
    writer.close(pa.table({"text": pa.array([], pa.string())}))


class CatalogWriter:
    """Writes one of catalog/{items,queries}: a parquet table of originals, and token and word matrices."""

    def __init__(self, folder: Path, stem: str, num_rows: int, widths: tuple[int, int], texts: Texts) -> None:
        """widths: of tokens and of words."""
        self.texts, self.widths = texts, widths
        singular, words = ID_TABLES[stem], texts.words
        kind = compact_type(texts.tokenizer.get_vocab_size() - 1)
        self.tokens = MatrixWriter(folder, f"{singular}_tokens", num_rows, widths[0], kind)
        self.word_ids = (
            MatrixWriter(folder, f"{singular}_words", num_rows, widths[1], compact_type(len(words)))
            if words is not None
            else None
        )
        self.path = folder / f"{stem}.parquet"
        self.parquet: pq.ParquetWriter | None = None

    def append(
        self, table: pa.Table, token_texts: list[str] | pa.Array, word_lists: tuple[np.ndarray, np.ndarray]
    ) -> None:
        if self.parquet is None:
            self.parquet = pq.ParquetWriter(self.path, table.schema, compression="zstd")
        self.parquet.write_table(table)
        texts, lowercase = self.texts, self.texts.settings.lowers_texts
        self.tokens.append(encode_texts(texts.tokenizer, token_texts, self.widths[0], lowercase))
        if texts.words is not None and self.word_ids is not None:
            self.word_ids.append(texts.words.matrix(*word_lists, self.widths[1]))

    def close(self, empty: pa.Table) -> None:
        if self.parquet is None:
            pq.write_table(empty, self.path)
        else:
            self.parquet.close()
        self.tokens.close()
        if self.word_ids is not None:
            self.word_ids.close()


def item_batches(work: Work, duplicates_allowed: bool) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The catalogue's items by id, one row each (columns id, key, text, words, category, path), and how
    many further rows of them were left out."""
    # of several rows of an item, one that says something: '' would be the first text
    empty = "text = '', words IS NULL, coalesce(path, '') = ''"
    sql = f"SELECT * FROM catalog_items ORDER BY id, {empty}, text, category, words, path"
    last = -1
    for batch in work.batches(sql, 65_536):
        ids = batch.column("id").to_numpy()
        first = np.diff(ids, prepend=last) != 0
        if len(ids):
            last = ids[-1]
        repeated = int((~first).sum())
        if repeated and not duplicates_allowed:
            raise DataError(
                f"item {batch.column('key')[int(np.flatnonzero(~first)[0])]} has several rows. Every item "
                "needs one row."
            )
        yield batch.filter(pa.array(first)), repeated
