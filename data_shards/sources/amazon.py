"""`amazon`: the review releases (reviews + metadata, 2014 and 2018) and the NAME.inter.json + NAME.item.json
pair made from them.

These logs hold no searches. As is usual (Ai et al., SIGIR 2017), a query is synthesised from the item's
category path, and each purchase gives one recommendation and one search event at the same time: search
results on this data are results on synthetic queries. Where fewer than `min_query_items` bought items have a
query, they lose the last level of their paths, until no query gives its target away.
"""

import ast
import gzip
import html
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.categories import PATH_MARK
from data_shards.documents import parse_json, storable
from data_shards.errors import DataError
from data_shards.options import PrepareSettings
from data_shards.schema import REC, SRC
from data_shards.sources import LATEST_MS, ItemSql, Source, Tables
from data_shards.sql import parquet_scan
from data_shards.work import Work

LICENSE = "Amazon review data (J. McAuley, UCSD): research use"
STOP_WORDS = frozenset(
    """a an and are as at be but by for from has if in into is it its no not of on or other our such than that
    the their then there these they this to was we will with you your""".split()  # noqa: SIM905
)
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
# What separates the levels of a path written as text: the first of these that is anywhere in the file. Names
# contain ", ", which is therefore the last.
SEPARATORS = {
    ",": re.compile(r",(?!\s)"),
    " > ": re.compile(r"\s+>\s+"),
    "|": re.compile(r"\s*\|\s*"),
    ", ": re.compile(r",\s+"),
}
ROWS = 50_000
# Section 6.1.1 of the GenSR paper (arXiv:2504.06714)
KINDLE = {
    "Kindle Store, 5-core": {
        "users": 68_223,
        "items": 61_934,
        "queries": 4_298,
        "rec": 989_618,
        "src": 934_664,
    }
}


def open_source(raw: Path, settings: PrepareSettings) -> Source:
    if not raw.is_dir():
        raise DataError(
            f"{raw}: must be a folder with NAME.inter.json and NAME.item.json, or with one reviews and one "
            "meta_*.json.gz file."
        )
    pair = _find_pair(raw)
    if pair:
        return Source(
            name="amazon",
            files=pair,
            read=lambda work: _read_pair(work, *pair, settings),
            license=LICENSE,
            has_clock=False,
        )
    release = _find_release(raw)
    return Source(
        name="amazon",
        published=KINDLE if release[0].name.startswith("Kindle_Store") else {},
        files=release,
        read=lambda work: _read_release(work, *release, settings),
        license=LICENSE,
    )


def _find_pair(raw: Path) -> tuple[Path, Path] | None:
    inter = sorted(raw.glob("*.inter.json"))
    if not inter:
        return None
    items = raw / f"{inter[0].name.removesuffix('.inter.json')}.item.json"
    if len(inter) > 1:
        raise DataError(
            f"{raw}: holds {', '.join(path.name for path in inter)}. Give each category a folder of its own."
        )
    if not items.is_file():
        raise DataError(f"{items}: no such file; {inter[0].name} needs it beside it.")
    return inter[0], items


def _find_release(raw: Path) -> tuple[Path, Path]:
    files = sorted(path for pattern in ("*.json", "*.json.gz") for path in raw.glob(pattern))
    metas = [path for path in files if path.name.startswith("meta_")]
    reviews = [path for path in files if not path.name.startswith("meta_")]
    reviews = [path for path in reviews if re.search(r"_5\.json(\.gz)?$", path.name)] or reviews
    if len(metas) != 1 or len(reviews) != 1:
        found = ", ".join(path.name for path in files) or "no .json or .json.gz file"
        raise DataError(
            f"{raw}: expected one reviews file (like Kindle_Store_5.json.gz) and one meta_*.json.gz, "
            f"or NAME.inter.json and NAME.item.json. Found: {found}."
        )
    return reviews[0], metas[0]


def category_query(path: list[str]) -> str:
    """The words of all levels in order, lower-cased, without stop words and repetitions. "" for an empty
    path."""
    words = (word for level in path for word in WORD.findall(level.lower()))
    return " ".join(dict.fromkeys(word for word in words if word not in STOP_WORDS))


def item_text(path: list[str], title: str, text_order: str) -> str:
    """Category names below the root, and the title."""
    parts = [" ".join(path[1:]), title]
    return " ".join(part for part in (parts if text_order == "categories_title" else parts[::-1]) if part)


