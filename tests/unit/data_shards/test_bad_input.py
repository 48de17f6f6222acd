"""Every input that cannot be used gets one message with what, where and the fix, and leaves nothing behind
under OUT."""

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards import encode, write
from data_shards import prepare as prepare_module
from data_shards.errors import ConfigError, DataError
from data_shards.prepare import prepare
from data_shards.simulate import simulate
from data_shards.sources import reading
from data_shards.work import Work
from tests.worlds import write_tables

FAST = ("vocab_size=300", "num_negatives=20")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_tables(tmp_path / "raw", users=12, items=60, days=4)


def change_lines(path: Path, change: Callable[[int, dict[str, Any]], Any]) -> None:
    rows = [change(number, json.loads(line)) for number, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


def refused(
    raw: Path, match: str, *settings: str, kind: type[Exception] = DataError, source: str = "tables"
) -> None:
    out = raw.parent / "out"
    with pytest.raises(kind, match=match):
        prepare(source, raw, out, [*FAST, *settings])
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize(
    ("file", "column", "value", "got"),
    [
        ("items.jsonl", "text", ["red", "lamp"], "a list"),
        ("items.jsonl", "category", {"name": "lamps"}, "an object"),
        ("events.jsonl", "user_id", ["u1"], "a list"),
        ("events.jsonl", "query", {"text": "red"}, "an object"),
    ],
)
def test_nested_json_is_no_text(
    tmp_path: Path, raw: Path, file: str, column: str, value: Any, got: str
) -> None:
    change_lines(raw / file, lambda number, row: {**row, column: value} if number == 7 else row)
    refused(raw, rf"{file}:{column}:row 8: must be text or a number, got {got}")


def test_text_that_looks_like_json_is_text(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_lines(raw / "items.jsonl", lambda _, row: {**row, "text": f"[new] {row['text']}"})
    left, sort = [], encode.sort_clicks

    def look(work: Work, *more: Any) -> Any:
        left.append(work.scalar("SELECT current_setting('threads')"))
        return sort(work, *more)

    monkeypatch.setattr(encode, "sort_clicks", look)
    prepare("tables", raw, tmp_path / "out", [*FAST, "threads=3"])
    assert left == [3], "the look at its rows in order ends with it"


def test_missing_files(tmp_path: Path, raw: Path) -> None:
    (raw / "events.jsonl").unlink()
    refused(raw, r"no events\.parquet, events\.csv or events\.jsonl")
    with pytest.raises(DataError, match="no such file or folder"):
        prepare("tables", tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"no such source\. Sources: kuaisar, amazon, jdsearch, tables"):
        prepare("netflix", raw, tmp_path / "out")
    refused(raw, r"rec_inter\.csv: no such file", source="kuaisar")
    refused(raw, r"expected one reviews file .* Found: no \.json", source="amazon")
    refused(raw, r"expected one user_behavior_data\*\.txt, found none", source="jdsearch")


def test_two_formats_of_one_table_are_ambiguous(raw: Path) -> None:
    (raw / "items.csv").write_text("item_id,text\n")
    refused(raw, r"items\.csv and items\.jsonl are both there")


def test_a_missing_column_is_named_with_those_there(raw: Path) -> None:
    change_lines(raw / "events.jsonl", lambda _, row: {"user": row.pop("user_id"), **row})
    refused(raw, r"column user_id is missing\. Found: user, item_id, time")


def test_items_without_text_or_words(raw: Path) -> None:
    change_lines(raw / "items.jsonl", lambda _, row: {"item_id": row["item_id"], "title": row["text"]})
    refused(raw, r"items\.jsonl: column text \(or words\) is missing")


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("time", "yesterday", "integer ms since 1970 or ISO 8601"),
        ("task", "buy", "rec or src"),
        ("clicked", "maybe", "0 or 1"),
    ],
)
def test_a_wrong_value_is_named_by_file_column_and_row(
    raw: Path, column: str, value: str, expected: str
) -> None:
    change_lines(raw / "events.jsonl", lambda number, row: {**row, column: value} if number >= 7 else row)
    refused(raw, rf"events\.jsonl:{column}:row 8: must be {expected}, got '{value}'")


