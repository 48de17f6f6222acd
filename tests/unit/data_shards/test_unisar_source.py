"""The reader of UniSAR's released folders, on small folders of that form: events, histories and negatives
against a slow reading of the same tables, and what does not belong into a table."""

import json
import os
import pickle
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from data_shards.blocks import decode_blocks, tar_entries
from data_shards.errors import ConfigError, DataError
from data_shards.inspect import describe, inspect
from data_shards.pickled import read_pickle
from data_shards.prepare import prepare
from data_shards.schema import SPLITS, read_manifest
from data_shards.sources import unisar, unisar_tables
from data_shards.sources.unisar_tables import convert
from tests.payload import Payload
from tests.unit.data_shards.test_reference import read_back

START = 1_684_700_000_000  # ms
ITEMS, NEGATIVES = 40, 5
SETTINGS = (f"num_negatives={NEGATIVES}", "vocab_size=300", "history_max=6")
NAMES = {"train": "train", "valid": "val", "test": "test"}
SESSIONS = "src_session_his"  # of a user: the list of searches
Log = dict[str, Any]


def object_frame(columns: dict[str, Any]) -> pd.DataFrame:
    """With names as pandas before 3 has them: objects, no text of pyarrow."""
    frame = pd.DataFrame({name: pd.Series(values, dtype=None) for name, values in columns.items()})
    frame.columns = pd.Index(list(columns), dtype=object)
    return frame