def _clean(value: Any) -> str:
    """Text of a metadata field: entities and tags resolved, one line. A title may be a number (1984)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return ""
    return storable(" ".join(re.sub(r"<[^>]*>", " ", html.unescape(value)).split()))


def _item_row(item_id: Any, title: Any, path: list[str], text_order: str) -> dict[str, Any]:
    path = [level for level in (_clean(level) for level in path) if level]
    return {
        "item_id": item_id,
        "text": item_text(path, _clean(title), text_order),
        "category": " > ".join(path) or None,
        "path": PATH_MARK.join(path),
        "queries": [
            query for depth in range(1, len(path) + 1) if (query := category_query(path[:depth]))
        ],  # from the shortest to the whole path
    }


# ------------------------------------------------------------------ NAME.inter.json + NAME.item.json


def _read_pair(work: Work, inter_path: Path, item_path: Path, settings: PrepareSettings) -> Tables:
    histories, items = _json_object(inter_path), _json_object(item_path)
    to_id = _id_converter([*histories, *items])
    levels = Levels(lambda: (_category_path(fields) for fields in items.values()))
    item_rows = []
    for number, (key, fields) in enumerate(items.items(), start=1):
        where = f"{item_path}:row {number} ({key})"
        if not isinstance(fields, dict):
            raise DataError(f"{where}: must be an object with title and categories, got {fields!r:.60}")
        path = levels.split(_category_path(fields), where)
        item_rows.append(_item_row(to_id(key), fields.get("title"), path, settings.text_order))
    events, unknown = _pair_events(histories, items, inter_path, to_id)
    if not events["time"]:
        raise DataError(
            f"{inter_path}: no interaction with an item of {item_path.name} ({unknown} with unknown items)"
        )
    pq.write_table(pa.table(events), work.folder / "reviews.parquet")
    pq.write_table(_item_table(item_rows, to_id is int), work.folder / "meta.parquet")
    dropped = {"item not in the metadata": unknown} if unknown else {}
    return _tables(work, settings.min_query_items, dropped, levels.notes())


def _pair_events(
    histories: dict[str, Any], items: dict[str, Any], path: Path, to_id: type[int] | type[str]
) -> tuple[dict[str, list[Any]], int]:
    """→ columns of the purchases, and how many are of unknown items."""
    events: dict[str, list[Any]] = {"user_id": [], "item_id": [], "time": []}
    unknown = 0
    for number, (user, clicked) in enumerate(histories.items(), start=1):
        if not isinstance(clicked, list):
            raise DataError(
                f"{path}:row {number} ({user}): must be a list of items, oldest first, got {clicked!r:.60}"
            )
        for position, item in enumerate(clicked):
            key = _id_text(item, f"{path}:row {number} ({user}): an item")
            if key not in items:
                unknown += 1
                continue
            events["user_id"].append(to_id(user))
            events["item_id"].append(to_id(key))
            events["time"].append(position)
    return events, unknown


def _json_object(path: Path) -> dict[str, Any]:
    """A file that is one JSON object; its keys are ids, as UTF-8 can hold them, without white space at their
    edges."""
    document = parse_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(path))
    if not isinstance(document, dict) or not document:
        raise DataError(
            f"{path}: must be a JSON object with at least one entry, got {type(document).__name__}"
        )
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = _id_text(key, "")
        if name in found:
            raise DataError(f"{path}: two entries have the id {name!r} but for white space. Join them")
        found[name] = value
    return found


def _id_text(value: Any, where: str) -> str:
    """An id as text without white space at its edges; whole numbers are what a table program makes of numeric
    ones. Raises DataError for any other type."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where} must be text or an integer, got {value!r:.60}")
    return storable(str(value)).strip()


def _field_id(record: dict[str, Any], field: str, where: str) -> str:
    """_id_text() of a field; "" where there is none."""
    value = record.get(field)
    return "" if value is None else _id_text(value, f"{where}: {field}")


def _id_converter(keys: list[str]) -> type[int] | type[str]:
    """int when every key is an integer written the usual way."""
    return int if all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", key) for key in keys) else str


# ------------------------------------------------------------------ reviews + meta of the releases


