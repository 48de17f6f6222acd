"""`tables`: bring your own logs. RAW/events.{parquet,csv,jsonl} and RAW/items.{parquet,csv,jsonl}.

events  user_id, item_id, time (integer ms since 1970 or ISO 8601, UTC when no offset is given), optional:
        task (rec, src; rec where absent),
        query (text, or a list of words or integers), clicked (0/1, 1 where absent)
items   item_id, text or words (list of integers) or both, optional: category (the names from the root: a
        list, also as JSON, or text like "Home > Kitchen > Pans"; empty for none)
Ids are strings or integers; numbers in CSV and JSON count as integers only if all of them are, and must not
have fractions or be rounded (7.0E+18). JSON is one object a line; a key that a row lacks is absent there.
"""

from pathlib import Path

from data_shards.categories import PATH_MARK
from data_shards.errors import DataError
from data_shards.options import PrepareSettings
from data_shards.sources import (
    EARLIEST_MS,
    LATEST_MS,
    NOT_IN_ITEMS,
    TOO_EARLY,
    TOO_LATE,
    ItemSql,
    Source,
    Tables,
)
from data_shards.sources.columns import INTEGERS, File, id_type, open_file, plain_id, row_number
from data_shards.sources.reading import is_words, no_words, trimmed, words_text
from data_shards.sql import literal
from data_shards.work import Work

FORMATS = ("parquet", "csv", "jsonl")
EVENT_COLUMNS = ("user_id", "item_id", "time", "task", "query", "clicked")  # the first three are required
OFFSET = r"(:[0-9]{2}(?:\.[0-9]+)?[-+][0-9]{2})([0-9]{2})$"  # +0800: not every version of duckdb reads it


def open_source(raw: Path, settings: PrepareSettings, goes_on: str = "") -> Source:
    """goes_on: the text mode of the folder that this log goes on from. It may then be without new items."""
    events = _found(raw, "events")[0]
    items = _found(raw, "items", optional=bool(goes_on))
    files = (events, *items)
    return Source(name="tables", files=files, read=lambda work: _read(work, events, items, goes_on))


def _found(raw: Path, stem: str, optional: bool = False) -> list[Path]:
    """The one file of a table, or none where it is optional."""
    found = [raw / f"{stem}.{suffix}" for suffix in FORMATS if (raw / f"{stem}.{suffix}").is_file()]
    if not found and not optional:
        raise DataError(
            f"{raw}: no {stem}.parquet, {stem}.csv or {stem}.jsonl in it. gensr prepare tables needs events "
            "and items."
        )
    if len(found) > 1:
        raise DataError(
            f"{raw}: {' and '.join(path.name for path in found)} are both there. Keep one of them."
        )
    return found


def _read(work: Work, events_path: Path, found: list[Path], goes_on: str) -> Tables:
    events = open_file(work, events_path, EVENT_COLUMNS[:3], EVENT_COLUMNS[3:])
    items_path = found[0] if found else events_path.parent / "items.jsonl"
    items = (
        open_file(work, items_path, ["item_id"], ["text", "words", "category"])
        if found
        else _no_items(items_path, goes_on)
    )
    if "text" not in items.types and "words" not in items.types:
        raise DataError(f"{items_path}: column text (or words) is missing. Found: {', '.join(items.types)}.")
    if events.types["time"] == "FLOAT":
        raise DataError(
            f"{events_path}:time: is a 32-bit floating-point column: times have lost digits. Write integer "
            "ms since 1970 or ISO 8601."
        )
    user_type = id_type(work, [(events, "user_id")])
    item_type = id_type(work, [(events, "item_id"), (items, "item_id")])
    work.con.execute(f"CREATE OR REPLACE TABLE item_rows AS {_items_sql(items, item_type)}")
    anonymised = "words" in items.types
    _check_items(work, items_path)
    sql = _events_sql(events, user_type, item_type, anonymised)
    return Tables(
        events=sql,
        items=ItemSql("item_rows", words="words" if anonymised else "NULL"),
        anonymised=anonymised,
        locate=lambda problem, value: _locate(work, events, (user_type, item_type), anonymised, problem),
    )


def _no_items(path: Path, goes_on: str) -> File:
    columns = ("item_id", "text" if goes_on == "natural" else "words")
    nothing = ", ".join(f"NULL::VARCHAR AS {name}" for name in columns)
    return File(path, f"(SELECT {nothing} WHERE false)", dict.fromkeys(columns, "VARCHAR"))


