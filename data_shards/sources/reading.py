"""Reading files with duckdb so that a bad one is named: file, column, row."""

import csv
import itertools
import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.documents import first_bad_line
from data_shards.errors import DataError
from data_shards.sql import file_literal, literal

NULL_STRINGS = ["", "nan", "NaN", "null", "NULL", "None"]


def find_files(raw: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """All of raw/name, or of the only */name one folder down (how archives unpack). Raises DataError when one
    is not there, or more than one folder has any."""
    below = {path.parent for name in names for path in raw.glob(f"*/{name}") if path.is_file()}
    folders = [raw] if any((raw / name).is_file() for name in names) else sorted(below)
    if len(folders) > 1:
        raise DataError(f"{raw} holds {' and '.join(folder.name for folder in folders)}. Name one as RAW.")
    found = tuple(folder / name for folder in folders or [raw] for name in names)
    for path in found:
        if not path.is_file():
            raise DataError(f"{path}: no such file. {path.parent} must hold the unpacked logs.")
    return found


NO_INTEGER = "no integer:"  # how the SQL below says it to `readable`


def integer(path: Path, column: str) -> str:
    """SQL of a text column as BIGINT: 12.0 is 12, and 3.5, 1E+18, 0x1F, 1_0 or a word end the query (duckdb
    would round the first two and read the next two in its own way)."""
    wrong = f"error({literal(f'{NO_INTEGER}{column}:{path}')} || {column})::BIGINT"
    read = f"TRY_CAST({column} AS BIGINT)"
    whole = f"TRY_CAST(regexp_extract({column}, '^\\s*([-+]?[0-9]+)(\\.0*)?\\s*$', 1) AS BIGINT)"
    return f"""CASE WHEN CAST({read} AS VARCHAR) = {column} THEN {read}
        WHEN {column} IS NOT NULL THEN coalesce({whole}, {wrong}) END"""


def whole_number(path: Path, column: str) -> str:
    """SQL of a column of small numbers, read as DOUBLE (which costs no more than BIGINT): 0.5 ends the
    query."""
    wrong = f"error({literal(f'{NO_INTEGER}{column}:{path}')} || {column})::DOUBLE"
    return f"CASE WHEN {column} <> trunc({column}) OR abs({column}) > 1e15 THEN {wrong} ELSE {column} END"


def _not_an_integer(text: str, files: Sequence[Path]) -> DataError | None:
    """The first row that made `integer` or `whole_number` fail."""
    column = text.partition(NO_INTEGER)[2].partition(":")[0]
    for path in (file for file in files if f"{NO_INTEGER}{column}:{file}" in text):
        delimiter = "," if path.suffix == ".csv" else "\t"
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(
                file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
            )
            for number, row in enumerate(rows, start=2):
                value = next((value for name, value in row.items() if name and name.strip() == column), None)
                if value is not None and value not in NULL_STRINGS and not _is_integer(value):
                    return DataError(
                        f"{path}:{column}:row {number}: must be an integer, got {value!r}. Correct or remove "
                        "that row."
                    )
    return None


def _is_integer(value: str) -> bool:
    """As `integer` has it."""
    found = re.fullmatch(r"\s*([-+]?)0*([0-9]{1,19})(\.0*)?\s*", value, re.ASCII)
    return found is not None and -(2**63) <= int(found[1] + found[2]) < 2**63


# White space that duckdb's trim() leaves at the edges of a text: it knows the blank and its Unicode kin only.
OTHER_SPACE = r"\t-\r\x1c-\x1f\x{85}\x{2028}\x{2029}"
ANY_SPACE = rf"[ \p{{Z}}{OTHER_SPACE}]+"


def trimmed(text: str) -> str:
    """SQL of a text without white space at its edges."""
    edges = literal(f"^{ANY_SPACE}|{ANY_SPACE}$")
    return f"""CASE WHEN regexp_matches({text}, {literal(f"[{OTHER_SPACE}]")})
        THEN regexp_replace({text}, {edges}, '', 'g') ELSE trim({text}) END"""


def is_words(text: str) -> str:
    """SQL: whether a text (from words_text) is integers separated by single spaces."""
    return f"regexp_full_match({text}, '[0-9]{{1,18}}( [0-9]{{1,18}})*')"


def no_words(column: str) -> str:
    """SQL: whether a text is no list of integers in any writing: the same as is_words of its words_text, but
    one look at the raw text."""
    return f"regexp_matches({column}, '[^0-9\\[\\],\\s]|[0-9]{{19}}')"


def estimated_rows(path: Path) -> int:
    """Rows of a text file, judged by the length of its first lines; 0 for other files. For progress only."""
    if path.suffix not in (".csv", ".jsonl"):
        return 0
    with open(path, "rb") as file:
        start = file.read(1 << 20)
    return path.stat().st_size * start.count(b"\n") // max(len(start), 1)


def words_list(column: str) -> str:
    """SQL: a list of integers in any writing ("[1,2]", "1 2") as "[1, 2]", so that one query has one key;
    anything else as it is."""
    usual = f"regexp_full_match({column}, '\\[[0-9]+(, [0-9]+)*\\]')"
    as_list = f"'[' || replace({words_text(column)}, ' ', ', ') || ']'"
    return f"CASE WHEN {usual} OR {no_words(column)} THEN {column} ELSE {as_list} END"


def words_text(column: str) -> str:
    """SQL: a list of integers in any writing ("[1, 2]", "1 2") as "1 2"; NULL when it holds none."""
    return f"nullif(trim(regexp_replace({column}, '[\\[\\],\\s]+', ' ', 'g')), '')"


def csv_header(path: Path) -> list[str]:
    """Column names of a CSV file; a byte-order mark and CRLF are fine. Raises DataError without a header
    line, or when a name is there twice."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Convert it, for example with iconv.") from error
    if not header:
        raise DataError(f"{path}: empty file; expected a header line and rows")
    # a saved row index has no name
    names = [name.strip() or f"column{number}" for number, name in enumerate(header)]
    refuse_repeated(path, names)
    return names


def refuse_repeated(path: Path, names: Sequence[str]) -> None:
    """Raises DataError for columns of one name: also `time` and `Time`, which are one to duckdb."""
    lowered = [name.lower() for name in names]
    if twice := [name for name in names if lowered.count(name.lower()) > 1]:
        same = [name for name in twice if name.lower() == twice[0].lower()]
        raise DataError(
            f"{path}: column {twice[0]} is there {len(same)} times ({', '.join(same)}). Rename or remove one."
        )


def require_columns(path: Path, found: Sequence[str], required: Sequence[str]) -> None:
    missing = [name for name in required if name not in found]
    if missing:
        are = "columns {} are" if len(missing) > 1 else "column {} is"
        marks = [mark for mark in (";", "\t", "|") if len(found) == 1 and mark in found[0]]
        hint = f" The columns are separated by {marks[0]!r}: write commas." if marks else ""
        raise DataError(
            f"{path}: {are.format(', '.join(missing))} missing. Found: {', '.join(found)}. Needed: "
            f"{', '.join(required)}.{hint}"
        )


# unless told, duckdb holds buffers of 16 times the longest line: 268 MB each
MAX_LINE_BYTES, BUFFER_BYTES = 1 << 24, 1 << 25


def csv_scan(path: Path, types: Mapping[str, str], null_strings: Sequence[str] = NULL_STRINGS) -> str:
    """SQL that scans a CSV file with the given column types; other columns are read as text."""
    header = csv_header(path)
    require_columns(path, header, list(types))
    refuse_long_last_line(path)
    columns = ", ".join(f"{literal(name)}: {literal(types.get(name, 'VARCHAR'))}" for name in header)
    nulls = ", ".join(literal(text) for text in null_strings)
    return (
        f"read_csv({file_literal(path)}, header=true, auto_detect=false, hive_partitioning=false, "
        "delim=',', quote='\"', escape='\"', "
        f"max_line_size={MAX_LINE_BYTES}, buffer_size={BUFFER_BYTES}, nullstr=[{nulls}], "
        f"columns={{{columns}}})"
    )


def refuse_long_last_line(path: Path) -> None:
    """Raises DataError for a last line that is too long: duckdb would leave it out in silence where it
    crosses the end of a buffer."""
    size = path.stat().st_size
    if size <= MAX_LINE_BYTES:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        before = (size - MAX_LINE_BYTES, size - 2)  # the file may end with CR LF
        if text.rfind(b"\n", *before) < 0 and text.rfind(b"\r", *before) < 0:
            raise _long_line(path) or DataError(f"{path}: the last row is too long.")


def _long_line(path: Path) -> DataError | None:
    """The first line that is too long for duckdb."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if len(line) > MAX_LINE_BYTES:
                too_long = f"is longer than {MAX_LINE_BYTES:,} bytes. Correct or remove that row."
                return DataError(f"{path}:row {number}: {too_long}")
    return None


def describe(con: duckdb.DuckDBPyConnection, scan: str) -> dict[str, str]:
    """Column name → duckdb type of a scan."""
    return {row[0]: str(row[1]) for row in con.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()}


def odd_line_end(path: Path) -> str:
    """The first row (from 1) of a text file that ends with CR CR LF, or otherwise than row 1 with LF or CRLF,
    and the fix; "" when all end well and alike."""
    with open(path, "rb") as file:
        first = file.readline()
        for number, line in enumerate(itertools.chain([first], file), start=1):
            if line.endswith(b"\r\r\n"):
                return (
                    f"row {number}: ends with CR CR LF (CRLF, converted once more). Remove each CR, for "
                    "example with tr -d '\\r'."
                )
            if line.endswith(b"\n") and line.endswith(b"\r\n") != first.endswith(b"\r\n"):
                return (
                    f"row {number}: ends with LF or CRLF, and row 1 with the other. Convert the file, for "
                    "example with dos2unix."
                )
    return ""


def first_undecodable(path: Path) -> tuple[str, int] | None:
    """Column and row (from 1) of the first text of a parquet file that is not UTF-8; None when all is."""
    file = pq.ParquetFile(path)
    for field in file.schema_arrow:
        row = 0
        for batch in file.iter_batches(columns=[field.name]):
            for value in _raw_texts(batch.column(0)):
                row += 1
                try:
                    (value or b"").decode()
                except UnicodeDecodeError:
                    return field.name, row
    return None


# how duckdb says that there is no more room; in a transaction or a checkpoint with errors of other kinds
NO_ROOM = (
    duckdb.IOException,
    duckdb.OutOfMemoryException,
    duckdb.TransactionException,
    duckdb.FatalException,
)
NO_ROOM_TEXT = re.compile("No space left|Could not write|File too large|Disk quota exceeded")


def no_room(error: duckdb.Error) -> bool:
    """Whether the disk or the memory is to blame, and not a raw file."""
    return isinstance(error, NO_ROOM) or NO_ROOM_TEXT.search(str(error)) is not None


def unreadable(error: OSError | MemoryError | duckdb.Error, files: Sequence[Path]) -> DataError | None:
    """The error of a raw file that the system does not let us read; None where it is about something else."""
    said = str(error.filename if isinstance(error, OSError) else error)
    path = next((file for file in files if str(file) in said or str(file.absolute()) in said), None)
    reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
    fix = "Correct its permissions or copy it again."
    return DataError(f"{path}: cannot be read: {reason}. {fix}") if path else None


def _raw_texts(column: pa.Array) -> list[bytes | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_fixed_size_binary(kind):
        column = column.cast(pa.large_binary())
    is_bytes = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    return column.to_pylist() if is_bytes else []


def readable(error: duckdb.Error, files: Sequence[Path] = ()) -> DataError:
    """duckdb's report of an unusable file as one line: file:column:row, what is wrong. files: those that it
    may be about."""
    text = str(error)
    for file in files if "invalid state" in text else ():
        if odd := odd_line_end(file):
            return DataError(f"{file}:{odd}")
    # the second where a long line crosses the end of a buffer, and the first without its number
    if "Maximum line size" in text or "Parallel CSV Reader" in text:
        for file in (file for file in files if file.suffix in (".csv", ".txt")):
            if long_line := _long_line(file):
                return long_line
    if NO_INTEGER in text and (found := _not_an_integer(text, files)):
        return found
    if "JSON" in text:
        for file in (file for file in files if file.suffix == ".jsonl"):
            if bad := first_bad_line(file):
                return DataError(f"{file}:row {bad[0]}: {bad[1]}. Correct or remove that row.")
    if "Invalid string encoding" in text:
        for file in (file for file in files if file.suffix == ".parquet"):
            if undecodable := first_undecodable(file):
                return DataError(
                    f"{file}:{undecodable[0]}:row {undecodable[1]}: is not UTF-8 text. Convert the column."
                )
    line = re.search(r"CSV Error on Line: (\d+)", text)
    path = re.search(r"^\s*file = (.+)$", text, re.MULTILINE)
    column = re.search(r'Error when converting column "([^"]+)"\. (.+)', text)
    width = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", text)
    where = (
        f"{path.group(1).strip() if path else 'a raw file'}:{column.group(1) if column else ''}:"
        f"row {line.group(1) if line else '?'}"
    )
    if column:
        return DataError(f"{where}: {column.group(2).strip()}. Correct or remove that row.")
    if width:
        return DataError(
            f"{where.replace('::', ':')}: {width.group(2)} columns where the header has {width.group(1)}. "
            "Correct or remove that row."
        )
    if line:
        reason = re.split(r"\n\nPossible (?:fixes|Solution)", text)[0].splitlines()[-1].strip()
        return DataError(f"{where.replace('::', ':')}: {reason} Correct or remove that row.")
    named = [str(file) for file in files if str(file) in text] or list(map(str, files)) or ["a raw file"]
    return DataError(f"{' or '.join(named)}: cannot be read: {text.splitlines()[0]}")
