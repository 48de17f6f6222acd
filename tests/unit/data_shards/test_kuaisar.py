"""The KuaiSAR reader against every oddity of its files."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_shards.errors import DataError
from data_shards.inspect import describe, inspect
from data_shards.options import load_prepare_settings
from data_shards.prepare import prepare
from data_shards.schema import read_manifest
from data_shards.sources import open_source
from tests.unit.data_shards.test_categories import paths_by_item
from tests.unit.data_shards.test_reference import read_back

DAY = 86_400_000
START = 1_684_684_800_000  # midnight in Beijing, 2023-05-22
REC = (
    "user_id,item_id,playing_time,duration_ms,time,timestamp,click,forward,like,follow,search,"
    "search_item_related"
)
SRC = (
    "user_id,search_session_id,search_session_time,search_session_timestamp,keyword,search_source,item_id,"
    "click_cnt,item_type"
)
LEVELS = [
    f"{level}_level_category_{part}"
    for level in ("first", "second", "third", "fourth")
    for part in ("id", "name", "name_en")
]
ITEMS = ",".join(["item_id", "caption", "author_id", "item_type", "upload_time", "upload_type", *LEVELS])
SETTINGS = ("min_interactions=1", "both_behaviours=false", "num_negatives=2", "vocab_size=300")


def rec(user: object, item: object, timestamp: object, click: object = 1) -> str:
    return f"{user},{item},1.0,2.0,2023-05-22 12:28:56,{timestamp},{click},0,0,0,0,0"


def src(
    user: object,
    item: object,
    timestamp: object,
    keyword: str = '"[7, 9]"',
    clicks: object = 1,
    kind: str = "VIDEO",
) -> str:
    return f"{user},1,2023-05-22 21:14:51,{timestamp},{keyword},USER_INPUT,{item},{clicks},{kind}"


def item(
    number: object, caption: str = '"[5, 7]"', names: tuple[str, ...] = ("Food", "Bread", "empty", "empty")
) -> str:
    return ",".join(
        [str(number), caption, "1", "NORMAL", "2023-01-01", "Short", *(f"1,某,{name}" for name in names)]
    )


def write_world(
    folder: Path, recs: list[str], srcs: list[str], items: list[str], newline: str = "\n", mark: bool = False
) -> Path:
    folder.mkdir()
    base = [
        rec(user, number, START + day * DAY + user)
        for user in (1, 2)
        for day in range(3)
        for number in range(10 * user, 10 * user + 3)
    ]
    known = [item(number) for number in [*range(10, 13), *range(20, 23)]]
    for name, header, lines in (
        ("rec_inter", REC, base + recs),
        ("src_inter", SRC, srcs),
        ("item_features", ITEMS, known + items),
    ):
        text = newline.join([header, *lines]) + newline
        (folder / f"{name}.csv").write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
    return folder


def test_rows_that_cannot_be_used_are_counted_by_file_and_reason(tmp_path: Path) -> None:
    recs = [
        rec(1, 10, f"{START + 5}.0"),
        rec("", 10, START),
        rec(1, "nan", START),
        rec(1, 10, "NaN"),
        rec(1, 10, START, ""),
        rec(1, 11, START, -1),
        rec(1, 10, 0),
        rec(1, 10, 1684713600),
        rec(2, 20, START + 7),
        rec(2, 20, START + 7),
        rec(2, 99, START + 7),
    ]
    srcs = [
        src(1, 11, START + 9),
        src(1, 12, START + 9, clicks=0),
        src(1, 555, START, kind="USER"),
        src(1, 556, START, kind="LIVE"),
        src(1, 557, START, kind="LIVE"),
        src(1, 21, START + 10, keyword="[7]"),
        src(1, 21, START, keyword="[]"),
        src(1, 21, START, keyword=""),
        src(1, 22, START + 11, kind="IMAGE_ATLAS"),
        src(1, 20, START + 11, kind=""),
        src(1, 20, START + 9, clicks=-2),  # beside a click, but not shown and passed over
    ]
    raw = write_world(tmp_path / "raw", recs, srcs, [item(10, caption="[1]")], newline="\r\n", mark=True)
    manifest = prepare("kuaisar", raw, tmp_path / "out", SETTINGS)
    early = "time before 1971 (in seconds? it must be ms)"
    assert manifest.raw["dropped"] == {
        "rec_inter.csv: no user_id": 1,
        "rec_inter.csv: no item_id": 1,
        "rec_inter.csv: no timestamp": 1,
        "rec_inter.csv: no click": 1,
        "rec_inter.csv: click below 0": 1,
        f"rec_inter.csv: {early}": 2,
        "src_inter.csv: result of type USER": 1,
        "src_inter.csv: result of type LIVE": 2,
        "src_inter.csv: no keyword": 2,
        "src_inter.csv: no item_type": 1,
        "src_inter.csv: click_cnt below 0": 1,
        "duplicate click": 1,
        "repeated item row": 1,
    }
    assert manifest.raw["published"]["KuaiSAR"]["items"] == 6_890_707
    events = read_back(tmp_path / "out")["train"]
    searches = {(event["item"], event["query"]) for event in events if event["task"] == "src"}
    assert searches == {(11, "7 9"), (21, "7"), (22, "7 9")}
    assert [event["impressions"] for event in events if event["item"] == 11 and event["task"] == "src"] == [
        [12]
    ]
    assert (1, 10, START + 5) in {(event["user"], event["item"], event["time"]) for event in events}, (
        "a float time"
    )
    texts = {
        row["item_id"]: row
        for row in pq.read_table(tmp_path / "out" / "catalog" / "items.parquet").to_pylist()
    }
    assert (texts[99]["text"], texts[99]["category"]) == ("", None), "clicked, without features"
    assert (texts[11]["text"], texts[11]["category"]) == ("Food Bread 5 7", "Food > Bread"), (
        "English category names, then the caption"
    )
    paths = paths_by_item(tmp_path / "out")
    assert (paths[99], paths[11]) == ([], ["Food", "Bread"])


@pytest.mark.parametrize(
    ("recs", "srcs", "items", "message"),
    [
        ([rec(1, "abc", START)], [], [], r"rec_inter\.csv:item_id:row 20: must be an integer, got 'abc'"),
        (["1,2,3"], [], [], r"rec_inter\.csv:row 20: 3 columns where the header has 12"),
        (
            [],
            [src(1, 10, START), src(1, 10, START, keyword="[red]")],
            [],
            r"src_inter\.csv:keyword:row 3: must be a list of integers .* got '\[red\]'",
        ),
        (
            [],
            [src(1, 10, START, keyword='"[1.5, 2]"')],
            [],
            r"src_inter\.csv:keyword:row 2: must be a list of integers",
        ),
        (
            [],
            [src(1, 10, START, keyword="[1234567890123456789]")],
            [],
            r"src_inter\.csv:keyword:row 2: must be a list of integers",
        ),
        (
            [],
            [src(1, 10, START, keyword='"[7, 9]')],
            [],
            r"src_inter\.csv:row 2: Value with unterminated quote found\. Correct or remove",
        ),
        (
            [],
            [src(1, 10, START, clicks="True")],
            [],
            r'src_inter\.csv:click_cnt:row 2: Could not convert string "True"',
        ),
        (
            [rec(1, 10, "2023-05-22 00:00:00")],
            [],
            [],
            r"rec_inter\.csv:timestamp:row 20: must be an integer, got '2023-05-22 00:00:00'",
        ),
        *(
            (
                [rec(1, 10, time)],
                [],
                [],
                rf"rec_inter\.csv:timestamp:row 20: must be .* integer, got '{time}'",
            )
            for time in ("1e30", "inf", "1.6846848e12", f"{START}.7")
        ),
        (
            [],
            [src(1, 10, START), src(1, 10, "1.68468E12")],
            [],
            r"src_inter\.csv:search_session_timestamp:row 3: must be an integer, got '1.68468E12'",
        ),
        ([rec(1, 10, START) + ",1"], [], [], r"rec_inter\.csv:row 20: 13 columns where the header has 12"),
        (
            [rec(1, 77, START)],
            [],
            [item(77, caption="red")],
            r"item_features\.csv:caption:row 8: must be a list of integers .* got 'red'",
        ),
        ([rec(1, 10.5, START)], [], [], r"rec_inter\.csv:item_id:row 20: must be an integer, got '10.5'"),
        ([rec("3.5", 10, START)], [], [], r"rec_inter\.csv:user_id:row 20: must be an integer, got '3.5'"),
        (
            [rec(1, "1E+18", START)],
            [],
            [],
            r"rec_inter\.csv:item_id:row 20: must be an integer, got '1E\+18'",
        ),
        *(
            (
                [],
                [src(user, 10, START)],
                [],
                rf"src_inter\.csv:user_id:row 2: must be an integer, got '{user}'",
            )
            for user in ("0x1F", "1_0", "0b11")
        ),
        (
            [rec(1, 10, START), rec(2**63 - 1, " +10\t", START), rec(1, 2**63, START)],
            [],
            [],
            rf"rec_inter\.csv:item_id:row 22: must be an integer, got '{2**63}'",
        ),
        ([rec(1, 10, START, 0.5)], [], [], r"rec_inter\.csv:click:row 20: must be an integer, got '0.5'"),
        (
            [],
            [src(1, 10, START, clicks=1.5)],
            [],
            r"src_inter\.csv:click_cnt:row 2: must be an integer, got '1.5'",
        ),
        (
            [rec(1, 77, START)],
            [],
            [item(77, caption='"[1.5, 2]"')],
            r"item_features\.csv:caption:row 8: must be a list of integers .* got '\[1\.5, 2\]'",
        ),
        ([], [], [item("10.5")], r"item_features\.csv:item_id:row 8: must be an integer, got '10.5'"),
        ([], [], [item("x1")], r"item_features\.csv:item_id:row 8: must be an integer, got 'x1'"),
    ],
)
def test_wrong_values_are_named(
    tmp_path: Path, recs: list[str], srcs: list[str], items: list[str], message: str
) -> None:
    raw = write_world(tmp_path / "raw", recs, srcs, items)
    with pytest.raises(DataError, match=message):
        prepare("kuaisar", raw, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_times_in_every_writing(tmp_path: Path) -> None:
    written = [
        "1683648000000.0",
        '"1683648000001"',
        '"1683648000002.00"',
        " 1683648000003 ",
        "1683648000004.",
    ]
    too_early, too_late = ["0", "-5", "28800000.0", "1683648000"], [f"{START}000"]
    rows = [*written, *too_early, *too_late]
    raw = write_world(
        tmp_path / "raw", [rec(1, 10, time) for time in rows], [src(1, 11, time) for time in rows], []
    )
    dropped = prepare("kuaisar", raw, tmp_path / "out", SETTINGS).raw["dropped"]
    times = [1_683_648_000_000 + number for number in range(5)]
    events = [event for event in read_back(tmp_path / "out")["train"] if event["time"] <= max(times)]
    assert sorted((event["time"], event["item"], event["task"]) for event in events) == [
        (time, *what) for time in times for what in ((10, "rec"), (11, "src"))
    ]
    assert dropped == {
        f"{file}_inter.csv: time {reason}": count
        for file in ("rec", "src")
        for reason, count in (
            ("before 1971 (in seconds? it must be ms)", 4),
            ("after 2099 (in microseconds? it must be ms)", 1),
        )
    }


def test_lists_in_every_writing(tmp_path: Path) -> None:
    written = {
        '"[1, 2]"': "1 2",
        '"[1,2]"': "1 2",
        '"[ 1 , 2 ]"': "1 2",
        '" [1, 2] "': "1 2",
        '"1 2"': "1 2",
        '"[1, ]"': "1",
        "[1]": "1",
        "1": "1",
    }
    written |= dict.fromkeys(["[]", '"[]"', '"[ ]"', "", '""', "NaN", "nan", "null"], "")
    items = [item(100 + number, caption, ("empty",) * 4) for number, caption in enumerate(written)]
    recs = [rec(2, 100 + number, START + 50) for number in range(len(written))]
    srcs = [src(1, 100 + number, START + number, keyword) for number, keyword in enumerate(written)]
    manifest = prepare(
        "kuaisar", write_world(tmp_path / "raw", recs, srcs, items), tmp_path / "out", SETTINGS
    )
    assert manifest.raw["dropped"] == {"src_inter.csv: no keyword": 8}
    asked = {
        event["item"]: event["query"]
        for event in read_back(tmp_path / "out")["train"]
        if event["task"] == "src"
    }
    assert asked == {100 + number: words for number, words in enumerate(written.values()) if words}
    texts = {
        row["item_id"]: row
        for row in pq.read_table(tmp_path / "out" / "catalog" / "items.parquet").to_pylist()
    }
    for number, words in enumerate(written.values()):
        assert (texts[100 + number]["text"], texts[100 + number]["category"]) == (words, None), (
            "without categories, the caption is all of the text"
        )


def test_one_millisecond_holds_several_interactions(tmp_path: Path) -> None:
    """They share one history, and none of them is in it; all are in that of the next event, an item of both
    tasks once, as a search."""
    at, recs = START + 9, [rec(1, 10, START + 9), rec(1, 11, START + 9), rec(1, 12, START + 9, click=0)]
    raw = write_world(tmp_path / "raw", [*recs, rec(1, 12, at + 1)], [src(1, 10, at), src(1, 12, at)], [])
    prepare("kuaisar", raw, tmp_path / "out", SETTINGS)
    mine = [event for event in read_back(tmp_path / "out")["train"] if event["user"] == 1]
    before = [event["history"] for event in mine if event["time"] == at]
    assert len(before) == 4
    assert all(sorted(history) == [(10, "rec"), (11, "rec"), (12, "rec")] for history in before), (
        "the clicks of the moment before"
    )
    (after,) = [event["history"] for event in mine if event["time"] == at + 1]
    assert sorted(after[3:]) == [(10, "src"), (11, "rec"), (12, "src")]


def rewrite(raw: Path, name: str, change: Callable[[list[str]], list[str]]) -> None:
    lines = (raw / f"{name}.csv").read_text().splitlines()
    (raw / f"{name}.csv").write_text("\n".join(change(lines)) + "\n")


def test_columns_in_another_order_and_further_ones_change_nothing(tmp_path: Path) -> None:
    hashes = []
    for form in ("plain", "turned", "more", "index"):
        raw = write_world(
            tmp_path / form, [rec(1, 99, START + 7)], [src(1, 11, START + 9, keyword="[7]")], []
        )
        for name in ("rec_inter", "item_features") if form != "plain" else ():
            split = csv_rows if form == "turned" else (lambda lines: [[line] for line in lines])
            rows = split((raw / f"{name}.csv").read_text().splitlines())
            if form == "turned":
                rows = [row[::-1] for row in rows]
            elif form == "more":  # names that mean something inside the program
                rows = [
                    [*row, *(["id", "key", "text", "words", "problem", "query"] if number == 0 else "123456")]
                    for number, row in enumerate(rows)
                ]
            else:  # what pandas writes unless told not to
                rows = [["" if number == 0 else str(number), *row] for number, row in enumerate(rows)]
            rewrite(raw, name, lambda _, rows=rows: [",".join(row) for row in rows])  # type: ignore[misc]
        manifest = prepare("kuaisar", raw, tmp_path / f"{form}-out", SETTINGS)
        hashes.append((manifest.raw["shards"], manifest.raw["catalog"]))
    assert hashes[1:] == hashes[:1] * 3


def csv_rows(lines: list[str]) -> list[list[str]]:
    return [[f'"{cell}"' if "," in cell else cell for cell in row] for row in csv.reader(lines)]


def test_broken_files_are_named(tmp_path: Path) -> None:
    def refused(match: str, name: str, change: Callable[[list[str]], list[str]]) -> None:
        raw = write_world(tmp_path / f"raw{len(match)}", [], [src(1, 11, START + 9)], [])
        rewrite(raw, name, change)
        with pytest.raises(DataError, match=match):
            prepare("kuaisar", raw, tmp_path / "out", SETTINGS)

    refused(
        r"column user_id is there 2 times",
        "rec_inter",
        lambda lines: [lines[0].replace("playing_time", "user_id"), *lines[1:]],
    )
    refused(
        r"row 3: ends with LF or CRLF, and row 1 with the other",
        "rec_inter",
        lambda lines: [*lines[:2], lines[2] + "\r", *lines[3:]],
    )
    refused(
        r"src_inter\.csv:row 1: ends with CR CR LF",
        "src_inter",
        lambda lines: ["\r\r\n".join([*lines, ""]).removesuffix("\n")],
    )
    refused(r"src_inter\.csv: empty file; expected a header line", "src_inter", lambda lines: [])
    refused(
        r"columns user_id, item_id, .* are missing\. Found: user_id;item_id.* separated by ';': write commas",
        "rec_inter",
        lambda lines: [line.replace(",", ";") for line in lines],
    )


def test_files_of_two_data_sets_are_not_mixed(tmp_path: Path) -> None:
    raw, settings = tmp_path / "two", load_prepare_settings("kuaisar")
    raw.mkdir()
    write_world(raw / "KuaiSAR", [], [src(1, 11, START + 9)], [])
    assert open_source("kuaisar", raw, settings).files[1] == raw / "KuaiSAR" / "src_inter.csv"
    write_world(raw / "KuaiSAR_v2", [], [src(1, 11, START + 9)], [])
    (raw / "KuaiSAR" / "src_inter.csv").unlink()
    with pytest.raises(DataError, match=r"two holds KuaiSAR and KuaiSAR_v2\. Name one as RAW"):
        open_source("kuaisar", raw, settings)
    with pytest.raises(DataError, match=r"KuaiSAR/src_inter\.csv: no such file"):
        open_source("kuaisar", raw / "KuaiSAR", settings)


def test_of_repeated_item_rows_one_with_a_text_counts(tmp_path: Path) -> None:
    blank = item(10, '""', ("empty",) * 4)
    raw = write_world(tmp_path / "raw", [], [], [blank])
    prepare("kuaisar", raw, tmp_path / "out", SETTINGS)
    rows = pq.read_table(tmp_path / "out" / "catalog" / "items.parquet").to_pylist()
    assert {row["text"] for row in rows} == {"Food Bread 5 7"}
    assert {row["category"] for row in rows} == {"Food > Bread"}


def test_a_log_without_searches_and_blank_lines(tmp_path: Path) -> None:
    raw = write_world(tmp_path / "raw", ["", ""], [], [""])
    manifest = prepare("kuaisar", raw, tmp_path / "out", SETTINGS)
    assert manifest.raw["dropped"] == {}
    assert (manifest.raw["counts"]["raw"]["rec"], manifest.raw["counts"]["raw"]["src"]) == (18, 0)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    raw = write_world(tmp_path / "raw", [], [], [])
    text = (raw / "rec_inter.csv").read_text()
    (raw / "rec_inter.csv").write_text(text.replace("timestamp", "stamp", 1))
    with pytest.raises(DataError, match=r"rec_inter\.csv: column timestamp is missing\. Found: user_id"):
        prepare("kuaisar", raw, tmp_path / "out", SETTINGS)


def test_the_last_day_is_a_day_in_beijing(tmp_path: Path) -> None:
    late = START + 2 * DAY - 1000  # 23:59:59 in Beijing, the day before the last; 15:59:59 UTC
    manifest = prepare(
        "kuaisar", write_world(tmp_path / "raw", [rec(1, 10, late)], [], []), tmp_path / "out", SETTINGS
    )
    assert manifest.raw["split"]["boundaries"]["test_from"]["ms"] == START + 2 * DAY
    assert late in {event["time"] for event in read_back(tmp_path / "out")["valid"]}


def test_users_with_one_behaviour_leave_by_default(tmp_path: Path) -> None:
    srcs = [src(1, number, START + day * DAY + 5) for day in range(3) for number in (10, 11, 12)]
    raw = write_world(tmp_path / "raw", [], srcs, [])
    # user 2 only has recommendations, so 3 items are left, all of them clicked by user 1
    with pytest.raises(DataError, match="all but 0 of 3 items"):
        prepare("kuaisar", raw, tmp_path / "out", ["num_negatives=1", "vocab_size=300"])


@pytest.mark.parametrize(
    ("mode", "num_words", "query_has_tokens"), [("auto", 2, False), ("digits", 0, True), ("drop", 0, False)]
)
def test_anonymised_words_have_three_ways(
    tmp_path: Path, mode: str, num_words: int, query_has_tokens: bool
) -> None:
    import numpy as np

    # a test query: its words are in no vocabulary
    later = src(1, 10, START + 2 * DAY + 9, keyword='"[7, 1234]"')
    raw = write_world(tmp_path / "raw", [], [src(1, 11, START + 9, keyword="[7]"), later], [])
    manifest = prepare("kuaisar", raw, tmp_path / "out", [*SETTINGS, f"words={mode}"])
    catalog = tmp_path / "out" / "catalog"
    assert manifest.num_words == num_words
    assert (np.load(catalog / "query_tokens-000000.npy") > 0).any() == query_has_tokens
    assert (catalog / "item_words-000000.npy").exists() == (num_words > 0)
    queries = pq.read_table(catalog / "queries.parquet")["text"].to_pylist()
    assert sorted(queries) == ["7", "7 1234"]
    if num_words:
        assert np.load(catalog / "words.npy").tolist() == [5, 7]
        assert np.load(catalog / "item_words-000000.npy")[:, :3].tolist() == [[1, 2, 0]] * 6
        assert np.load(catalog / "query_words-000000.npy")[:, :2].tolist() == [[2, 0], [2, 0]]


def test_simulated_logs_are_read_and_counts_stand_beside_the_published_ones(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from data_shards.simulate import simulate
    from trainer.cli import app

    simulate(tmp_path / "raw", users=60, items=300, days=6, seed=0)
    command = [
        "prepare",
        "kuaisar",
        str(tmp_path / "raw"),
        str(tmp_path / "out"),
        "min_interactions=2",
        "num_negatives=20",
        "vocab_size=300",
    ]
    for shown in (
        CliRunner().invoke(app, command, catch_exceptions=False),
        CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]),
    ):
        for line in (
            r"published: KuaiSAR +25,877 +6,890,707 +453,667 +14,605,716 +5,059,169",
            r"published: KuaiSAR-small +25,877 +4,195,529 +267,608 +7,493,101 +3,171,231",
            r"published: KuaiSAR-small after UniSAR's filter +22,700 +673,415",
            r"here, raw rows +60 ",
            r"[0-9]+  src_inter\.csv: result of type USER",
        ):
            assert re.search(line, shown.stdout), line
    checks = read_manifest(tmp_path / "out").raw["leak_checks"]
    assert all(check["violations"] == 0 and check["checked"] > 0 for check in checks.values()), checks


def test_one_query_in_three_writings_is_one_query(tmp_path: Path) -> None:
    writings = ['"[7, 9]"', '"[7,9]"', "7 9", '"[ 7 ,9 ]"', '"[7, 10]"']
    srcs = [src(1, 11, START + number, keyword=text) for number, text in enumerate(writings)]
    manifest = prepare("kuaisar", write_world(tmp_path / "raw", [], srcs, []), tmp_path / "out", SETTINGS)
    assert manifest.num_queries == manifest.raw["counts"]["raw"]["queries"] == 2


def test_whole_numbers_written_with_a_point_are_integers(tmp_path: Path) -> None:
    def prepared(name: str, *number: Callable[[int], object]) -> str:
        user, clicked = (number * 2)[:2]
        recs = [rec(user(1), clicked(10), START + 5, clicked(1))]
        srcs = [src(user(1), clicked(11), START + 9, clicks=clicked(1))]
        raw = write_world(tmp_path / name, recs, srcs, [item(clicked(99))])
        return prepare("kuaisar", raw, tmp_path / f"{name}-out", SETTINGS).fingerprint

    assert prepared("plain", str) == prepared("points", lambda number: f"{number}.0")


def test_ids_of_any_64_bits_are_kept(tmp_path: Path) -> None:
    large = 2**63 - 5
    raw = write_world(tmp_path / "raw", [rec(1, large + number, START) for number in range(3)], [], [])
    prepare("kuaisar", raw, tmp_path / "out", SETTINGS)
    found = pq.read_table(tmp_path / "out" / "catalog" / "items.parquet")["item_id"].to_pylist()
    assert {large, large + 1, large + 2} <= set(found)


@pytest.mark.parametrize("task", ["rec", "src"])
def test_logs_of_one_task_alone(tmp_path: Path, task: str) -> None:
    raw = write_world(tmp_path / "raw", [], [], [])
    if task == "src":
        searches = [
            src(user, number, START + day * DAY + user)
            for user in (1, 2)
            for day in range(3)
            for number in range(10 * user, 10 * user + 3)
        ]
        (raw / "src_inter.csv").write_text("\n".join([SRC, *searches]) + "\n")
        (raw / "rec_inter.csv").write_text(REC + "\n")
    prepare("kuaisar", raw, tmp_path / "out", SETTINGS)
    facts = inspect(tmp_path / "out")
    other = {"rec": "src", "src": "rec"}[task]
    assert [facts["splits"][split][other] for split in ("train", "valid", "test")] == [0, 0, 0]
    assert facts["splits"]["test"][task] == 6 and describe(facts)


def test_one_click_in_a_far_year_is_named(tmp_path: Path) -> None:
    raw = write_world(tmp_path / "raw", [rec(1, 10, START + 3000 * DAY)], [], [])
    days = r"last day of the log is 2031-08-08 \(1 of 19 clicks\), the one before it 2023-05-24 \(6 of 19"
    with pytest.raises(DataError, match=days):
        prepare("kuaisar", raw, tmp_path / "out", SETTINGS)