def _words_text(file: File, column: str) -> str:
    """SQL of a list of integers, or of its text "[1, 2, 3]", as "1 2 3"."""
    if file.types.get(column, "").endswith("[]"):
        return f"nullif(array_to_string(file.{column}, ' '), '')"
    return words_text(f"CAST(file.{column} AS VARCHAR)")


def _items_sql(items: File, item_type: str) -> str:
    words = _words_text(items, "words") if "words" in items.types else "NULL::VARCHAR"
    text = "coalesce(CAST(file.text AS VARCHAR), '')" if "text" in items.types else "''"
    category, path = _category(items)
    item_id = f"CAST({plain_id(items, 'item_id')} AS {item_type})"
    return (
        f"SELECT {item_id} AS item_id, {text} AS text, {words} AS words, {category} AS category, "
        f"{path} AS path FROM {items.scan} file"
    )


def _category(items: File) -> tuple[str, str]:
    """SQL of an item's category as text and as a path."""
    kind, mark = items.types.get("category"), literal(PATH_MARK)
    if kind is None:
        return "NULL::VARCHAR", "NULL::VARCHAR"
    if kind.endswith("[]"):
        return "array_to_string(file.category, ' > ')", f"array_to_string(file.category, {mark})"
    text = "CAST(file.category AS VARCHAR)"
    is_list, names = _json_list(text)
    return (
        f"CASE WHEN {is_list} THEN array_to_string({names}, ' > ') ELSE {text} END",
        f"CASE WHEN {is_list} THEN array_to_string({names}, {mark}) ELSE replace({text}, '>', {mark}) END",
    )


def _json_list(text: str) -> tuple[str, str]:
    """SQL: whether a text is a list, as JSON lines that are read as text show it, and its entries."""
    return f"{text} LIKE '[%]' AND json_valid({text})", f"""from_json({text}, '["VARCHAR"]')"""


def _natural_query(text: str) -> str:
    """SQL of a query in words: a list of them is joined, as one of a parquet file is."""
    is_list, words = _json_list(text)
    query = f"CASE WHEN {is_list} THEN array_to_string({words}, ' ') ELSE {text} END"
    return f"nullif({trimmed(query)}, '')"


def _check_items(work: Work, path: Path) -> None:
    missing = work.scalar("SELECT count(*) FROM item_rows WHERE item_id IS NULL")
    if missing:
        raise DataError(f"{path}: {missing} rows have no item_id. Remove them or give them one.")
    twice = work.con.execute(
        "SELECT item_id, count(*) FROM item_rows GROUP BY item_id HAVING count(*) > 1 ORDER BY item_id LIMIT "
        "1"
    ).fetchall()
    if twice:
        raise DataError(
            f"{path}:item_id: {twice[0][0]!r} is there {twice[0][1]} times. Every item needs one row."
        )
    wrong = work.con.execute(
        f"SELECT item_id, words FROM item_rows WHERE {no_words('words')} ORDER BY item_id LIMIT 1"
    ).fetchall()
    if wrong:
        raise DataError(
            f"{path}:words: those of item {wrong[0][0]!r} must be a list of integers, got {wrong[0][1]!r}"
        )
    # ['A', 'B'] is how pandas writes a list into a CSV; a list of lists is joined as ["A"] > ["B"]
    odd = work.con.execute(
        "SELECT item_id, category FROM item_rows WHERE regexp_matches(category, '(?s)^\\[[''\"\\[].*\\]$') "
        "ORDER BY item_id LIMIT 1"
    ).fetchall()
    if odd:
        raise DataError(
            f"{path}:category: that of item {odd[0][0]!r} must be one list of names (in a CSV as JSON: "
            f'["A", "B"]) or text like A > B, got {odd[0][1]!r:.80}'
        )