def _read_release(work: Work, reviews: Path, meta: Path, settings: PrepareSettings) -> Tables:
    dropped: Counter[str] = Counter()
    levels = Levels(lambda: (_category_path(record) for _, record in read_records(meta)))
    _write_parquet(
        work.folder / "meta.parquet",
        _meta_rows(meta, settings.text_order, dropped, levels),
        _item_table([], False).schema,
    )
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("time", pa.int64())])
    _write_parquet(work.folder / "reviews.parquet", _review_rows(reviews, work, dropped), schema)
    return _tables(work, settings.min_query_items, dict(dropped), levels.notes())


def _review_rows(path: Path, work: Work, dropped: Counter[str]) -> Iterator[dict[str, Any]]:
    for number, record in read_records(path):
        if number % ROWS == 0:
            work.progress("read", number, 0)
        where = f"{path}:row {number}"
        time = _milliseconds(record.get("unixReviewTime"), where)
        if time is None:
            dropped["review without a time"] += 1
        elif time >= LATEST_MS:
            dropped["time after 2099 (in milliseconds? it must be seconds)"] += 1
        elif (user := _field_id(record, "reviewerID", where)) and (item := _field_id(record, "asin", where)):
            yield {"user_id": user, "item_id": item, "time": time}
        else:
            dropped["review without a user or an item"] += 1


def _milliseconds(seconds: Any, where: str) -> int | None:
    """unixReviewTime (a number, or its text) in ms; None where there is none. Raises DataError for anything
    else."""
    try:
        value = float("nan" if seconds is None else seconds)
        if isinstance(seconds, bool) or value == float("inf"):
            raise ValueError
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{where}: unixReviewTime must be seconds since 1970, got {seconds!r:.60}") from error
    return int(value) * 1000 if value > 0 else None


def _meta_rows(
    path: Path, text_order: str, dropped: Counter[str], levels: "Levels"
) -> Iterator[dict[str, Any]]:
    for number, record in read_records(path):
        where = f"{path}:row {number}"
        item = _field_id(record, "asin", where)
        if not item:
            dropped["metadata without an item"] += 1
            continue
        yield _item_row(item, record.get("title"), levels.split(_category_path(record), where), text_order)


def _category_path(record: Any) -> Any:
    """2018: `category`, one path. 2014: `categories`, a list of paths, of which the longest says most (the
    first of equals). A pair's `categories`: text."""
    if not isinstance(record, dict):
        return None
    path = record.get("category") or record.get("categories")
    if isinstance(path, list) and path and all(isinstance(level, list) for level in path):
        return max(path, key=len)
    return path


class Levels:
    """Splits category paths into levels, counting them.

    paths: the raw paths of the whole file, asked for only if one is text.
    """

    def __init__(self, paths: Callable[[], Iterable[Any]]) -> None:
        self.paths = paths
        self.separator: str | None = None  # of paths written as text; "" when nothing separates
        self.counts: Counter[int] = Counter()

    def split(self, path: Any, where: str) -> list[str]:
        """Raises DataError naming `where` when a path is neither text nor a list of texts."""
        if path is None or path == "":
            levels: list[str] = []
        elif isinstance(path, str):
            if self.separator is None:
                self.separator = self._find_separator()
            levels = SEPARATORS[self.separator].split(path) if self.separator else [path]
        elif isinstance(path, list) and all(isinstance(level, str) or level is None for level in path):
            levels = [level for level in path if level is not None]
        else:
            raise DataError(f"{where}: categories must be text or a list of texts, got {path!r:.60}")
        self.counts[len(levels)] += 1
        return levels

    def _find_separator(self) -> str:
        patterns = list(SEPARATORS.values())
        first = len(patterns)
        for path in filter(lambda path: isinstance(path, str), self.paths()):
            found = (rank for rank, pattern in enumerate(patterns[:first]) if pattern.search(path))
            first = next(found, first)
            if not first:
                break
        return [*SEPARATORS, ""][first]

    def notes(self) -> dict[str, Any]:
        """Facts for the manifest where the unusual rule was used."""
        if self.separator in (None, ","):
            return {}
        return {
            "category_separator": self.separator,
            "category_levels": {str(depth): count for depth, count in sorted(self.counts.items())},
        }


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a file with one object a line, gzip or plain: strict JSON, or Python
    literals as in the 2014 metadata."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse_line(line, path, number)
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}:row {number + 1}: the file is damaged or cut off ({error}). Download it again."
        ) from error
    if number == 0:
        raise DataError(f"{path}: empty file")