def make_log(seed: int = 0, users: int = 8, unit: int = 1) -> Log:
    """Users with clicks and searches, many at one moment; the last tenth of the time is test, the one before
    it validation. Some clicks are in the lists and no row of dataset/, as in the released folders."""
    rng = random.Random(seed)
    vocab: dict[int, dict[str, list[Any]]] = {}
    sessions: list[tuple[list[int], list[int]]] = [([], [])]  # 0 is padding
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {
        (task, split): [] for task in ("rec", "src") for split in SPLITS
    }

    def split_of(time: int) -> str:
        return "test" if time >= 90 else "valid" if time >= 80 else "train"

    for user in range(users):
        lists: dict[str, list[Any]] = {
            name: [] for name in ("rec_his", "rec_his_ts", "src_session_his", "src_session_his_ts")
        }
        for time in sorted(rng.choices(range(100), k=24)):
            lists["rec_his"].append(rng.randint(1, ITEMS - 5))
            lists["rec_his_ts"].append(float((START + time * 1000) // unit))
        for time in sorted({*rng.sample(range(100), 9), 85, 95}):
            words = [rng.randint(1, 30) for _ in range(rng.randint(1, 4))]
            sessions.append((words, rng.sample(range(1, ITEMS - 5), rng.randint(1, 3))))
            lists["src_session_his"].append(len(sessions) - 1)
            lists["src_session_his_ts"].append(float((START + time * 1000) // unit))
        vocab[user] = lists
        others = range(1, ITEMS + 1)
        for position, (item, stamp) in enumerate(zip(lists["rec_his"], lists["rec_his_ts"], strict=True)):
            if position == 0 or rng.random() < 0.2:  # in the lists only
                continue
            split = split_of((int(stamp) * unit - START) // 1000)
            same = (row["item_id"] == item and row["timestamp"] == stamp for row in rows["rec", split]
                    if row["user_id"] == user)  # fmt: skip
            if any(same):
                continue
            rows["rec", split].append({
                "user_id": user, "item_id": item, "timestamp": stamp, "click": 1,
                "rec_his": position, "src_session_his": rng.randint(0, len(lists["src_session_his"])),
                "neg_items": rng.sample(others, NEGATIVES if split != "train" else 2),
            })  # fmt: skip
        searched = zip(lists["src_session_his"], lists["src_session_his_ts"], strict=True)
        for position, (session, stamp) in enumerate(searched):
            split = split_of((int(stamp) * unit - START) // 1000)
            for item in sessions[session][1]:
                rows["src", split].append({
                    "user_id": user, "item_id": item, "timestamp": stamp, "search_session_id": session,
                    "keyword": sessions[session][0], "rec_his": rng.randint(0, 24),
                    "src_session_his": position,
                    "neg_items": rng.sample(others, NEGATIVES if split != "train" else 2),
                })  # fmt: skip
    return {"vocab": vocab, "sessions": sessions, "rows": rows, "unit": unit}


def tables_of(log: Log, captions: bool = True, text_queries: bool = False) -> dict[str, Any]:
    """File name → what is pickled in it."""
    keyword = np.zeros((len(log["sessions"]), 50), np.int64)
    pos_items = np.zeros((len(log["sessions"]), 5), np.int64)
    for number, (words, items) in enumerate(log["sessions"]):
        keyword[number, : len(words)], pos_items[number, : len(items)] = words, items
    item_vocab: dict[str, np.ndarray] = {}
    if captions:
        numbers = np.arange(ITEMS + 1)
        item_vocab = {
            "caption": np.stack([numbers, numbers % 3, 0 * numbers], axis=1),
            "first_level_category_id": numbers % 4,
            "second_level_category_id": np.where(numbers % 4 > 0, numbers % 7, 0),
        }
    tables: dict[str, Any] = {
        "vocab/user_vocab.pkl": log["vocab"],
        "vocab/src_session_vocab_np.pkl": {"keyword": keyword, "pos_items": pos_items},
        "vocab/item_vocab_np.pkl": item_vocab,
        "vocab/user_vocab_np.pkl": {"onehot_feat1": np.zeros(len(log["vocab"]), np.int64)},
        "vocab/query_vocab.pkl": [[], *(words for words, _ in log["sessions"][1:])],
    }
    for (task, split), rows in log["rows"].items():
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        if text_queries and "keyword" in columns:
            columns["keyword"] = [str(words) for words in columns["keyword"]]
        frame = object_frame(columns)
        if text_queries and "keyword" in columns:
            frame["keyword"] = frame["keyword"].astype(object)
        tables[f"dataset/{task}_{NAMES[split]}.pkl"] = frame
    return tables


def write_folder(folder: Path, tables: dict[str, Any], protocol: int = 4) -> Path:
    for name, table in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(table, protocol=protocol))
    return folder


Click = tuple[int, int, str, str]  # time, item, task, query


def lists_of(log: Log, user: int) -> dict[str, list[tuple[int, list[Click]]]]:
    """Task → of each entry of a user's list: its time and clicks."""
    mine, unit = log["vocab"][user], log["unit"]
    rec = zip(mine["rec_his"], mine["rec_his_ts"], strict=True)
    src = zip(mine["src_session_his"], mine["src_session_his_ts"], strict=True)
    return {
        "rec": [(int(at) * unit, [(int(at) * unit, item, "rec", "")]) for item, at in rec],
        "src": [
            (
                int(at) * unit,
                [
                    (int(at) * unit, item, "src", " ".join(map(str, log["sessions"][session][0])))
                    for item in log["sessions"][session][1]
                ],
            )
            for session, at in src
        ],
    }


def expected(log: Log, split: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """(user, item, task, time, query) of each event → its negatives and the rows that it was made from."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for task in ("rec", "src"):
        for row in log["rows"][task, split]:
            query = " ".join(map(str, row["keyword"])) if task == "src" else None
            key = (row["user_id"], row["item_id"], task, int(row["timestamp"]) * log["unit"], query)
            found.setdefault(key, row)
    return found


def stored_negatives(out: Path, split: str) -> dict[int, list[int]]:
    items = pq.read_table(out / "catalog" / "items.parquet")["item_id"].to_pylist()
    return {
        row["event_id"]: [items[item] for item in row["negatives"]]
        for shard in read_manifest(out).shards(split)
        for block in decode_blocks(tar_entries(out / shard.name), shard.blocks)
        for row in block.to_pylist()
    }


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("unisar") / "KuaiSAR", tables_of(make_log()))


@pytest.fixture(scope="module")
def out(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "out"
    prepare("unisar", raw, folder, SETTINGS)
    return folder


@pytest.fixture(scope="module")
def by_count(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counted") / "out"
    settings = [*SETTINGS[:2], "history_max=500", "history_rule=count"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unisar, "convert_apart", convert)
        prepare("unisar", raw, folder, settings)
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the seconds that a process of its own takes to start; `out` and a test below have one."""
    monkeypatch.setattr(unisar, "convert_apart", convert)


def key_of(event: dict[str, Any]) -> tuple[Any, ...]:
    return event["user"], event["item"], event["task"], event["time"], event["query"]


def test_events_and_negatives_are_those_of_its_files(out: Path) -> None:
    log, events = make_log(), read_back(out)
    for split in SPLITS:
        wanted = expected(log, split)
        assert sorted(map(str, (key_of(event) for event in events[split]))) == sorted(map(str, wanted))
        if split != "train":
            negatives = stored_negatives(out, split)
            for event in events[split]:
                assert negatives[event["event_id"]] == wanted[key_of(event)]["neg_items"]
    manifest = read_manifest(out)
    assert manifest.raw["split"]["rule"] == "stored" and manifest.num_items == ITEMS
    assert sum(len(events[split]) for split in SPLITS) < sum(
        len(mine["rec_his"]) for mine in log["vocab"].values()
    ) + len(expected(log, "train")), "some clicks are in histories only"


def test_histories_hold_every_earlier_click_of_the_lists(out: Path) -> None:
    log, events = make_log(), read_back(out)
    outside = 0
    made = {key_of(event) for split in SPLITS for event in events[split]}
    for event in (event for split in SPLITS for event in events[split]):
        moments: dict[int, dict[int, str]] = {}  # time → item → task, a search where it was both
        for entries in lists_of(log, event["user"]).values():  # clicks, then searches
            for time, item, task, query in (click for _, clicks in entries for click in clicks):
                if time < event["time"]:
                    moments.setdefault(time, {})[item] = task
                    outside += (event["user"], item, task, time, query or None) not in made
        history = list(event["history"])
        assert len(history) == min(6, sum(map(len, moments.values())))
        for time in sorted(moments, reverse=True):  # those of one moment in any order
            of_moment = moments[time].items()
            newest, history = history[-len(of_moment) :], history[: -len(of_moment)]
            assert set(newest) <= set(of_moment) and (len(newest) == len(of_moment) or not history)
    assert outside > 50, "clicks that are no event are in histories"


def test_the_rule_by_count_is_that_of_its_sampler(by_count: Path) -> None:
    log, later = make_log(), 0
    events = read_back(by_count)
    for split in SPLITS:
        wanted = expected(log, split)
        for event in events[split]:
            row, mine = wanted[key_of(event)], lists_of(log, event["user"])
            entries = [*mine["rec"][: row["rec_his"]], *mine["src"][: row["src_session_his"]]]
            entries.sort(key=lambda entry: entry[0])  # stable: clicks before searches, as in its sampler
            clicks = [click for _, clicks in entries for click in clicks]
            assert event["history"] == [(item, task) for _, item, task, _ in clicks]
            assert event["history_queries"] == [query or None for *_, query in clicks]
            later += sum(time >= event["time"] for time, *_ in clicks)
    assert later > 0
    checks = read_manifest(by_count).raw["leak_checks"]
    assert checks["history_before_target"]["violations"] > 0, "counted, not hidden"
    assert checks["event_once"]["violations"] == checks["history_queries"]["violations"] == 0
    lines = describe(inspect(by_count))
    assert any("KEPT  history_before_target" in line for line in lines)
    assert any("OK    event_once" in line for line in lines)


@pytest.mark.usefixtures("in_process")
def test_the_newest_are_kept_by_count(raw: Path, by_count: Path, tmp_path: Path) -> None:
    prepare("unisar", raw, tmp_path / "out", [*SETTINGS[:2], "history_rule=count", "history_max=3"])
    newest, whole = (
        {event["event_id"]: event["history"] for split in SPLITS for event in read_back(folder)[split]}
        for folder in (tmp_path / "out", by_count)
    )
    assert newest == {event: history[-3:] for event, history in whole.items()}


def test_captions_and_categories_become_words_and_paths(out: Path) -> None:
    items = pq.read_table(out / "catalog" / "items.parquet").to_pylist()
    words = np.load(out / "catalog" / "words.npy")
    ids = np.load(out / "catalog" / "item_words-000000.npy")
    for row, item in enumerate(items):
        number = item["item_id"]
        assert [words[word - 1] for word in ids[row] if word] == [w for w in (number, number % 3) if w]
        path = [str(level) for level in (number % 4, number % 7 if number % 4 else 0) if level]
        assert item["category"] == (" > ".join(path) or None)


@pytest.mark.usefixtures("in_process")
def test_seconds_and_queries_as_text_and_an_item_table_without_captions(tmp_path: Path) -> None:
    log = make_log(unit=1000)
    tables = tables_of(log, captions=False, text_queries=True)
    folder = write_folder(tmp_path / "Amazon", tables, protocol=2)
    manifest = prepare("unisar", folder, tmp_path / "out", SETTINGS)
    assert manifest.raw["source"]["time_unit"] == "s" and manifest.num_categories == 0
    assert list(manifest.raw["published"]) == ["Kindle Store, 5-core"]
    events = read_back(tmp_path / "out")
    for split in SPLITS:
        assert {key_of(event) for event in events[split]} == set(expected(log, split))


def test_negatives_that_were_clicked_stay_and_are_counted(out: Path) -> None:
    log, clicked = make_log(), 0
    for split in ("valid", "test"):
        for (user, item, *_), row in expected(log, split).items():
            mine = {
                item for task in lists_of(log, user).values() for _, clicks in task for _, item, *_ in clicks
            }
            clicked += len({*mine, item} & set(row["neg_items"]))
    checks = read_manifest(out).raw["leak_checks"]
    assert checks["negatives_unseen"]["violations"] == clicked > 0
    assert any("KEPT  negatives_unseen" in line for line in describe(inspect(out)))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["num_negatives=9"], r"stores 5 negatives for an event.*Use num_negatives=5"),
        (["num_negatives=5", "min_interactions=2"], "split=stored keeps the events and candidates"),
        (["num_negatives=5", "split=time", "history_rule=count"], "history_rule=count needs split=stored"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    raw: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        prepare("unisar", raw, tmp_path / "out", ["vocab_size=300", *overrides])


def test_another_source_has_no_stored_split(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("{}")
    (tmp_path / "items.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="split=stored: source tables stores no splits"):
        prepare("tables", tmp_path, tmp_path / "out", ["split=stored"])


# ---- tables that are wrong ---------------------------------------------------------------------------------


def without(table: pd.DataFrame, column: str) -> pd.DataFrame:
    return table.drop(columns=[column])


def with_value(table: pd.DataFrame, column: str, row: int, value: Any) -> pd.DataFrame:
    values = list(table[column])
    values[row] = value
    return object_frame({name: values if name == column else list(table[name]) for name in table.columns})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dataset/rec_test.pkl", lambda t: without(t, "rec_his"), r"column rec_his is missing"),
        ("dataset/rec_test.pkl", lambda t: [1], r"rec_test\.pkl: must be a data frame, got list"),
        (
            "dataset/rec_test.pkl",
            lambda t: with_value(t, "item_id", 2, 1.5),
            r"item_id:row 2: must be an int",
        ),
        ("dataset/rec_test.pkl", lambda t: with_value(t, "item_id", 2, 0), r"row 2: item 0; items begin"),
        (
            "dataset/rec_test.pkl",
            lambda t: with_value(t, "timestamp", 1, np.nan),
            r"timestamp:row 1: must be",
        ),
        (
            "dataset/src_val.pkl",
            lambda t: with_value(t, "neg_items", 1, [1, 2]),
            r"neg_items:row 1: 2 items where row 0 has 5",
        ),
        (
            "dataset/src_val.pkl",
            lambda t: with_value(t, "neg_items", 1, 7),
            r"neg_items:row 1: must be a list of items, got 7",
        ),
        (
            "dataset/src_val.pkl",
            lambda t: with_value(t, "keyword", 1, "__import__('os').mkdir('x')"),
            r"keyword:row 1: must be a list of integers",
        ),
        ("vocab/user_vocab.pkl", lambda t: {**t, 1: {**t[1], "rec_his_ts": [1.0]}}, r"24 entries in rec_his"),
        ("vocab/user_vocab.pkl", lambda t: {**t, 1: {**t[1], SESSIONS: [9999] * 10}}, r"session 9999 is not"),
        ("vocab/src_session_vocab_np.pkl", lambda t: {"keyword": t["keyword"]}, r"pos_items is missing"),
    ],
)
def test_a_wrong_table_is_named(
    tmp_path: Path, name: str, change: Callable[[Any], Any], message: str
) -> None:
    tables = tables_of(make_log(users=3))
    folder = write_folder(tmp_path / "raw", {**tables, name: change(tables[name])})
    with pytest.raises(DataError, match=message):
        convert(folder, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "raw", tables_of(make_log(users=3)))
    (folder / "vocab" / "user_vocab.pkl").unlink()
    with pytest.raises(
        DataError, match=r"user_vocab\.pkl: no such file\. RAW must be one of UniSAR's folders"
    ):
        prepare("unisar", folder, tmp_path / "out", SETTINGS)


def test_a_full_disk_and_an_unreadable_pickle_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "raw", tables_of(make_log(users=3)))
    monkeypatch.setattr(sys, "argv", ["unisar_tables", str(folder), str(tmp_path / "nowhere")])
    assert unisar_tables.main() == 0
    error = json.loads(capsys.readouterr().out)["error"]
    assert re.fullmatch(r"writing .*nowhere failed: .*\. Free space or memory, .*", error, re.DOTALL)
    (folder / "dataset" / "rec_val.pkl").unlink()
    (folder / "dataset" / "rec_val.pkl").mkdir()
    with pytest.raises(DataError, match=r"rec_val\.pkl: cannot be read: Is a directory"):
        convert(folder, tmp_path)


# ---- pickles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_gives_the_same_tables(tmp_path: Path, protocol: int) -> None:
    frame = object_frame({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "c": [[1], np.array([2, 3]), "[4]"]})
    frame = pd.concat([frame, frame])  # an index of numbers
    arrays = {
        "columns first": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "other end": np.arange(3, dtype=">i4"),
        "empty": np.zeros((0, 4)),
        "text": np.array(["ab", "c"]),
        "number": np.float64(2.5),
        5: [np.int64(3), (1, {2}), None, b"x", slice(1, 2)],
    }
    write_folder(tmp_path, {"frame": frame, "arrays": arrays, "short": frame[frame["a"] == 2]}, protocol)
    columns = read_pickle(tmp_path / "frame")
    assert list(columns) == ["a", "b", "c"] and columns["a"].tolist() == [1, 2, 3, 1, 2, 3]
    assert columns["b"].tolist() == [0.5, 1.5, 2.5] * 2 and columns["c"][1].tolist() == [2, 3]
    assert read_pickle(tmp_path / "short")["c"][1].tolist() == [2, 3]
    found = read_pickle(tmp_path / "arrays")
    assert found["columns first"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["other end"].tolist() == [0, 1, 2] and found["empty"].shape == (0, 4)
    assert found["text"].tolist() == ["ab", "c"] and found["number"] == 2.5
    assert found[5] == [3, (1, {2}), None, b"x", slice(1, 2)]


OLD = Path(__file__).parent / "pickles"


@pytest.mark.parametrize("path", sorted(OLD.glob("*.pkl")), ids=lambda path: path.stem)
def test_frames_of_old_versions_are_read(path: Path) -> None:
    """Written by the versions in their names; UniSAR's requirements name pandas 1.3.4 and numpy 1.22.4."""
    columns = read_pickle(path)
    assert {name: column.tolist() for name, column in columns.items() if name != "neg_items"} == {
        "user_id": [1, 2, 1],
        "timestamp": [1.5e12, 1.6e12, 1.5e12],
        "keyword": [[1], "[2, 3]", [1]],
    }
    assert [list(items) for items in columns["neg_items"]] == [[1, 2], [3, 4], [1, 2]]


class Calls:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


class ArrayOfItsOwn(np.ndarray):
    target: Path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def array_with_payload(target: Path) -> Any:
    array = np.arange(3).view(ArrayOfItsOwn)
    array.target = target
    return array


def frame_eval(target: Path) -> Any:
    return Calls(pd.DataFrame.eval, object_frame({"a": [1]}), f"@os.mkdir({str(target)!r})")


def named(module: str, name: str, *arguments: bytes) -> bytes:
    """A pickle of protocol 4, written by hand: module.name(*arguments)."""
    text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return b"\x80\x04" + text + b"\x93(" + b"".join(arguments) + b"tR."


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


# numpy would make objects of these bytes: addresses that the pickle chose
OBJECTS_FROM_BYTES = (
    b"\x80\x04" + short("numpy") + short("ndarray") + b"\x93(K\x01\x85" + short("numpy") + short("dtype")
    + b"\x93(" + short("O") + b"tR" + b"C\x08AAAAAAAAtR."
)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda target: pickle.dumps(Payload(target)), r"holds (posix|nt)\.mkdir"),
        (lambda target: pickle.dumps({1: [Payload(target)]}, protocol=0), r"holds (posix|nt)\.mkdir"),
        (lambda target: pickle.dumps(Calls(os.system, f"mkdir {target}")), r"holds (posix|nt)\.system"),
        (lambda target: pickle.dumps(array_with_payload(target)), r"holds (posix|nt)\.mkdir"),
        (
            lambda target: pickle.dumps(np.array([1, Payload(target)], object)),
            r"holds (posix|nt)\.mkdir",
        ),
        (lambda target: pickle.dumps(frame_eval(target)), r"holds (pandas|builtins).*(eval|getattr)"),
        (
            lambda target: pickle.dumps(Calls(eval, f"__import__('os').mkdir({str(target)!r})")),
            r"holds builtins\.eval",
        ),
        (lambda target: pickle.dumps(Calls(pd.read_pickle, str(target))), r"holds pandas.*read_pickle"),
        (
            lambda target: pickle.dumps(Calls(__import__("functools").partial, os.mkdir, str(target))),
            r"holds (posix|nt)\.mkdir",
        ),
        (
            lambda target: pickle.dumps(Calls(__import__("functools").partial, print)),
            r"holds builtins\.print",
        ),
        (lambda target: named("functools", "partial", short("x")), r"functools\.partial of anything but"),
        (lambda target: named("pandas.arrays", "ArrowStringArray"), r"save them as objects"),
        (lambda target: named("numpy.testing", "runstring", short("x")), r"holds numpy\.testing\.runstring"),
        (lambda target: named("pandas.core.frame", "DataFrame.eval"), r"DataFrame\.eval"),
        (lambda target: OBJECTS_FROM_BYTES, r"no pickled table|holds"),
        (lambda target: named("_codecs", "encode", short("x"), short("rot13")), r"text in another encoding"),
        (lambda target: b"", "no pickled table"),
        (lambda target: pickle.dumps([1, 2])[:-3], "no pickled table"),
    ],
)
def test_nothing_in_a_pickle_is_run(tmp_path: Path, make: Callable[[Path], bytes], message: str) -> None:
    target, path = tmp_path / "touched", tmp_path / "table.pkl"
    path.write_bytes(make(target))
    with pytest.raises(DataError, match=message) as caught:
        read_pickle(path)
    assert "table.pkl" in str(caught.value) and "was run" in str(caught.value)
    assert not target.exists()


def array_state(dtype_state: tuple[Any, ...], content: Any) -> bytes:
    """An array as numpy writes it, with another dtype or content."""
    whole = pickle.dumps(np.array([1, 2]), protocol=2)
    honest = pickle.dumps(np.dtype("i8"), protocol=2)
    assert b"i8" in honest and b"i8" in whole
    return pickle.dumps(ArrayParts(dtype_state, content), protocol=2)


class DtypeParts:
    def __init__(self, text: str, state: tuple[Any, ...]) -> None:
        self.text, self.state = text, state

    def __reduce__(self) -> Any:
        return np.dtype, (self.text, False, True), self.state


class ArrayParts:
    def __init__(self, dtype_state: tuple[Any, ...], content: Any) -> None:
        self.dtype_state, self.content = dtype_state, content

    def __reduce__(self) -> Any:
        text, *state = self.dtype_state
        dtype = DtypeParts(text, tuple(state))
        reconstruct = np.zeros(1).__reduce__()[0]
        return reconstruct, (np.ndarray, (0,), b"b"), (1, (2,), dtype, False, self.content)


@pytest.mark.parametrize(
    ("dtype_state", "content", "message"),
    [
        (("O", 3, "|", None, None, None, -1, -1, 63), b"A" * 16, "objects of an array as bytes"),
        # fields of objects that claim to hold none: numpy would take the bytes for addresses
        (
            ("V8", 3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0),
            b"A" * 16,
            r"holds an array of 'V8'",
        ),
        (("i8", 3, "<", (np.dtype("O"), (1,)), None, None, -1, -1, 0), b"A" * 16, "an array of records"),
        (("i8", 3, "<", None, None, None, -1, -1, 0), b"A" * 3, "no pickled table"),
    ],
)
def test_an_array_cannot_be_made_of_addresses(
    tmp_path: Path, dtype_state: tuple[Any, ...], content: bytes, message: str
) -> None:
    (tmp_path / "table.pkl").write_bytes(array_state(dtype_state, content))
    with pytest.raises(DataError, match=message):
        read_pickle(tmp_path / "table.pkl")


def test_a_folder_with_a_payload_is_refused_by_the_verb(tmp_path: Path) -> None:
    """Through the process of its own: its error is ours, and nothing is left behind."""
    target = tmp_path / "touched"
    tables = {**tables_of(make_log(users=3)), "dataset/src_test.pkl": Payload(target)}
    folder = write_folder(tmp_path / "raw", tables)
    with pytest.raises(DataError, match=r"src_test\.pkl holds (posix|nt)\.mkdir.*Nothing in it was run"):
        prepare("unisar", folder, tmp_path / "out", SETTINGS)
    assert not target.exists() and not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_process_of_its_own_sees_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(words: list[str], **options: Any) -> Any:
        seen.update(words=words, **options)
        return type("Done", (), {"returncode": -9, "stdout": "", "stderr": ""})

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(unisar.subprocess, "run", run)
    with pytest.raises(DataError, match=r"ended by signal 9\. Memory"):
        unisar.convert_apart(tmp_path, tmp_path)
    assert "HF_TOKEN" not in seen["env"] and "secret" not in json.dumps(seen["env"])
