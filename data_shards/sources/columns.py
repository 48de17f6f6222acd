"""One file of `tables` as SQL: what its columns hold, and ids as text.

The shape of such a file is known, so nothing is guessed from a sample: every column that may be there is
declared, and a key of JSON that comes late or in few rows counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_shards.documents import first_keys
from data_shards.errors import DataError
from data_shards.sources.reading import csv_header, csv_scan, describe, require_columns, trimmed
from data_shards.sql import file_literal, literal, parquet_scan
from data_shards.work import Work

SMALL_INTEGERS = (
    "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER",
)  # fmt: skip
LARGE_INTEGERS = ("UBIGINT", "HUGEINT", "UHUGEINT")  # may hold what BIGINT cannot
INTEGERS = SMALL_INTEGERS + LARGE_INTEGERS
EXACT_UP_TO = {"FLOAT": 2**24, "DOUBLE": 2**53}  # whole numbers beyond it lose digits
NUMBER = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
LISTS = ("words", "category", "query")  # columns that may be lists


@dataclass(frozen=True)
class File:
    """One input file as SQL: `scan` for FROM, and its columns' types. `gaps`: columns whose key some JSON
    rows lack."""

    path: Path
    scan: str
    types: dict[str, str]
    gaps: frozenset[str] = frozenset()


def open_file(work: Work, path: Path, required: Sequence[str], optional: Sequence[str]) -> File:
    """Raises DataError when a required column is missing or a column cannot hold what it is for."""
    if path.suffix == ".csv":
        header = csv_header(path)
        require_columns(path, header, required)
        _refuse_respelt(path, header, optional)
        return File(path, csv_scan(path, {}, null_strings=[""]), dict.fromkeys(header, "VARCHAR"))
    if path.suffix == ".jsonl":
        return _open_json(work, path, required, optional)
    scan = parquet_scan(path)
    types = describe(work.con, scan)
    require_columns(path, list(types), required)
    _refuse_respelt(path, list(types), optional)
    for name in (*required, *optional):
        kind = types.get(name, "")
        nested = kind.startswith(("STRUCT", "MAP", "UNION")) or kind.endswith("][]")
        if nested or (kind.endswith("]") and name not in LISTS):
            what = "text, numbers or lists of them" if name in LISTS else "text or numbers"
            raise DataError(f"{path}:{name}: must be a column of {what}, it is {kind}")
    return File(path, scan, types)


def _open_json(work: Work, path: Path, required: Sequence[str], optional: Sequence[str]) -> File:
    with open(path, "rb") as file:
        start = file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        raise DataError(f"{path}: empty file; expected one JSON object a line")
    if start.startswith(b"["):
        raise DataError(f"{path}: a JSON array; write one object a line")
    names = [*required, *optional]
    columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in names)
    scan = (
        f"read_json({file_literal(path)}, format='newline_delimited', records=true, hive_partitioning=false, "
        f"columns={{{columns}}})"
    )
    counted = ", ".join(f"count({name}), count(*) FILTER ({_begins_nested(name)})" for name in names)
    total, *counts = work.con.execute(f"SELECT count(*), {counted} FROM {scan}").fetchall()[0]
    held = dict(zip(names, counts[::2], strict=True))
    suspect = dict(zip(names, counts[1::2], strict=True))
    if missing := [name for name in required if not held[name]]:
        keys = first_keys(path)
        require_columns(path, [*keys, *(name for name in names if held[name] and name not in keys)], missing)
    present = [name for name in names if held[name] or name in required]
    _refuse_respelt(path, [*present, *first_keys(path)], optional)
    for name in filter(suspect.get, present):
        _refuse_nested(work, path, name)
    gaps = [name for name in optional if 0 < held[name] < total and not _explicit_nulls(work, path, name)]
    return File(path, scan, dict.fromkeys(present, "VARCHAR"), frozenset(gaps))


def _refuse_respelt(path: Path, found: Sequence[str], optional: Sequence[str]) -> None:
    """Raises DataError for an optional column in another spelling: rows without it mean something else."""
    for name in found:
        meant = name.strip().lower()
        if meant in optional and meant not in found:
            raise DataError(f"{path}: column {name!r} is not read. Name it {meant}, or remove it.")


def _begins_nested(name: str) -> str:
    """SQL: whether a text begins as an object, or as a list where none may be. Few texts do."""
    brackets = ("{",) if name in LISTS else ("{", "[")
    return f"{name}[1] IN ({', '.join(map(literal, brackets))})"


def _refuse_nested(work: Work, path: Path, name: str) -> None:
    """Raises DataError for the first object, or list, in a column of text or numbers: read as text it would
    be its own JSON."""
    kinds = ("OBJECT",) if name in LISTS else ("OBJECT", "ARRAY")
    objects, kind = _json_kind(path, name)
    if found := work.first_row(objects, f"{kind} IN ({', '.join(map(literal, kinds))})", kind):
        what = "a list" if found[1] == "ARRAY" else "an object"
        raise DataError(f"{path}:{name}:row {found[0]}: must be text or a number, got {what}")


def _explicit_nulls(work: Work, path: Path, name: str) -> int:
    """Rows that hold the key with the value null, which is not the same as no key."""
    objects, kind = _json_kind(path, name)
    return int(work.scalar(f"SELECT count(*) FROM {objects} WHERE {kind} = 'NULL'"))


def _json_kind(path: Path, name: str) -> tuple[str, str]:
    """SQL that scans a file's objects, and of what kind JSON calls a key's value in each."""
    objects = f"read_ndjson_objects({file_literal(path)}, hive_partitioning=false)"
    return objects, f"json_type(json, {literal('$.' + name)})"


def plain_id(file: File, column: str) -> str:
    """SQL of an id as text: NaN is NULL; 12.0 (what a column with gaps becomes in many programs) is 12."""
    kind, value = file.types[column], f"file.{column}"
    if kind in INTEGERS:
        return f"CAST({value} AS VARCHAR)"
    if kind in EXACT_UP_TO:
        return f"CAST(TRY_CAST({value} AS BIGINT) AS VARCHAR)"  # duckdb may cast before it asks a CASE
    text = trimmed(f"CAST({value} AS VARCHAR)")
    if kind == "VARCHAR" and file.path.suffix == ".parquet":
        return f"nullif({text}, '')"
    whole = f"regexp_replace({text}, '^(-?[0-9]+)\\.0+$', '\\1')"
    return f"CASE WHEN {text} IN ('', 'nan', 'NaN') THEN NULL ELSE {whole} END"


def id_type(work: Work, columns: Sequence[tuple[File, str]]) -> str:
    """BIGINT when every id of the given columns is an integer (written the usual way), else VARCHAR.

    Raises DataError for ids that lost digits or have a fraction.
    """
    found = [_holds_integers(work, *column) for column in columns]  # all of them: each may be refused
    return "BIGINT" if all(found) else "VARCHAR"


def _holds_integers(work: Work, file: File, column: str) -> bool:
    kind = file.types[column]
    if kind in SMALL_INTEGERS:
        return True
    if kind in LARGE_INTEGERS:
        outside = f"{column} NOT BETWEEN -9223372036854775808 AND 9223372036854775807"
        return not work.scalar(f"SELECT count(*) FROM {file.scan} file WHERE {outside}")
    if kind in EXACT_UP_TO:
        return _holds_whole_floats(work, file, column)
    text = plain_id(file, column)
    if exists(work, file, f"NOT regexp_full_match({text}, {literal(NUMBER)})"):
        return False
    if not exists(
        work,
        file,
        f"CAST(TRY_CAST({text} AS BIGINT) AS VARCHAR) IS DISTINCT FROM {text} AND {text} IS NOT NULL",
    ):
        return kind != "VARCHAR" or file.path.suffix != ".parquet"
    if found := first_row(work, file, f"regexp_matches({text}, '[eE]')", text):
        raise DataError(
            f"{file.path}:{column}:row {found[0]}: {found[1]!r} is a rounded number: ids have lost digits. "
            "Write them as integers or text."
        )
    if found := first_row(work, file, f"contains({text}, '.')", text):
        raise _no_id(file, column, *found)
    return False  # beyond 64 bits, or with leading zeros: text


def _holds_whole_floats(work: Work, file: File, column: str) -> bool:
    value, limit = f"file.{column}", EXACT_UP_TO[file.types[column]]
    number, shown = f"NOT isnan({value})", f"CAST({value} AS VARCHAR)"
    if found := first_row(work, file, f"{number} AND abs({value}) > {limit}", shown):
        raise DataError(
            f"{file.path}:{column}:row {found[0]}: {column} is a floating-point column with values beyond "
            f"2^{limit.bit_length() - 1} ({found[1]}): ids have lost digits. Write them as integers or text."
        )
    if found := first_row(work, file, f"{number} AND {value} <> trunc({value})", shown):
        raise _no_id(file, column, *found)
    return True


def _no_id(file: File, column: str, row: int, shown: str) -> DataError:
    return DataError(
        f"{file.path}:{column}:row {row}: must be an integer or text, got {shown!r}, a number with a "
        "fraction. Correct or remove that row."
    )


def exists(work: Work, file: File, condition: str) -> bool:
    """Whether any row meets an SQL condition on `file`."""
    return bool(work.con.execute(f"SELECT 1 FROM {file.scan} file WHERE {condition} LIMIT 1").fetchall())


def first_row(work: Work, file: File, condition: str, shown: str) -> tuple[int, str] | None:
    """Row number and an SQL expression's value of the first row that meets a condition on `file`; None when
    no row does."""
    found = work.first_row(f"{file.scan} file", condition, shown) if exists(work, file, condition) else None
    return (row_number(file.path, found[0]), found[1]) if found else None


def row_number(path: Path, row: int) -> int:
    """A CSV's header is row 1."""
    return row + (path.suffix == ".csv")