def _parse_line(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        try:
            record = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
            raise DataError(
                f"{path}:row {number}: neither JSON nor a Python literal: {line.strip()[:80]!r}"
            ) from error
    if not isinstance(record, dict):
        raise DataError(f"{path}:row {number}: must be an object, got {type(record).__name__}")
    return record


# ------------------------------------------------------------------ common


def _item_table(rows: list[dict[str, Any]], integers: bool) -> pa.Table:
    schema = pa.schema(
        [
            ("item_id", pa.int64() if integers else pa.string()),
            ("text", pa.string()),
            ("category", pa.string()),
            ("path", pa.string()),
            ("queries", pa.list_(pa.string())),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        part: list[dict[str, Any]] = []
        for row in rows:
            part.append(row)
            if len(part) == ROWS:
                writer.write_table(pa.Table.from_pylist(part, schema=schema))
                part = []
        writer.write_table(pa.Table.from_pylist(part, schema=schema))


def _tables(work: Work, min_query_items: int, dropped: dict[str, int], more_notes: dict[str, Any]) -> Tables:
    work.con.execute(
        f"CREATE OR REPLACE TABLE purchases AS SELECT * FROM {parquet_scan(work.folder / 'reviews.parquet')}"
    )
    work.con.execute(
        f"CREATE OR REPLACE TABLE meta AS SELECT * FROM {parquet_scan(work.folder / 'meta.parquet')}"
    )
    events = f"""
        SELECT user_id, item_id, time, {REC}::TINYINT AS task, NULL::VARCHAR AS query, true AS clicked,
            NULL::VARCHAR AS problem
        FROM purchases
        UNION ALL
        SELECT p.user_id, p.item_id, p.time, {SRC}::TINYINT, q.query, true,
            CASE WHEN q.whole IS NULL THEN 'search event of an item without a category path'
                 WHEN q.query IS NULL THEN 'search event of an item that shares no query' END
        FROM purchases p LEFT JOIN item_query q ON p.item_id = q.item_id"""
    notes = {
        "queries": "synthesised from category paths (Ai et al. 2017)",
        **_choose_queries(work, min_query_items),
        **more_notes,
    }
    return Tables(events=events, items=ItemSql("meta"), duplicate_items=True, dropped=dropped, notes=notes)


def _choose_queries(work: Work, min_query_items: int) -> dict[str, int]:
    """Table item_query (item_id, whole = the query of the whole path, query = the one used) of bought items.
    → counts for the manifest."""
    work.con.execute(
        """CREATE OR REPLACE TABLE item_query AS
        SELECT item_id, min(queries) AS queries, len(min(queries)) AS depth
        FROM meta WHERE item_id IN (SELECT item_id FROM purchases) AND len(queries) > 0 GROUP BY item_id"""
    )
    deepest: int | None = work.scalar("SELECT max(depth) FROM item_query")
    rare = (
        "queries[depth] IN (SELECT queries[depth] FROM item_query WHERE depth > 0 GROUP BY 1 "
        f"HAVING count(*) < {min_query_items})"
    )
    while deepest:  # the deepest first: a shortened query may meet another that is just as rare
        work.con.execute(f"UPDATE item_query SET depth = depth - 1 WHERE depth = {deepest} AND {rare}")
        deepest = work.scalar(f"SELECT max(depth) FROM item_query WHERE depth > 0 AND {rare}")
    work.con.execute(
        "CREATE OR REPLACE TABLE item_query AS SELECT item_id, queries[-1] AS whole, queries[nullif(depth, "
        "0)] AS query FROM item_query"
    )
    names = ("paths", "paths_of_one_item", "items_with_shorter_query", "items_without_query")
    counts = work.con.execute(
        """SELECT count(*), count(*) FILTER (n = 1),
            coalesce(sum(shorter), 0)::BIGINT, coalesce(sum(without), 0)::BIGINT
        FROM (SELECT count(*) AS n, count(*) FILTER (query <> whole) AS shorter,
                count(*) FILTER (query IS NULL) AS without
              FROM item_query GROUP BY whole)"""
    ).fetchall()[0]
    return dict(zip(names, counts, strict=True))
