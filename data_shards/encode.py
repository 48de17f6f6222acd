"""Raw keys → dense ids, and the one canonical order of all clicks: by user, then time, ties by hash.

Ids are a permutation by hash of the sorted original ids: neither order of appearance nor popularity can be
read from them.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from data_shards.errors import DataError
from data_shards.filters import keep_users_and_items
from data_shards.hashing import derive_seed, mix64, permutation
from data_shards.histories import first_of_runs, order_by_hash
from data_shards.options import PrepareSettings
from data_shards.schema import NO_QUERY, REC, SRC
from data_shards.sources import Source, Tables
from data_shards.sources.reading import estimated_rows, no_words
from data_shards.sql import literal, parquet_scan
from data_shards.work import BATCH_ROWS, Work, in_threads, user_chunks

EVENT_DTYPES = {"user": "i4", "item": "i4", "time": "i8", "task": "i1", "query": "i4"}
KEY_COLUMNS = {"users": "user_id", "items": "item_id", "queries": "query"}
ID_TABLES = {"users": "user", "items": "item", "queries": "query"}
USER_SEED, ITEM_SEED, QUERY_SEED, TIE_SEED = 11, 12, 13, 14  # what a hash is for

# the reason to drop a row that its source calls usable
MISSING = f"""CASE WHEN user_id IS NULL THEN 'no user_id' WHEN item_id IS NULL THEN 'no item_id'
    WHEN time IS NULL THEN 'no time' WHEN task = {SRC} AND query IS NULL THEN 'search without a query' END"""


def read_rows(work: Work, source: Source) -> dict[str, Any]:
    """Stage: raw files → rows.parquet, `rows` in the work database. Returns counts and what was dropped, and
    why."""
    tables = source.read(work)
    # a table of the work database would cost twice as much and hold it all in memory
    path = work.folder / "rows.parquet"
    events = f"SELECT * REPLACE (coalesce(problem, {MISSING}) AS problem) FROM ({tables.events})"
    work.execute(
        f"COPY ({events}) TO {literal(path)} (FORMAT parquet, COMPRESSION uncompressed, "
        "DICTIONARY_SIZE_LIMIT 10000)",
        "read",
        sum(estimated_rows(path) for path in source.files),
    )
    work.con.execute(f"CREATE OR REPLACE VIEW rows AS SELECT * FROM {parquet_scan(path)}")
    sizes = {name: _collect_keys(work, name, column) for name, column in KEY_COLUMNS.items()}
    dropped = dict(tables.dropped)
    for problem, count in work.con.execute(
        "SELECT problem, count(*) FROM rows WHERE problem IS NOT NULL GROUP BY 1 ORDER BY 1"
    ).fetchall():
        dropped[problem] = dropped.get(problem, 0) + count
    _raise_wrong_values(work, tables, dropped)
    usable = "clicked AND problem IS NULL"
    rec, src, rec_clicks, src_clicks = work.con.execute(
        f"""SELECT count(*) FILTER (task = {REC}), count(*) FILTER (task = {SRC}),
            count(*) FILTER (task = {REC} AND {usable}), count(*) FILTER (task = {SRC} AND {usable})
        FROM rows"""
    ).fetchall()[0]
    clicks = rec_clicks + src_clicks
    if clicks == 0:
        reasons = (
            "; ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "the files hold no rows"
        )
        raise DataError(
            f"{', '.join(str(path) for path in source.files)}: no usable click. Dropped: {reasons}."
        )
    return {
        "counts": {
            **{**sizes, "rec": rec, "src": src, "clicks": clicks},
            "usable": {"rec": rec_clicks, "src": src_clicks},
        },
        "dropped": dropped,
        "anonymised": tables.anonymised,
        "notes": tables.notes,
        "duplicate_items": tables.duplicate_items,
        "items": dataclasses.asdict(tables.items),
        "stored": dataclasses.asdict(tables.stored) if tables.stored else None,
    }


def _collect_keys(work: Work, name: str, column: str) -> int:
    """Table {name}_keys (key, clicked): every value of a column of rows, and whether a usable click has it.
    Returns how many there are."""
    work.con.execute(
        f"""CREATE OR REPLACE TABLE {name}_keys AS
        SELECT {column} AS key, bool_or(clicked AND problem IS NULL) AS clicked FROM rows
        WHERE {column} IS NOT NULL GROUP BY 1"""
    )
    return int(work.scalar(f"SELECT count(*) FROM {name}_keys"))


def _raise_wrong_values(work: Work, tables: Tables, problems: Iterable[str]) -> None:
    wrong = [problem for problem in problems if problem.startswith("error: ")]
    if wrong:
        assert tables.locate is not None
        raise tables.locate(wrong[0], "")
    if tables.anonymised:
        found = work.con.execute(f"SELECT min(key) FROM queries_keys WHERE {no_words('key')}").fetchall()
        if found[0][0] is not None:
            assert tables.locate is not None
            raise tables.locate("error: query", found[0][0])


def encode_keys(
    work: Work, settings: PrepareSettings, items: dict[str, str], known: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Stage: original users, items and queries of clicks → codes 0, 1, … in hashed order (tables users_codes,
    items_codes, queries_codes). known: how many of each have a code already (tables known_users and so on);
    the others follow. Also clicked_items: how many of the items a usable click has."""
    known = known or {}
    every_item = (
        f" UNION SELECT item_id FROM {items['scan']} WHERE item_id IS NOT NULL"
        if settings.min_interactions == 0
        else ""
    )
    return {
        "users": _encode(work, "users", derive_seed(settings.seed, USER_SEED), known),
        "items": _encode(work, "items", derive_seed(settings.seed, ITEM_SEED), known, every_item),
        "queries": _encode(work, "queries", derive_seed(settings.seed, QUERY_SEED), known),
        "clicked_items": int(work.scalar("SELECT count(*) FROM items_keys WHERE clicked")),
    }


