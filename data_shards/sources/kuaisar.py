"""`kuaisar`: KuaiSAR (Sun et al., CIKM 2023; Zenodo record 8181109), or simulated logs in its schema.

Reads rec_inter.csv, src_inter.csv and item_features.csv, not the user and social tables. A click is click ≥ 1
or click_cnt ≥ 1; rows with a number below 0 are dropped and counted. `timestamp` of a recommendation is when
the server sent a batch of items. Captions and keywords are lists of integers from one vocabulary; the English
category names are the only natural text. Search results that are not posts (USER, LIVE, COMMODITY, MUSIC,
ADVERT) have ids of their own kind and no features: they are dropped and counted, as are results without a
type. Clicked posts without a row in item_features stay, with an empty text.
"""

from pathlib import Path

from data_shards.categories import PATH_MARK
from data_shards.errors import DataError
from data_shards.options import PrepareSettings
from data_shards.schema import REC, SRC
from data_shards.sources import EARLIEST_MS, LATEST_MS, TOO_EARLY, TOO_LATE, ItemSql, Source, Tables
from data_shards.sources.reading import csv_scan, find_files, integer, whole_number, words_list
from data_shards.sql import literal
from data_shards.work import Work

LICENSE = "CC BY-NC-SA 4.0"
POST_TYPES = ("VIDEO", "IMAGE_ATLAS")
PUBLISHED = {
    "KuaiSAR": {"users": 25_877, "items": 6_890_707, "queries": 453_667, "rec": 14_605_716, "src": 5_059_169},
    "KuaiSAR-small": {
        "users": 25_877,
        "items": 4_195_529,
        "queries": 267_608,
        "rec": 7_493_101,
        "src": 3_171_231,
    },
    "KuaiSAR-small after UniSAR's filter": {"users": 22_700, "items": 673_415},
}
# Ids and times are read as text and clicks as DOUBLE because duckdb would round 3.5 to 4 and take 1.684E12,
# which has lost digits, as it stands; see reading.integer.
REC_TYPES = {"user_id": "VARCHAR", "item_id": "VARCHAR", "timestamp": "VARCHAR", "click": "DOUBLE"}
SRC_TYPES = {
    "user_id": "VARCHAR",
    "item_id": "VARCHAR",
    "search_session_timestamp": "VARCHAR",
    "keyword": "VARCHAR",
    "click_cnt": "DOUBLE",
    "item_type": "VARCHAR",
}
LEVELS = [f"{level}_level_category_name_en" for level in ("first", "second", "third", "fourth")]
ITEM_TYPES = {"item_id": "VARCHAR", "caption": "VARCHAR", **dict.fromkeys(LEVELS, "VARCHAR")}


def open_source(raw: Path, settings: PrepareSettings) -> Source:
    files = find_files(raw, ("rec_inter.csv", "src_inter.csv", "item_features.csv"))
    return Source(
        name="kuaisar",
        files=files,
        read=lambda work: _read(work, *files),
        license=LICENSE,
        published=PUBLISHED,
    )


def _read(work: Work, rec: Path, src: Path, items: Path) -> Tables:
    events = f"""
        SELECT {integer(rec, "user_id")} AS user_id, {integer(rec, "item_id")} AS item_id, timestamp AS time,
            {REC}::TINYINT AS task, NULL::VARCHAR AS query, {whole_number(rec, "click")} >= 1 AS clicked,
            {_problem(rec.name, "timestamp", "click")} AS problem
        FROM {_timed(rec, "timestamp", REC_TYPES)}
        UNION ALL
        SELECT {integer(src, "user_id")}, {integer(src, "item_id")}, search_session_timestamp,
            {SRC}::TINYINT, {words_list("keyword")}, {whole_number(src, "click_cnt")} >= 1,
            {_problem(src.name, "search_session_timestamp", "click_cnt", search=True)}
        FROM {_timed(src, "search_session_timestamp", SRC_TYPES)}"""
    return Tables(
        events=events,
        items=_items_sql(items),
        anonymised=True,
        duplicate_items=True,
        locate=lambda problem, value: _locate_keyword(work, src, value),
    )


def _timed(path: Path, time: str, types: dict[str, str]) -> str:
    """SQL that scans a file, its times as integers."""
    return f"(SELECT * REPLACE ({integer(path, time)} AS {time}) FROM {csv_scan(path, types)})"


def _problem(file: str, time: str, click: str, search: bool = False) -> str:
    """SQL of why a row cannot be used; NULL when it can."""
    cases = [
        f"WHEN {column} IS NULL THEN '{file}: no {column}'" for column in ("user_id", "item_id", time, click)
    ]
    cases += [
        f"WHEN {click} < 0 THEN '{file}: {click} below 0'",  # -1 means unknown, and not unclicked
        f"WHEN {time} < {EARLIEST_MS} THEN '{file}: {TOO_EARLY}'",
        f"WHEN {time} >= {LATEST_MS} THEN '{file}: {TOO_LATE}'",
    ]
    if search:
        posts = ", ".join(literal(kind) for kind in POST_TYPES)
        cases.append(f"WHEN item_type IS NULL THEN '{file}: no item_type'")
        cases.append(f"WHEN item_type NOT IN ({posts}) THEN '{file}: result of type ' || item_type")
        cases.append(f"WHEN keyword IS NULL OR trim(keyword, '[], ') = '' THEN '{file}: no keyword'")
    return f"CASE {' '.join(cases)} END"


def _items_sql(path: Path) -> ItemSql:
    names = ", ".join(f"nullif({level}, 'empty')" for level in LEVELS)
    category = f"nullif(concat_ws(' > ', {names}), '')"
    return ItemSql(
        scan=f"(SELECT * REPLACE ({integer(path, 'item_id')} AS item_id) FROM {csv_scan(path, ITEM_TYPES)})",
        text=f"concat_ws(' ', {names})",
        words="caption",
        category=category,
        path=f"concat_ws({literal(PATH_MARK)}, {names})",
        words_origin=f"{path}:caption",
    )


def _locate_keyword(work: Work, src: Path, value: str) -> DataError:
    found = work.first_row(csv_scan(src, SRC_TYPES), f"keyword = {literal(value)}", "keyword")
    assert found is not None
    row = found[0] + 1  # the header is row 1
    return DataError(f"{src}:keyword:row {row}: must be a list of integers like [1, 2, 3], got {value!r}")
