"""Raw formats → two canonical tables, given as SQL so that nothing is read before it is needed.

events   user_id, item_id (both BIGINT or VARCHAR), time BIGINT (ms since 1970, or a position in the user's
         list), task TINYINT (REC or SRC),
         query VARCHAR (NULL in a recommendation; anonymised words as integers, in any writing of a list),
         clicked BOOLEAN (false = shown and not clicked), problem VARCHAR (NULL = usable; otherwise the reason
         this row is dropped, counted under it in the manifest; one without an id, a time or a search's query
         is dropped anyway)
items    item_id, text VARCHAR (natural text), words VARCHAR (anonymised words, in any writing of a list; NULL
         = none), category VARCHAR (to be read), path VARCHAR (the category's names from the root, joined by
         categories.PATH_MARK; NULL = none)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from data_shards.errors import DataError
from data_shards.options import SOURCE_DEFAULTS, PrepareSettings
from data_shards.work import Work


@dataclass(frozen=True)
class Source:
    name: str
    files: tuple[Path, ...]  # everything read: a restart compares their sizes and times
    read: Callable[[Work], "Tables"]
    license: str = ""
    # counts given by the data's authors, shown beside ours
    published: dict[str, Any] = field(default_factory=dict)
    has_clock: bool = True
    has_stored_split: bool = False  # split=stored is possible: Tables.stored is there


@dataclass(frozen=True)
class ItemSql:
    """The items as SQL: `scan` (for FROM; has a column item_id), and expressions over its columns, worked out
    for kept items only."""

    scan: str
    text: str = "text"
    words: str = "NULL"
    category: str = "category"
    path: str = "path"
    words_origin: str = ""  # FILE:COLUMN that the words come from, for errors
    # SELECT of item_id and these four columns by name, of items that have no row in `scan` (append.py)
    known: str = ""


@dataclass(frozen=True)
class StoredSql:
    """Splits and negatives that the raw files themselves hold, as SQL and files.

    predictions  for FROM; columns user_id, item_id, time, task, query of an event, split TINYINT (position in
                 schema.SPLITS), number (of its row of negatives), rec_count and src_count
    lists        for FROM; the columns of a click, and position, place: where it stands in the user's list of
                 clicks or of searches. An event's history by count is what has a position below its counts
    negatives    folder of negatives_{valid,test}.npy, int64 [rows, negatives]: item_ids
    """

    predictions: str
    lists: str
    negatives: str


@dataclass(frozen=True)
class Tables:
    """What `Source.read` returns: SQL on the work database."""

    events: str  # SELECT
    items: "ItemSql"
    anonymised: bool = False  # queries and captions are lists of integers
    # several rows of one item are possible: the first (by text, those without one last) is used,
    # the others are counted
    duplicate_items: bool = False
    # ("error: COLUMN", a wrong value or "") → the error that names its first row
    locate: Callable[[str, str], DataError] | None = None
    dropped: dict[str, int] = field(default_factory=dict)  # rows dropped before `events`
    notes: dict[str, Any] = field(default_factory=dict)  # facts for the manifest's source section
    stored: StoredSql | None = None


EARLIEST_MS = 31_536_000_000  # 1971: what lies before is a missing date, or a time in seconds
TOO_EARLY = "time before 1971 (in seconds? it must be ms)"
LATEST_MS = 4_102_444_800_000  # 2100
TOO_LATE = "time after 2099 (in microseconds? it must be ms)"
NOT_IN_ITEMS = "item not in items"  # unless the folder that a log goes on from has it
SOURCES = tuple(SOURCE_DEFAULTS)


def open_source(name: str, raw: Path, settings: PrepareSettings, goes_on: str = "") -> Source:
    """Find the raw files. goes_on: the text mode of the folder that the log goes on from, if it does (tables
    need no items' file then). Raises DataError when one is missing."""
    more = {"goes_on": goes_on} if name == "tables" else {}
    source: Source = import_module(f"data_shards.sources.{name}").open_source(raw, settings, **more)
    return source