def _encode(work: Work, name: str, seed: int, known: Mapping[str, int], more: str = "") -> int:
    """Table {name}_codes (key, code) of the keys of clicks and those that `more` adds. Returns how many there
    are."""
    first = known.get(name, 0)
    others = f" WHERE key NOT IN (SELECT key FROM known_{name})" if known else ""
    keys = work.con.sql(
        f"SELECT key FROM (SELECT key FROM {name}_keys WHERE clicked{more}){others} ORDER BY key"
    ).to_arrow_table()
    codes = first + permutation(keys.num_rows, seed)
    work.put_table(f"{name}_codes", keys.append_column("code", pa.array(codes, pa.int32())))
    if known:
        work.con.execute(f"INSERT INTO {name}_codes SELECT key, code FROM known_{name}")
    return first + int(keys.num_rows)


def sort_clicks(work: Work, total: int) -> dict[str, Any]:
    """Stage: all clicks as flat columns click_* of codes, by (user, time, item, task, query), exact
    duplicates removed. total: usable clicks."""
    sql = f"""
        SELECT u.code AS user, i.code AS item, r.time AS time, r.task AS task,
            coalesce(q.code, {NO_QUERY}) AS query
        FROM rows r JOIN users_codes u ON r.user_id = u.key JOIN items_codes i ON r.item_id = i.key
            LEFT JOIN queries_codes q ON r.query = q.key
        WHERE r.problem IS NULL AND r.clicked ORDER BY 1, 3, 2, 4, 5"""
    kept = work.write_columns(_without_duplicates(work, sql, total), EVENT_DTYPES, "click_")
    return {"num_duplicates": total - kept}


def _without_duplicates(work: Work, sql: str, total: int) -> Iterator[dict[str, np.ndarray]]:
    done, last = 0, None
    for batch in work.batches(sql):
        columns = {name: batch.column(name).to_numpy() for name in EVENT_DTYPES}
        differs = np.zeros(batch.num_rows, bool)
        for name, values in columns.items():
            differs[1:] |= values[1:] != values[:-1]
            differs[:1] |= last is None or values[:1] != last[name]
        if batch.num_rows:
            last = {name: values[-1].copy() for name, values in columns.items()}
        done += batch.num_rows
        work.progress("sort", done, total)
        yield {name: values[differs] for name, values in columns.items()}