def _events_sql(events: File, user_type: str, item_type: str, anonymised: bool, carried: str = "") -> str:
    """The canonical events; `carried` is a further column of the file, passed through as `carried`."""
    types, time = events.types, _time_sql(events.types["time"])
    task = "0"
    if "task" in types:
        absent = "WHEN file.task IS NULL THEN 0" if "task" in events.gaps else ""
        task_text = f"lower({trimmed('CAST(file.task AS VARCHAR)')})"
        task = f"CASE {absent} WHEN {task_text} = 'rec' THEN 0 WHEN {task_text} = 'src' THEN 1 ELSE -1 END"
    query = "NULL"
    if "query" in types:
        query = (
            _words_text(events, "query")
            if anonymised or types["query"].endswith("[]")
            else _natural_query("CAST(file.query AS VARCHAR)")
        )
    clicked = (
        "CASE WHEN clicked_text IN ('1', '1.0', 'true') THEN true "
        "WHEN clicked_text IN ('0', '0.0', 'false') THEN false END"
    )
    clicked_text = f"lower({trimmed('CAST(file.clicked AS VARCHAR)')})" if "clicked" in types else "'1'"
    if "clicked" in events.gaps:
        clicked_text = f"coalesce({clicked_text}, '1')"
    wrong_query = f"task = 1 AND NOT {is_words('query')}" if anonymised else "false"
    missing_time = "raw_time IS NULL OR lower(raw_time) IN ('', 'nan', 'nat')"
    return f"""
        SELECT {"row.carried, " if carried else ""}row.user_id, row.item_id, time, task::TINYINT AS task,
            CASE WHEN task = 1 THEN query END AS query, {clicked} AS clicked, CASE
            WHEN row.user_id IS NULL THEN 'no user_id'
            WHEN row.item_id IS NULL THEN 'no item_id'
            WHEN {missing_time} THEN 'no time'
            WHEN time IS NULL THEN 'error: time'
            WHEN time < {EARLIEST_MS} THEN '{TOO_EARLY}'
            WHEN time >= {LATEST_MS} THEN '{TOO_LATE}'
            WHEN task = -1 THEN 'error: task'
            WHEN {clicked} IS NULL THEN 'error: clicked'
            WHEN {wrong_query} THEN 'error: query'
            WHEN item_rows.item_id IS NULL THEN '{NOT_IN_ITEMS}'
            END AS problem
        FROM (SELECT {f"{carried} AS carried, " if carried else ""}
                CAST({plain_id(events, "user_id")} AS {user_type}) AS user_id,
                CAST({plain_id(events, "item_id")} AS {item_type}) AS item_id,
                {trimmed("CAST(file.time AS VARCHAR)")} AS raw_time, {time} AS time, {task} AS task,
                {query} AS query, {clicked_text} AS clicked_text
              FROM {events.scan} file) row
        LEFT JOIN item_rows ON row.item_id = item_rows.item_id"""


def _time_sql(kind: str) -> str:
    """SQL of column `time` of a duckdb type as ms since 1970: an instant, whatever the machine's time zone.
    The connection's zone is UTC, so text without an offset is in UTC."""
    if kind in (*INTEGERS, "DOUBLE") or kind.startswith("DECIMAL"):
        return "TRY_CAST(file.time AS BIGINT)"
    if kind.startswith("TIMESTAMPTZ") or kind.endswith("WITH TIME ZONE"):
        return "epoch_ms(CAST(file.time AS TIMESTAMPTZ))"
    if kind.startswith(("TIMESTAMP", "DATE")):
        return "epoch_ms(CAST(file.time AS TIMESTAMP))"
    raw_time = f"nullif({trimmed('CAST(file.time AS VARCHAR)')}, '')"
    number = f"CASE WHEN NOT regexp_matches({raw_time}, '[a-zA-Z_]') THEN TRY_CAST({raw_time} AS BIGINT) END"
    with_colon = f"regexp_replace({raw_time}, {literal(OFFSET)}, '\\1:\\2')"
    return f"coalesce({number}, epoch_ms(TRY_CAST({with_colon} AS TIMESTAMPTZ)))"


EXPECTED = {
    "time": "integer ms since 1970 or ISO 8601",
    "task": "rec or src",
    "clicked": "0 or 1",
    "query": "a list of integers, as the items have words",
}


def _locate(work: Work, events: File, id_types: tuple[str, str], anonymised: bool, problem: str) -> DataError:
    """The first row that made `problem` ("error: COLUMN")."""
    column = problem.removeprefix("error: ")
    work.in_file_order()
    columns = ", ".join(name for name in EVENT_COLUMNS if name in events.types)
    work.con.execute(
        f"CREATE OR REPLACE TABLE numbered AS SELECT {columns}, row_number() OVER () AS position "
        f"FROM {events.scan}"
    )
    numbered = File(events.path, "numbered", events.types, events.gaps)
    sql = _events_sql(
        numbered,
        *id_types,
        anonymised,
        carried=f"{{'position': file.position, 'shown': CAST(file.{column} AS VARCHAR)}}",
    )
    found = work.con.execute(
        f"SELECT carried FROM ({sql}) WHERE problem = {literal(problem)} ORDER BY carried.position LIMIT 1"
    ).fetchall()[0]
    row = row_number(events.path, found[0]["position"])
    return DataError(
        f"{events.path}:{column}:row {row}: must be {EXPECTED[column]}, got {found[0]['shown']!r}"
    )
