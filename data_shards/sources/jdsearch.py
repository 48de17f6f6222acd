"""`jdsearch`: JDsearch (Liu et al., SIGIR 2023), a real interleaved log of searches and query-less clicks
with anonymised words.

RAW holds user_behavior_data*.txt and product_meta_data*.txt (tab-separated, one user a line; lists joined by
"_", words by the character 0x18). Every recorded behaviour (click, cart, follow, order) is a click. Times are
given as intervals between behaviours of one user, so there is no common clock: `time` is their sum, and the
split is leave-one-out. The last query of a user and its clicked candidates are the newest events; candidates
that were not clicked are impressions. A user whose last query has no click keeps the last behaviour of the
history as the test event.
A category's names are its ids (cate_id_*) where the file has them: two ids may share a name.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.categories import PATH_MARK
from data_shards.errors import DataError
from data_shards.options import PrepareSettings
from data_shards.schema import REC, SRC
from data_shards.sources import ItemSql, Source, Tables
from data_shards.sources.reading import integer, refuse_long_last_line, refuse_repeated, require_columns
from data_shards.sql import file_literal, literal, parquet_scan
from data_shards.work import Work

LICENSE = "CC BY-NC-SA 4.0"
PUBLISHED = {"JDsearch": {"users": 173_831, "items": 12_872_636}}
USER_COLUMNS = (
    "query",
    "candidate_wid_list",
    "candidate_label_list",
    "history_qry_list",
    "history_wid_list",
    "history_type_list",
    "history_time_list",
)
LEVELS = [f"cate_name_{level}" for level in (1, 2, 3, 4)]
LEVEL_IDS = [f"cate_id_{level}" for level in (1, 2, 3, 4)]
WORD_MARK = "\x18"
SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("time", pa.int64()),
        ("query", pa.string()),
        ("clicked", pa.bool_()),
    ]
)
USERS_AT_ONCE = 2_000


def open_source(raw: Path, settings: PrepareSettings) -> Source:
    behaviour, products = _find(raw, "user_behavior_data"), _find(raw, "product_meta_data")
    return Source(
        name="jdsearch",
        files=(behaviour, products),
        read=lambda work: _read(work, behaviour, products),
        license=LICENSE,
        published=PUBLISHED,
        has_clock=False,
    )


def _find(raw: Path, stem: str) -> Path:
    found = sorted(raw.glob(f"{stem}*.txt"))
    if len(found) != 1:
        raise DataError(
            f"{raw}: expected one {stem}*.txt, found {', '.join(path.name for path in found) or 'none'}."
        )
    return found[0]


def _read(work: Work, behaviour: Path, products: Path) -> Tables:
    dropped: Counter[str] = Counter()
    with pq.ParquetWriter(work.folder / "behaviour.parquet", SCHEMA) as writer:
        for part in _behaviour(behaviour, work, dropped):
            writer.write_table(pa.table(part, schema=SCHEMA))
    events = f"""
        SELECT user_id, item_id, time, (CASE WHEN query IS NULL THEN {REC} ELSE {SRC} END)::TINYINT AS task,
            query, clicked, NULL::VARCHAR AS problem
        FROM {parquet_scan(work.folder / "behaviour.parquet")}"""
    header = next(_lines(products), "").split("\t")
    require_columns(products, header, ["wid", "name", *LEVELS])
    refuse_repeated(products, header)
    refuse_long_last_line(products)
    columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in header)
    scan = (
        f"read_csv({file_literal(products)}, header=true, auto_detect=false, hive_partitioning=false, "
        f"delim='\t', quote='', escape='', columns={{{columns}}})"
    )
    words = f"translate(concat_ws('{WORD_MARK}', {', '.join(LEVELS)}, name), '{WORD_MARK}', ' ')"
    path = LEVEL_IDS if set(LEVEL_IDS) <= set(header) else LEVELS
    items = ItemSql(
        scan=f"(SELECT *, {integer(products, 'wid')} AS item_id FROM {scan})",
        text="''",
        words=words,
        category=f"concat_ws(' > ', {', '.join(LEVELS)})",
        path=f"concat_ws({literal(PATH_MARK)}, {', '.join(path)})",
        words_origin=f"{products}:name",
    )
    notes = {"users": "one for each line of the behaviour file: user_id is its number, from 1"}
    return Tables(
        events=events, items=items, anonymised=True, duplicate_items=True, dropped=dict(dropped), notes=notes,
        locate=lambda problem, value: _locate_query(behaviour, value),
    )  # fmt: skip


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without their ends. Raises DataError naming the row that is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:row {number}: not UTF-8 text ({error}). Correct that row."
                ) from error


def _locate_query(path: Path, value: str) -> DataError:
    """The first row that holds a query which is no list of integers."""
    raw = value.replace(" ", WORD_MARK)
    row = next((number for number, line in enumerate(_lines(path), start=1) if raw in line), "?")
    return DataError(f"{path}:row {row}: a query must be integers, got {value!r}. Correct that row.")


def _behaviour(path: Path, work: Work, dropped: Counter[str]) -> Iterator[dict[str, list[Any]]]:
    """Rows of all users, some thousand users at once."""
    lines = _lines(path)
    require_columns(path, next(lines, "").split("\t"), USER_COLUMNS)
    part: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for user, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) != len(USER_COLUMNS):
            raise DataError(
                f"{path}:row {user + 1}: {len(fields)} columns where the header has {len(USER_COLUMNS)}"
            )
        try:
            _add_user(part, user, dict(zip(USER_COLUMNS, fields, strict=True)), dropped)
        except (ValueError, OverflowError) as error:
            raise DataError(f"{path}:row {user + 1}: {error}") from error
        if user % USERS_AT_ONCE == 0:
            work.progress("read", user, 0)
            yield part
            part = {name: [] for name in SCHEMA.names}
    yield part


def _add_user(part: dict[str, list[Any]], user: int, fields: dict[str, str], dropped: Counter[str]) -> None:
    """Append one user's behaviours. Raises ValueError when its lists do not fit together."""
    items, queries, intervals = (
        _list(fields[name]) for name in ("history_wid_list", "history_qry_list", "history_time_list")
    )
    candidates, labels = _list(fields["candidate_wid_list"]), _list(fields["candidate_label_list"])
    if len(items) != len(queries) or len(intervals) != len(items) + 1 or len(candidates) != len(labels):
        raise ValueError(
            f"lists of different lengths: {len(items)} items, {len(queries)} queries, {len(intervals)} "
            "intervals (one more), "
            f"{len(candidates)} candidates, {len(labels)} labels"
        )
    waited = np.array(intervals, dtype=np.float64)
    moments = np.cumsum(waited)
    if not np.all(np.abs(moments) < 2**53):
        raise ValueError(f"intervals must be numbers, got {fields['history_time_list']!r:.60}")
    if waited.min() < 0:
        raise ValueError(f"an interval must not be negative, got {intervals[waited.argmin()]!r}")
    times = moments.astype(np.int64).tolist()
    if fractions := [label for label in labels if not float(label).is_integer()]:
        raise ValueError(f"a label must be an integer, got {fractions[0]!r}")
    clicked = [float(label) > 0 for label in labels]
    if not any(clicked):
        dropped["last query without a click"] += 1
    numbers = [int(item) for item in (*items, *candidates)]
    if wrong := [number for number in numbers if abs(number) >= 2**63]:
        raise ValueError(f"an item id must fit 64 bits, got {wrong[0]}")
    part["user_id"] += [user] * (len(items) + len(candidates))
    part["item_id"] += numbers
    part["time"] += times[:-1] + [times[-1]] * len(candidates)
    part["query"] += [None if query == "-1" else _words(query) for query in queries] + [
        _words(fields["query"])
    ] * len(candidates)
    part["clicked"] += [True] * len(items) + clicked


def _list(text: str) -> list[str]:
    return text.split("_") if text else []


def _words(text: str) -> str:
    return text.replace(WORD_MARK, " ")