def filter_clicks(work: Work, settings: PrepareSettings, sizes: dict[str, int]) -> dict[str, Any]:
    """Stage: users, items and clicks that remain, with final ids, in the canonical order (columns user, item,
    time, task, query).

    Also columns user_code, item_code and query_code: the code of each final id.
    """
    clicks = work.columns(EVENT_DTYPES, "click_")
    keep_user, keep_item, removed = keep_users_and_items(
        clicks["user"],
        clicks["item"],
        clicks["task"],
        sizes["users"],
        sizes["items"],
        settings.min_interactions,
        settings.both_behaviours,
        settings.kcore,
        work.threads,
    )
    keep_query = np.zeros(sizes["queries"], bool)
    num_events = num_searches = 0
    for start in range(0, len(clicks["user"]), BATCH_ROWS):
        rows = slice(start, start + BATCH_ROWS)
        kept = keep_user[clicks["user"][rows]] & keep_item[clicks["item"][rows]]
        query = clicks["query"][rows][kept]
        keep_query[query[query >= 0]] = True
        num_events += int(kept.sum())
        num_searches += int((clicks["task"][rows][kept] == SRC).sum())
    if num_events == 0:
        raise DataError(
            f"the filter leaves no click of {len(clicks['user'])}: lower "
            f"min_interactions={settings.min_interactions}, "
            "or set kcore=false or both_behaviours=false."
        )
    new_id = {"user": _new_ids(keep_user), "item": _new_ids(keep_item), "query": _new_ids(keep_query)}
    work.write_columns(_renumbered(work, clicks, keep_user, keep_item, new_id, settings.seed), EVENT_DTYPES)
    codes = {"user_code": keep_user, "item_code": keep_item, "query_code": keep_query}
    for name, keep in codes.items():
        work.write_columns([{name: np.flatnonzero(keep)}], {name: "i4"})
    return {
        "num_users": int(keep_user.sum()),
        "num_items": int(keep_item.sum()),
        "num_queries": int(keep_query.sum()),
        "dropped_clicks": len(clicks["user"]) - num_events,
        "kept": {"rec": num_events - num_searches, "src": num_searches},
        "removed": removed,
    }


def _new_ids(keep: np.ndarray) -> np.ndarray:
    return (np.cumsum(keep) - 1).astype(np.int32)


def _renumbered(
    work: Work,
    clicks: dict[str, np.ndarray],
    keep_user: np.ndarray,
    keep_item: np.ndarray,
    new_id: dict[str, np.ndarray],
    seed: int,
) -> Iterator[dict[str, np.ndarray]]:

    def renumber(bounds: tuple[int, int]) -> dict[str, np.ndarray]:
        chunk = {name: np.asarray(values[slice(*bounds)]) for name, values in clicks.items()}
        kept = keep_user[chunk["user"]] & keep_item[chunk["item"]]
        chunk = {name: values[kept] for name, values in chunk.items()}
        query = chunk["query"]
        chunk["user"], chunk["item"] = new_id["user"][chunk["user"]], new_id["item"][chunk["item"]]
        if len(new_id["query"]):
            chunk["query"] = np.where(query >= 0, new_id["query"][np.maximum(query, 0)], NO_QUERY).astype(
                np.int32
            )
        order = canonical_order(chunk, seed)
        work.progress("filter", bounds[1], len(clicks["user"]))
        return {name: values[order] for name, values in chunk.items()}

    return in_threads(renumber, user_chunks(clicks["user"]), work.threads)


def canonical_order(rows: dict[str, np.ndarray], seed: int) -> np.ndarray:
    """Order of rows (sorted by user and time already) by user, time, and a hash of (user, item, task, query):
    never item id or file order."""
    group = np.cumsum(first_of_runs(rows["user"], rows["time"])) - 1
    pair = (rows["user"].astype(np.uint64) << np.uint64(32)) | rows["item"].astype(np.uint64)
    kind = (rows["query"].astype(np.int64) + 1) * 2 + rows["task"]
    return order_by_hash(group, mix64(mix64(pair, derive_seed(seed, TIE_SEED)) ^ mix64(kind, 1)))