def test_the_row_of_a_csv_counts_its_header(raw: Path) -> None:
    (raw / "events.jsonl").unlink()
    (raw / "events.csv").write_text("user_id,item_id,time\nu1,i1,1700000000000\nu1,i2,soon\n")
    refused(raw, r"events\.csv:time:row 3: must be .* got 'soon'")


def test_columns_that_differ_in_case_only_are_named(raw: Path) -> None:
    (raw / "events.jsonl").unlink()
    (raw / "events.csv").write_text("user_id,item_id,time,Time\nu1,i1,1700000000000,1\n")
    refused(raw, r"events\.csv: column time is there 2 times \(time, Time\)\. Rename")


@pytest.mark.parametrize("name", ["Clicked", "TASK"])
def test_an_optional_column_in_another_spelling_is_not_dropped(raw: Path, name: str) -> None:
    spelt = name.lower()
    change_lines(
        raw / "events.jsonl", lambda _, row: {key: row[key] for key in row if key != spelt} | {name: 1}
    )
    fix = rf"column {name!r} is not read\. Name it {spelt}"
    refused(raw, r"events\.jsonl: " + fix)
    (raw / "events.jsonl").unlink()
    (raw / "events.csv").write_text(f"user_id,item_id,time,{name}\nu1,i1,1700000000000,1\n")
    refused(raw, r"events\.csv: " + fix)
    (raw / "events.csv").unlink()
    pq.write_table(
        pa.table({"user_id": ["u1"], "item_id": ["i1"], "time": [1700000000000], name: [1]}),
        raw / "events.parquet",
    )
    refused(raw, r"events\.parquet: " + fix)


def test_a_csv_row_with_too_few_columns_is_named(raw: Path) -> None:
    (raw / "events.jsonl").unlink()
    (raw / "events.csv").write_text("user_id,item_id,time\nu1,i1,1700000000000\nu1,i2\n")
    refused(raw, r"events\.csv:row 3: 2 columns where the header has 3")


def test_a_csv_row_that_is_too_long_is_named_with_the_reason(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1 << 16)
    monkeypatch.setattr(reading, "BUFFER_BYTES", 1 << 17)
    (raw / "events.jsonl").unlink()
    row, long_row = "u1,i1,1700000000000\n", f"u1,{'i' * 70_000},1700000000000"
    for before in (0, 5000, 6000):  # 5000: it crosses the end of a buffer; duckdb leaves it out if it is last
        for end in ("", "\n", f"\n{row}"):
            (raw / "events.csv").write_text(f"user_id,item_id,time\n{before * row}{long_row}{end}")
            refused(raw, rf"events\.csv:row {before + 2}: is longer than 65,536 bytes")


