"""`tables`: the same log in every writing gives the same folder; what lost its meaning is refused by file,
column and row."""

import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from data_shards.errors import DataError
from data_shards.inspect import describe, inspect
from data_shards.prepare import prepare
from tests.worlds import write_tables

FAST = ("vocab_size=300", "num_negatives=20")
ZONE = datetime.timezone(datetime.timedelta(hours=8))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw tables as JSON, read-only."""
    return write_tables(tmp_path_factory.mktemp("world") / "raw", users=12, items=60, days=4)


@pytest.fixture(scope="module")
def expected(world: Path) -> str:
    return prepare("tables", world, world.parent / "out", FAST).fingerprint


def rows_of(world: Path, name: str = "events") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]


def write_json(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_events(world: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    """The world with other events."""
    raw = tmp_path / "raw"
    raw.mkdir(parents=True)
    write_json(raw / "events.jsonl", rows)
    (raw / "items.jsonl").write_bytes((world / "items.jsonl").read_bytes())
    return raw


def as_parquet(world: Path, tmp_path: Path, column: str, change: Callable[[list[Any]], pa.Array]) -> Path:
    """The world with events.parquet, one column of which is made by `change` from its values."""
    raw = tmp_path / "raw"
    raw.mkdir()
    table = pa.Table.from_pylist(rows_of(world))
    position = table.schema.get_field_index(column)
    table = table.set_column(position, column, change(table[column].to_pylist()))
    pq.write_table(table, raw / "events.parquet")
    (raw / "items.jsonl").write_bytes((world / "items.jsonl").read_bytes())
    return raw


def moment(ms: int, zone: datetime.timezone = ZONE) -> str:
    return datetime.datetime.fromtimestamp(ms / 1000, zone).isoformat()


TIMES: dict[str, Callable[[int], Any]] = {
    "offset": moment,
    "offset without a colon": lambda ms: moment(ms)[:-3] + "00",
    "no offset is UTC": lambda ms: moment(ms, datetime.timezone.utc).removesuffix("+00:00"),
    "Z": lambda ms: moment(ms, datetime.timezone.utc).replace("+00:00", "Z"),
    "text of ms": str,
    "float": float,
}


@pytest.mark.parametrize("writing", TIMES)
def test_a_time_is_the_same_instant_in_every_writing(
    world: Path, expected: str, tmp_path: Path, writing: str
) -> None:
    rows = [{**row, "time": TIMES[writing](row["time"])} for row in rows_of(world)]
    raw = with_events(world, tmp_path, rows)
    assert prepare("tables", raw, tmp_path / "out", FAST).fingerprint == expected


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_query_may_be_a_list_of_words(world: Path, expected: str, tmp_path: Path, suffix: str) -> None:
    rows = [{**row, "query": row["query"] and row["query"].split()} for row in rows_of(world)]
    raw = with_events(world, tmp_path, rows)
    if suffix != "jsonl":
        (raw / "events.jsonl").unlink()
    if suffix == "csv":
        rows = [{**row, "query": row["query"] and json.dumps(row["query"])} for row in rows]
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), raw / "events.csv")
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), raw / "events.parquet")
    assert prepare("tables", raw, tmp_path / "out", FAST).fingerprint == expected
    queries = pq.read_table(tmp_path / "out" / "catalog" / "queries.parquet")["text"].to_pylist()
    assert set(queries) == {row["query"] for row in rows_of(world) if row["query"]}


@pytest.mark.parametrize("zone", ["UTC", "Asia/Shanghai"])
@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_zoned_parquet_times_are_instants(
    world: Path, expected: str, tmp_path: Path, unit: str, zone: str
) -> None:
    kind = pa.timestamp(unit, tz=zone)
    raw = as_parquet(
        world, tmp_path, "time", lambda ms: pa.array(ms, pa.timestamp("ms", tz="UTC")).cast(kind)
    )
    assert prepare("tables", raw, tmp_path / "out", FAST).fingerprint == expected


@pytest.mark.parametrize("zone", ["UTC", "Asia/Shanghai", "America/New_York"])
def test_the_time_zone_of_the_machine_does_not_matter(
    world: Path, expected: str, tmp_path: Path, zone: str
) -> None:
    """In a process of its own: duckdb takes TZ when it is loaded."""
    raw = as_parquet(
        world, tmp_path, "time", lambda ms: pa.array(ms, pa.timestamp("ms", tz="UTC"))
    )  # as pandas and Spark write times
    script = (
        "import sys; from data_shards.prepare import prepare; "
        "print(prepare('tables', *sys.argv[1:3], sys.argv[3:]).fingerprint)"
    )
    for folder in (raw, with_events(world, tmp_path / "naive", naive_rows(world))):
        command = [sys.executable, "-c", script, str(folder), str(folder.parent / "out"), *FAST]
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "TZ": zone}
        )
        assert ended.stdout.strip() == expected, ended.stderr


def naive_rows(world: Path) -> list[dict[str, Any]]:
    return [{**row, "time": TIMES["no offset is UTC"](row["time"])} for row in rows_of(world)]


def test_keys_that_first_appear_late_count(world: Path, tmp_path: Path) -> None:
    rows = rows_of(world)
    plain = [{key: row[key] for key in ("user_id", "item_id", "time")} for row in rows if row["clicked"]]
    later = [{**row, "time": row["time"] + 9} for row in rows if row["task"] == "src"]
    assert {row["clicked"] for row in later} == {0, 1}
    raw = with_events(world, tmp_path, [*plain * 150, *later])
    assert len(plain) * 150 > 20_480  # the rows that duckdb looks at when it guesses
    counts = prepare("tables", raw, tmp_path / "out", FAST).raw["counts"]
    assert counts["raw"]["src"] == len(later)
    assert sum(counts[split]["src"] for split in ("train", "valid", "test")) == sum(
        row["clicked"] for row in later
    )


def test_a_key_with_null_is_not_a_missing_key(world: Path, tmp_path: Path) -> None:
    rows = [{**row, "clicked": None if number == 6 else 1} for number, row in enumerate(rows_of(world))]
    with pytest.raises(DataError, match=r"events\.jsonl:clicked:row 7: must be 0 or 1, got None"):
        prepare("tables", with_events(world, tmp_path, rows), tmp_path / "out", FAST)


def test_further_keys_of_any_number_do_not_matter(world: Path, expected: str, tmp_path: Path) -> None:
    raw = with_events(world, tmp_path, rows_of(world))
    items = [{f"attribute_{n % 40}": "x", **row} for n, row in enumerate(rows_of(world, "items"))]
    write_json(raw / "items.jsonl", items)
    assert prepare("tables", raw, tmp_path / "out", FAST).fingerprint == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{}, {}]", r"events\.jsonl: a JSON array; write one object a line"),
        (b'\n  [{"user_id": 1}]', r"a JSON array"),
        (b"\n \n", r"events\.jsonl: empty file"),
        (b'{"user_id": 1, "item_id": 2, "time": 3}\n5\n', r"row 2: must be a JSON object, got '5'"),
        (b'{"user_id": 1, "item_id": 2, "time": 3}\n{"user_id": "\\ud83d"}', r"row 2: user_id: .*surrogate"),
        (b'{"user_id": 1, "item_id": 2, "time": 3}\n{"user_id": "\xff"}', r"row 2: not UTF-8 text"),
        (b'{"user_id": 1, "item_id": 2, "time": 3}\n{"user_id": 1,', r"row 2: not a JSON object on one line"),
        (b'{"user_id": 1, "item_id": 2}\n', r"column time is missing\. Found: user_id, item_id"),
    ],
)
def test_json_that_is_not_one_object_a_line(
    world: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    raw = with_events(world, tmp_path, [])
    (raw / "events.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare("tables", raw, tmp_path / "out", FAST)


def test_a_byte_order_mark_is_named_where_duckdb_does_not_read_it(
    world: Path, expected: str, tmp_path: Path
) -> None:
    """2.0.1 does."""
    raw = with_events(world, tmp_path, rows_of(world))
    (raw / "events.jsonl").write_bytes(b"\xef\xbb\xbf" + (raw / "events.jsonl").read_bytes())
    try:
        outcome = prepare("tables", raw, tmp_path / "out", FAST).fingerprint
    except DataError as error:
        outcome = str(error)
    assert outcome == expected or "events.jsonl:row 1: begins with a byte-order mark" in outcome


def test_bytes_of_an_old_parquet_writer_are_text(world: Path, tmp_path: Path) -> None:
    raw = as_parquet(
        world,
        tmp_path,
        "query",
        lambda values: pa.array([text and f"红色 {text}".encode() for text in values]),
    )
    items = pa.Table.from_pylist(rows_of(world, "items"))
    texts = pa.array([f"红色 灯 {text}".encode() for text in items["text"].to_pylist()], pa.binary())
    pq.write_table(
        items.set_column(items.schema.get_field_index("text"), "text", texts), raw / "items.parquet"
    )
    (raw / "items.jsonl").unlink()
    prepare("tables", raw, tmp_path / "out", FAST)
    catalog = tmp_path / "out" / "catalog"
    for name, start in (("items", "红色 灯 "), ("queries", "红色 ")):
        assert all(
            text.startswith(start) for text in pq.read_table(catalog / f"{name}.parquet")["text"].to_pylist()
        )


@pytest.mark.parametrize("kind", [pa.binary(), pa.binary(2), pa.string()])
def test_bytes_that_are_no_text_are_named(world: Path, tmp_path: Path, kind: pa.DataType) -> None:
    def spoil(values: list[Any]) -> pa.Array:
        found = pa.array(
            [b"\xe7\xba" if number == 4 else b"u1" for number in range(len(values))], pa.binary()
        )
        if kind == pa.string():  # a writer that lies
            return pa.Array.from_buffers(kind, len(values), found.buffers())
        return found.cast(kind)

    raw = as_parquet(world, tmp_path, "user_id", spoil)
    with pytest.raises(DataError, match=r"events\.parquet:user_id:row 5: is not UTF-8 text"):
        prepare("tables", raw, tmp_path / "out", FAST)


def numbered(values: list[str]) -> list[int]:
    return [int(value[1:]) for value in values]


def test_hash_ids_above_63_bits_are_text(world: Path, tmp_path: Path) -> None:
    def large(values: list[str]) -> pa.Array:
        return pa.array([2**64 - 1 - number for number in numbered(values)], pa.uint64())

    raw = as_parquet(world, tmp_path, "user_id", large)
    prepare("tables", raw, tmp_path / "out", FAST)
    found = pq.read_table(tmp_path / "out" / "catalog" / "users.parquet")["user_id"]
    assert sorted(found.to_pylist()) == sorted(str(2**64 - 1 - number) for number in range(12))


def test_unsigned_ids_that_fit_are_integers(world: Path, tmp_path: Path) -> None:
    raw = as_parquet(world, tmp_path, "user_id", lambda values: pa.array(numbered(values), pa.uint64()))
    prepare("tables", raw, tmp_path / "out", FAST)
    found = pq.read_table(tmp_path / "out" / "catalog" / "users.parquet")["user_id"]
    assert sorted(found.to_pylist()) == list(range(12))


@pytest.mark.parametrize(
    ("kind", "offset", "message"),
    [
        (pa.float64(), 2.0**53 + 2, r"row 1: user_id is a floating-point column with values beyond 2\^53"),
        (pa.float32(), 2.0**24 + 2, r"row 1: user_id is a floating-point column with values beyond 2\^24"),
        (pa.float64(), 0.5, r"row 1: must be an integer or text, got '\d+\.5'"),
        (pa.float64(), float("inf"), r"row 1: user_id is a floating-point column with values beyond"),
        (pa.float64(), 2.0**53 - 20, None),
        (pa.float64(), 0.0, None),
    ],
)
def test_ids_in_floating_point_columns(
    world: Path, tmp_path: Path, kind: pa.DataType, offset: float, message: str | None
) -> None:
    raw = as_parquet(
        world, tmp_path, "user_id", lambda values: pa.array([n + offset for n in numbered(values)], kind)
    )
    if message is None:
        prepare("tables", raw, tmp_path / "out", FAST)
        found = pq.read_table(tmp_path / "out" / "catalog" / "users.parquet")["user_id"].to_pylist()
        assert sorted(found) == [int(offset) + n for n in range(12)]
        return
    with pytest.raises(DataError, match=r"events\.parquet:user_id:" + message):
        prepare("tables", raw, tmp_path / "out", FAST)


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32()])
def test_an_id_that_is_not_a_number_is_no_id(world: Path, tmp_path: Path, kind: pa.DataType) -> None:
    """A join or pandas makes floats of integers, and NaN of what is absent."""
    raw = as_parquet(
        world, tmp_path, "user_id", lambda ids: pa.array([n or float("nan") for n in numbered(ids)], kind)
    )
    dropped = prepare("tables", raw, tmp_path / "out", FAST).raw["dropped"]
    assert dropped["no user_id"] > 0
    found = pq.read_table(tmp_path / "out" / "catalog" / "users.parquet")["user_id"].to_pylist()
    assert sorted(found) == list(range(1, 12))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["12", "7.000000E+18"], r"row 3: '7.000000E\+18' is a rounded number: ids have lost digits"),
        (["12", "3.5"], r"row 3: must be an integer or text, got '3.5'"),
        (["a", "7e18"], None),
        (["1a3e5", "12e5"], None),
        (["007", "12"], None),
    ],
)
def test_ids_in_a_csv(world: Path, tmp_path: Path, ids: list[str], message: str | None) -> None:
    raw = with_events(world, tmp_path, [])
    (raw / "events.jsonl").unlink()
    rows = [row for row in rows_of(world) if row["clicked"]]
    lines = [f"{ids[n % 2]},{row['item_id']},{row['time']}" for n, row in enumerate(rows)]
    (raw / "events.csv").write_text("\n".join(["user_id,item_id,time", *lines]) + "\n")
    settings = ["vocab_size=300", "num_negatives=1"]
    if message is None:
        prepare("tables", raw, tmp_path / "out", settings)
        found = pq.read_table(tmp_path / "out" / "catalog" / "users.parquet")["user_id"].to_pylist()
        assert sorted(found) == sorted(ids)
        return
    with pytest.raises(DataError, match=r"events\.csv:user_id:" + message):
        prepare("tables", raw, tmp_path / "out", settings)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_white_space_at_the_edges_of_a_value_is_no_part_of_it(
    world: Path, expected: str, tmp_path: Path, suffix: str
) -> None:
    spaces = [character for character in map(chr, range(0x3001)) if character.isspace()]

    def spaced(number: int, value: Any) -> Any:
        space = spaces[number % len(spaces)]
        return value if value is None else f"{space}{value}{space} "

    rows = [{name: spaced(n, value) for name, value in row.items()} for n, row in enumerate(rows_of(world))]
    assert len(rows) > len(spaces) > 20
    raw = with_events(world, tmp_path, rows)
    if suffix == "parquet":
        (raw / "events.jsonl").unlink()
        pq.write_table(pa.Table.from_pylist(rows), raw / "events.parquet")
    assert prepare("tables", raw, tmp_path / "out", FAST).fingerprint == expected


@pytest.mark.parametrize(
    ("column", "value"), [("clicked", 0.5), ("time", "1.68E+12"), ("time", "0x18BCFE56800"), ("time", "1_7")]
)
def test_half_a_click_and_a_rounded_time_are_refused(
    world: Path, tmp_path: Path, column: str, value: Any
) -> None:
    rows = rows_of(world)
    raw = with_events(world, tmp_path, [rows[0], {**rows[0], column: value}, *rows])
    with pytest.raises(
        DataError, match=rf"events\.jsonl:{column}:row 2: must be .*, got '{re.escape(str(value))}'"
    ):
        prepare("tables", raw, tmp_path / "out", FAST)


def test_a_nested_id_column_is_named(world: Path, tmp_path: Path) -> None:
    raw = as_parquet(world, tmp_path, "user_id", lambda values: pa.array([[value] for value in values]))
    with pytest.raises(DataError, match=r"events\.parquet:user_id: must be a column of text or numbers"):
        prepare("tables", raw, tmp_path / "out", FAST)


@pytest.mark.parametrize("task", ["rec", "src"])
def test_logs_of_one_task_alone(world: Path, tmp_path: Path, task: str) -> None:
    rows = [{**row, "task": task, "query": "a red lamp" if task == "src" else None} for row in rows_of(world)]
    prepare("tables", with_events(world, tmp_path, rows), tmp_path / "out", FAST)
    facts = inspect(tmp_path / "out")
    assert facts["counts"]["queries"] == (task == "src") and describe(facts)
    assert facts["example"]["query"] == ("a red lamp" if task == "src" else None)
