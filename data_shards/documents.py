"""Text and JSON from outside, made safe to keep: every entry of text goes through here."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_shards.errors import DataError


def storable(text: str) -> str:
    """The text as UTF-8 can hold it: halves of surrogate pairs are joined, or become U+FFFD where one is
    alone.

    JSON escapes and Python literals may hold halves ("\\ud83d"), and pyarrow, tokenizers and files refuse
    them.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def parse_json(content: str | bytes, where: str, fix: str = "") -> Any:
    """A JSON document. Raises DataError naming `where` for what is none, or is nested too deeply to be
    read."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise DataError(f"{where}: not valid JSON ({reason}).{fix and ' '}{fix}") from error


def first_keys(path: Path) -> list[str]:
    """Keys of the first 1000 objects of a file with one JSON object a line, for messages."""
    keys: dict[str, None] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in itertools.islice(file, 1000):
            try:
                keys.update(dict.fromkeys(storable(key) for key in json.loads(line)))
            except (ValueError, TypeError, RecursionError):
                continue
    return list(keys)


def first_bad_line(path: Path) -> tuple[int, str] | None:
    """Row (from 1) and reason of the first line of a file with one JSON object a line that is none; None when
    all are."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and (reason := _reason(line)):
                return number, reason
    return None


def _reason(line: bytes) -> str:
    if line.startswith(b"\xef\xbb\xbf"):
        return "begins with a byte-order mark; write UTF-8 without one"
    try:
        value = json.loads(line.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error})"
    except ValueError as error:
        return f"not a JSON object on one line ({error})"
    except RecursionError:
        return "nested too deeply"
    if not isinstance(value, dict):
        return f"must be a JSON object, got {line.strip()[:40].decode(errors='replace')!r}"
    half = next((key for key, text in _texts(value) if storable(text) != text), None)
    return f"{half}: not valid text (half of a surrogate pair)" if half is not None else ""


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write null")


def _texts(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        yield key, key
        yield key, value if isinstance(value, str) else ""