def test_a_damaged_parquet_file_is_named(raw: Path) -> None:
    table = pa.Table.from_pylist(
        [json.loads(line) for line in (raw / "events.jsonl").read_text().splitlines()]
    )
    (raw / "events.jsonl").unlink()
    path = raw / "events.parquet"
    pq.write_table(table, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    refused(raw, r"events\.parquet: cannot be read: Invalid Input Error")
    path.write_bytes(whole[:800] + b"\xff" * 300 + whole[1100:])  # duckdb's reason names no file
    refused(raw, r"events\.parquet or .*items\.jsonl: cannot be read: ")


def test_words_that_are_no_integers(tmp_path: Path) -> None:
    raw = write_tables(tmp_path / "raw", users=12, items=60, days=4, anonymised=True)
    change_lines(
        raw / "events.jsonl",
        lambda number, row: {**row, "task": "src", "query": "red shoes"} if number == 3 else row,
    )
    refused(raw, r"events\.jsonl:query:row 4: must be a list of integers")
    change_lines(raw / "items.jsonl", lambda number, row: {**row, "words": "red"} if number == 3 else row)
    refused(raw, r"items\.jsonl:words: those of item 'i3' must be a list of integers, got 'red'")


def test_rows_that_cannot_be_used_are_counted_by_reason(raw: Path) -> None:
    def spoil(number: int, row: dict[str, Any]) -> dict[str, Any]:
        changes: dict[int, dict[str, Any]] = {
            0: {"user_id": None},
            1: {"item_id": "NaN"},
            2: {"time": None},
            3: {"time": 0},
            4: {"item_id": "i999"},
            5: {"task": "src", "query": ""},
        }
        return {**row, **changes.get(number, {})}

    change_lines(raw / "events.jsonl", spoil)
    dropped = prepare("tables", raw, raw.parent / "out", FAST).raw["dropped"]
    assert dropped == {
        "no user_id": 1,
        "no item_id": 1,
        "no time": 1,
        "time before 1971 (in seconds? it must be ms)": 1,
        "item not in items": 1,
        "search without a query": 1,
    }


def test_an_empty_log(raw: Path) -> None:
    change_lines(raw / "events.jsonl", lambda _, row: {**row, "clicked": 0})
    refused(raw, "no usable click")
    (raw / "events.jsonl").write_text("")
    refused(raw, r"events\.jsonl: empty file")


def test_a_time_in_seconds_is_suspected(raw: Path) -> None:
    change_lines(raw / "events.jsonl", lambda _, row: {**row, "time": row["time"] // 1000})
    refused(raw, r"no usable click\. Dropped: time before 1971 \(in seconds\? it must be ms\)")


def test_duplicate_item_ids(raw: Path) -> None:
    with open(raw / "items.jsonl", "a") as file:
        file.write(json.dumps({"item_id": "i3", "text": "again"}) + "\n")
    refused(raw, r"items\.jsonl:item_id: 'i3' is there 2 times")


def test_a_catalogue_of_one_item(raw: Path) -> None:
    change_lines(raw / "events.jsonl", lambda _, row: {**row, "item_id": "i0"})
    refused(raw, r"all but 0 of 1 items.*The log needs more items")


def test_fewer_items_than_negatives(raw: Path) -> None:
    refused(raw, r"99 negatives cannot be drawn\. Use num_negatives=\d+ or fewer", "num_negatives=99")


def test_a_filter_that_leaves_nothing(raw: Path) -> None:
    refused(raw, "the filter leaves no click", "min_interactions=1000")


def test_a_log_of_one_day_has_no_splits(raw: Path) -> None:
    change_lines(raw / "events.jsonl", lambda _, row: {**row, "time": 1_700_000_000_000})
    refused(raw, "the train and valid split has no event")


def test_settings_are_all_checked_at_once(raw: Path) -> None:
    refused(
        raw,
        r"(?s)3 problems.*num_negative .*Did you mean num_negatives.*"
        r"split .*'time' or 'leave_one_out'.*test_days",
        "num_negative=3",
        "split=random",
        "test_days=0",
        kind=ConfigError,
    )


def test_settings_end_where_a_manifest_does(raw: Path) -> None:
    widths = ("history_max", "num_negatives", "hard_negatives", "item_tokens", "query_tokens", "query_words")
    refused(
        raw, "(?s)6 problems.*" + ".*".join(f"{name} +must be less than 1048576" for name in widths),
        *(f"{name}=1048576" for name in widths), kind=ConfigError,
    )  # fmt: skip


def test_split_by_time_needs_a_clock(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "Small.inter.json").write_text('{"0": [0, 1, 2]}')
    (tmp_path / "raw" / "Small.item.json").write_text('{"0": {}, "1": {}, "2": {}}')
    refused(
        tmp_path / "raw",
        "no common clock.*split=leave_one_out",
        "split=time",
        source="amazon",
        kind=ConfigError,
    )


def test_a_tokenizer_that_is_not_there_or_splits_the_answers(raw: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    refused(raw, r"tokenizer=/nowhere: .* does not exist", "tokenizer=/nowhere", kind=ConfigError)
    Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    refused(
        raw, "Yes and No must be one token each", f"tokenizer={tmp_path / 'tokenizer.json'}", kind=ConfigError
    )


def test_an_existing_folder_is_refused_and_then_replaced_on_request(raw: Path) -> None:
    out = raw.parent / "out"
    first = prepare("tables", raw, out, FAST)
    with pytest.raises(DataError, match=r"exists already.*overwrite=true"):
        prepare("tables", raw, out, FAST)
    second = prepare("tables", raw, out, [*FAST, "seed=1", "overwrite=true"])
    assert first.hash != second.hash
    assert not out.with_name("out.partial").exists()
    (raw.parent / "mine").mkdir()
    with pytest.raises(DataError, match="is not a prepared folder: it stays"):
        prepare("tables", raw, raw.parent / "mine", [*FAST, "overwrite=true"])


def test_a_full_disk_leaves_the_old_folder_and_a_restart_goes_on(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = raw.parent / "out"
    before = prepare("tables", raw, out, FAST)
    settings = [*FAST, "seed=1", "overwrite=true"]

    def full(self: write.HashingFile, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write.HashingFile, "write", full)
        with pytest.raises(
            DataError, match=r"No space left on device.*is as it was.*run the same command again"
        ):
            prepare("tables", raw, out, settings)
    from data_shards.schema import read_manifest

    assert read_manifest(out).hash == before.hash
    assert all((out / shard.name).stat().st_size == shard.num_bytes for shard in before.shards("train"))
    stages: list[str] = []
    after = prepare("tables", raw, out, settings, progress=lambda stage, done, total: stages.append(stage))
    assert after.hash == read_manifest(out).hash != before.hash
    assert not {"read", "catalog"} & set(stages), "finished stages are reused"
    assert "checks" in stages


def test_too_little_memory_leaves_finished_stages(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []

    def taken(*_: Any, **__: Any) -> Any:
        raise MemoryError("Unable to allocate 7.63 MiB for an array")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "draw_negatives", taken)
        with pytest.raises(DataError, match=r"writing out failed: Unable to allocate .*finished stages in"):
            prepare("tables", raw, raw.parent / "out", FAST)
    prepare("tables", raw, raw.parent / "out", FAST, progress=lambda stage, *_: stages.append(stage))
    assert stages[0] == "negatives"


def test_a_memory_limit_that_is_too_small_is_the_setting_to_change(raw: Path) -> None:
    """duckdb adds a list of its own settings, which gensr does not have."""
    told = r"out failed: Out of Memory Error: .* Set memory_limit above 5MB, use fewer threads, or [^\n]+$"
    with pytest.raises(DataError, match=told):
        prepare("tables", raw, raw.parent / "out", (*FAST, "memory_limit=5MB"))
    prepare("tables", raw, raw.parent / "out", FAST)


@pytest.mark.parametrize("stage", ["read", "names"])
def test_duckdb_without_room_blames_no_raw_file(raw: Path, stage: str) -> None:
    out, stages = raw.parent / "out", []
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def fills(now: str, done: int, total: int) -> None:
        if now == stage:  # as on a full disk, files grow no further
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))

    try:
        with pytest.raises(DataError, match=r"writing out failed: .*File too large.*finished stages in .*"):
            prepare("tables", raw, out, FAST, progress=fills)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    prepare("tables", raw, out, FAST, progress=lambda stage, done, total: stages.append(stage))
    assert stages[0] == stage


def test_a_raw_file_that_may_not_be_read_is_named(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (raw / "events.jsonl").unlink()
    path = raw / "events.csv"
    path.write_text("user_id,item_id,time\nu1,i1,1700000000000\n")

    def denied(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(reading, "open", denied, raising=False)
        with pytest.raises(DataError, match=r"events\.csv: cannot be read: Permission denied\."):
            prepare("tables", raw, raw.parent / "out", FAST)
    error = duckdb.IOException(f'IO Error: Cannot open file "{path}": Permission denied')
    assert "events.csv: cannot be read: IO Error" in str(reading.unreadable(error, (path,)))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_needs_no_space(
    raw: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def denied(path: Path, *_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code), str(path))

    out = raw.parent / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", denied)
        for make in (lambda: prepare("tables", raw, out, FAST), lambda: simulate(out, 10, 300, 5)):
            with pytest.raises(
                DataError, match=rf"{os.strerror(code)}.*Make the folder writable, or"
            ) as caught:
                make()
            assert "space" not in str(caught.value)


def test_a_restart_from_another_folder_reads_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths: another raw/ lies where the restart is called."""
    settings = ("min_interactions=1", "both_behaviours=false", "num_negatives=10", "vocab_size=300")
    for folder, seed in ((tmp_path, 0), (tmp_path / "other", 1)):
        simulate(folder / "raw", users=60, items=300, days=4, seed=seed)
    expected = prepare("kuaisar", tmp_path / "raw", tmp_path / "expected", settings)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_keys", lambda *_: exit("stopped"))
        with pytest.raises(SystemExit):
            prepare("kuaisar", "raw", "out", settings)
    monkeypatch.chdir(tmp_path / "other")
    assert prepare("kuaisar", "../raw", "../out", settings).hash == expected.hash


def test_other_settings_reuse_nothing_of_an_interrupted_run(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_shards import prepare as module

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "check_prepared", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare("tables", raw, raw.parent / "out", FAST)
    assert not (raw.parent / "out").exists()
    stages: list[str] = []
    prepare(
        "tables",
        raw,
        raw.parent / "out",
        [*FAST, "seed=1"],
        progress=lambda stage, done, total: stages.append(stage),
    )
    assert stages[0] == "read"


def test_ids_are_strings_or_integers_as_given(tmp_path: Path) -> None:
    def users_of(folder: Path) -> pa.DataType:
        prepare("tables", folder, folder.parent / f"{folder.name}-out", FAST)
        return (
            pq.read_table(folder.parent / f"{folder.name}-out" / "catalog" / "users.parquet")
            .schema.field("user_id")
            .type
        )

    strings = write_tables(tmp_path / "strings", users=12, items=60, days=4)
    numbers = write_tables(tmp_path / "numbers", users=12, items=60, days=4)
    change_lines(
        numbers / "events.jsonl",
        lambda number, row: {
            **row,
            "user_id": float(row["user_id"][1:]) if number % 2 else int(row["user_id"][1:]),
        },
    )
    assert users_of(strings) == pa.string()
    assert users_of(numbers) == pa.int64(), "12.0 is 12"


def test_parquet_with_timestamps_and_csv_with_iso_times_mean_the_same(tmp_path: Path) -> None:
    import datetime

    fingerprints = []
    rows = [
        json.loads(line)
        for line in (write_tables(tmp_path / "raw", users=12, items=60, days=4) / "events.jsonl")
        .read_text()
        .splitlines()
    ]
    times = [datetime.datetime.fromtimestamp(row["time"] / 1000, tz=datetime.timezone.utc) for row in rows]
    for form in ("parquet", "csv"):
        folder = tmp_path / form
        folder.mkdir()
        (folder / "items.jsonl").write_bytes((tmp_path / "raw" / "items.jsonl").read_bytes())
        columns: dict[str, Any] = {
            name: [row[name] for row in rows] for name in ("user_id", "item_id", "task", "query", "clicked")
        }
        if form == "parquet":
            pq.write_table(
                pa.table({**columns, "time": pa.array(times, pa.timestamp("ms", tz="UTC"))}),
                folder / "events.parquet",
            )
        else:
            lines = [
                ",".join(
                    [
                        *(str(columns[name][i] or ("" if name == "query" else 0)) for name in columns),
                        times[i].isoformat(),
                    ]
                )
                for i in range(len(rows))
            ]
            (folder / "events.csv").write_text(
                "\r\n".join([",".join([*columns, "time"]), *lines]) + "\r\n", encoding="utf-8-sig"
            )
        fingerprints.append(prepare("tables", folder, tmp_path / f"{form}-out", FAST).fingerprint)
    assert (
        fingerprints[0]
        == fingerprints[1]
        == prepare("tables", tmp_path / "raw", tmp_path / "out", FAST).fingerprint
    )
