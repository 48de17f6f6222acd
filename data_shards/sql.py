"""Paths and values inside duckdb's SQL."""

import re
from pathlib import Path


def literal(text: str | Path) -> str:
    """A text as an SQL literal."""
    return "'" + str(text).replace("'", "''") + "'"


def file_literal(path: Path) -> str:
    """A file to be read as an SQL literal: `[`, `*` and `?` in its name stand for themselves, and not for
    other files. Absolute: SQL is kept for a restart, which may be called from another folder."""
    return literal(re.sub(r"([*?[])", r"[\1]", str(path.absolute())))


def parquet_scan(path: Path) -> str:
    """SQL that scans a parquet file.

    Without binary_as_string, bytes that an older writer means as text come out escaped (backslash, x, E, 7).
    With hive partitioning, a folder named user_id=7 above the file replaces its column user_id.
    """
    return f"read_parquet({file_literal(path)}, hive_partitioning=false, binary_as_string=true)"
