"""Reading files with duckdb so that a bad one is named: file, column, row."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb

from data_shards.errors import DataError

NULL_STRINGS = ["", "nan", "NaN", "null", "NULL", "None"]


def literal(text: str | Path) -> str:
    """A text as an SQL literal."""
    return "'" + str(text).replace("'", "''") + "'"


def find_file(raw: Path, name: str) -> Path:
    """raw/name, or the only */name one folder down (how archives unpack). Raises DataError when it is not there."""
    found = [path for path in (raw / name, *sorted(raw.glob(f"*/{name}"))) if path.is_file()]
    if not found:
        raise DataError(f"{raw / name}: no such file. {raw} must hold the unpacked logs.")
    return found[0]


def is_words(text: str) -> str:
    """SQL: whether a text (from words_text) is integers separated by single spaces."""
    return f"regexp_full_match({text}, '[0-9]{{1,18}}( [0-9]{{1,18}})*')"


def estimated_rows(path: Path) -> int:
    """Rows of a text file, judged by the length of its first lines; 0 for other files. For progress only."""
    if path.suffix not in (".csv", ".jsonl"):
        return 0
    with open(path, "rb") as file:
        start = file.read(1 << 20)
    return path.stat().st_size * start.count(b"\n") // max(len(start), 1)


def words_text(column: str) -> str:
    """SQL: a list of integers in any writing ("[1, 2]", "1 2") as "1 2"; NULL when it holds none."""
    return f"nullif(trim(regexp_replace({column}, '[\\[\\],\\s]+', ' ', 'g')), '')"


def csv_header(path: Path) -> list[str]:
    """Column names of a CSV file; a byte-order mark and CRLF are fine. Raises DataError when the file has no header line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Convert it, for example with iconv.") from error
    if not header:
        raise DataError(f"{path}: empty file; expected a header line and rows")
    return [name.strip() for name in header]


def require_columns(path: Path, found: Sequence[str], required: Sequence[str]) -> None:
    missing = [name for name in required if name not in found]
    if missing:
        raise DataError(f"{path}: column {', '.join(missing)} is missing. Found: {', '.join(found)}. Needed: {', '.join(required)}.")


def csv_scan(path: Path, types: Mapping[str, str], null_strings: Sequence[str] = NULL_STRINGS) -> str:
    """SQL that scans a CSV file with the given column types; other columns are read as text."""
    header = csv_header(path)
    require_columns(path, header, list(types))
    columns = ", ".join(f"{literal(name)}: {literal(types.get(name, 'VARCHAR'))}" for name in header)
    nulls = ", ".join(literal(text) for text in null_strings)
    return (
        f"read_csv({literal(path)}, header=true, auto_detect=false, delim=',', quote='\"', escape='\"', "
        f"max_line_size=16777216, nullstr=[{nulls}], columns={{{columns}}})"
    )


def describe(con: duckdb.DuckDBPyConnection, scan: str) -> dict[str, str]:
    """Column name → duckdb type of a scan."""
    return {row[0]: str(row[1]) for row in con.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()}


def readable(error: duckdb.Error) -> DataError:
    """duckdb's report of an unusable file as one line: file:column:row, what is wrong."""
    text = str(error)
    line = re.search(r"CSV Error on Line: (\d+)", text)
    path = re.search(r"^\s*file = (.+)$", text, re.MULTILINE)
    column = re.search(r'Error when converting column "([^"]+)"\. (.+)', text)
    width = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", text)
    where = f"{path.group(1).strip() if path else 'a raw file'}:{column.group(1) if column else ''}:row {line.group(1) if line else '?'}"
    if column:
        return DataError(f"{where}: {column.group(2).strip()}. Correct or remove that row.")
    if width:
        return DataError(f"{where.replace('::', ':')}: {width.group(2)} columns where the header has {width.group(1)}. Correct or remove that row.")
    if line:
        return DataError(f"{where.replace('::', ':')}: {text.splitlines()[1] if len(text.splitlines()) > 1 else text}")
    return DataError(f"a raw file cannot be read: {text.splitlines()[0]}")
