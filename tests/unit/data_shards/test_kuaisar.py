"""The KuaiSAR reader against every oddity of its files."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_shards.errors import DataError
from data_shards.prepare import prepare
from tests.unit.data_shards.test_reference import read_back

DAY = 86_400_000
START = 1_684_684_800_000  # midnight in Beijing, 2023-05-22
REC = "user_id,item_id,playing_time,duration_ms,time,timestamp,click,forward,like,follow,search,search_item_related"
SRC = "user_id,search_session_id,search_session_time,search_session_timestamp,keyword,search_source,item_id,click_cnt,item_type"
LEVELS = [f"{level}_level_category_{part}" for level in ("first", "second", "third", "fourth") for part in ("id", "name", "name_en")]
ITEMS = ",".join(["item_id", "caption", "author_id", "item_type", "upload_time", "upload_type", *LEVELS])
SETTINGS = ("min_interactions=1", "both_behaviours=false", "num_negatives=2", "vocab_size=300")


def rec(user: object, item: object, timestamp: object, click: object = 1) -> str:
    return f"{user},{item},1.0,2.0,2023-05-22 12:28:56,{timestamp},{click},0,0,0,0,0"


def src(user: object, item: object, timestamp: object, keyword: str = '"[7, 9]"', clicks: object = 1, kind: str = "VIDEO") -> str:
    return f"{user},1,2023-05-22 21:14:51,{timestamp},{keyword},USER_INPUT,{item},{clicks},{kind}"


def item(number: object, caption: str = '"[5, 7]"', names: tuple[str, ...] = ("Food", "Bread", "empty", "empty")) -> str:
    return ",".join([str(number), caption, "1", "NORMAL", "2023-01-01", "Short", *(f"1,某,{name}" for name in names)])


def write_world(folder: Path, recs: list[str], srcs: list[str], items: list[str], newline: str = "\n", mark: bool = False) -> Path:
    folder.mkdir()
    base = [rec(user, number, START + day * DAY + user) for user in (1, 2) for day in range(3) for number in range(10 * user, 10 * user + 3)]
    known = [item(number) for number in [*range(10, 13), *range(20, 23)]]
    for name, header, lines in (("rec_inter", REC, base + recs), ("src_inter", SRC, srcs), ("item_features", ITEMS, known + items)):
        text = newline.join([header, *lines]) + newline
        (folder / f"{name}.csv").write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
    return folder


def test_rows_that_cannot_be_used_are_counted_by_file_and_reason(tmp_path: Path) -> None:
    recs = [
        rec(1, 10, f"{START + 5}.0"), rec("", 10, START), rec(1, "nan", START), rec(1, 10, "NaN"), rec(1, 10, START, ""), rec(1, 10, 0),
        rec(1, 10, 1684713600),
        rec(2, 20, START + 7), rec(2, 20, START + 7), rec(2, 99, START + 7),
    ]  # fmt: skip
    srcs = [
        src(1, 11, START + 9), src(1, 12, START + 9, clicks=0), src(1, 555, START, kind="USER"),
        src(1, 556, START, kind="LIVE"), src(1, 557, START, kind="LIVE"),
        src(1, 21, START + 10, keyword="[7]"), src(1, 21, START, keyword="[]"), src(1, 21, START, keyword=""),
        src(1, 22, START + 11, kind="IMAGE_ATLAS"),
    ]  # fmt: skip
    raw = write_world(tmp_path / "raw", recs, srcs, [item(10, caption="[1]")], newline="\r\n", mark=True)
    manifest = prepare("kuaisar", raw, tmp_path / "out", SETTINGS)
    early = "time before 1971 (in seconds? it must be ms)"
    assert manifest.raw["dropped"] == {
        "rec_inter.csv: no user_id": 1, "rec_inter.csv: no item_id": 1, "rec_inter.csv: no timestamp": 1, "rec_inter.csv: no click": 1,
        f"rec_inter.csv: {early}": 2, "src_inter.csv: result of type USER": 1, "src_inter.csv: result of type LIVE": 2,
        "src_inter.csv: no keyword": 2,
        "duplicate click": 1, "repeated item row": 1,
    }  # fmt: skip
    assert manifest.raw["published"]["KuaiSAR"]["items"] == 6_890_707
    events = read_back(tmp_path / "out")["train"]
    searches = {(event["item"], event["query"]) for event in events if event["task"] == "src"}
    assert searches == {(11, "7 9"), (21, "7"), (22, "7 9")}
    assert [event["impressions"] for event in events if event["item"] == 11 and event["task"] == "src"] == [[12]]
    assert (1, 10, START + 5) in {(event["user"], event["item"], event["time"]) for event in events}, "a float time"
    texts = {row["item_id"]: row for row in pq.read_table(tmp_path / "out" / "catalog" / "items.parquet").to_pylist()}
    assert (texts[99]["text"], texts[99]["category"]) == ("", None), "clicked, without features"
    assert (texts[11]["text"], texts[11]["category"]) == ("Food Bread 5 7", "Food > Bread"), "English category names, then the caption"


@pytest.mark.parametrize(
    ("recs", "srcs", "items", "message"),
    [
        ([rec(1, "abc", START)], [], [], r'rec_inter\.csv:item_id:row 20: Could not convert string "abc"'),
        (["1,2,3"], [], [], r"rec_inter\.csv:row 20: 3 columns where the header has 12"),
        (
            [],
            [src(1, 10, START), src(1, 10, START, keyword="[red]")],
            [],
            r"src_inter\.csv:keyword:row 3: must be a list of integers .* got '\[red\]'",
        ),
        ([rec(1, 77, START)], [], [item(77, caption="red")], r"words of an item must be a list of integers, got red"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, recs: list[str], srcs: list[str], items: list[str], message: str) -> None:
    raw = write_world(tmp_path / "raw", recs, srcs, items)
    with pytest.raises(DataError, match=message):
        prepare("kuaisar", raw, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    raw = write_world(tmp_path / "raw", [], [], [])
    text = (raw / "rec_inter.csv").read_text()
    (raw / "rec_inter.csv").write_text(text.replace("timestamp", "stamp", 1))
    with pytest.raises(DataError, match=r"rec_inter\.csv: column timestamp is missing\. Found: user_id"):
        prepare("kuaisar", raw, tmp_path / "out", SETTINGS)


def test_the_last_day_is_a_day_in_beijing(tmp_path: Path) -> None:
    late = START + 2 * DAY - 1000  # 23:59:59 in Beijing, the day before the last; 15:59:59 UTC
    manifest = prepare("kuaisar", write_world(tmp_path / "raw", [rec(1, 10, late)], [], []), tmp_path / "out", SETTINGS)
    assert manifest.raw["split"]["boundaries"]["test_from"]["ms"] == START + 2 * DAY
    assert late in {event["time"] for event in read_back(tmp_path / "out")["valid"]}


def test_users_with_one_behaviour_leave_by_default(tmp_path: Path) -> None:
    srcs = [src(1, number, START + day * DAY + 5) for day in range(3) for number in (10, 11, 12)]
    raw = write_world(tmp_path / "raw", [], srcs, [])
    # user 2 only has recommendations, so 3 items are left, all of them clicked by user 1
    with pytest.raises(DataError, match="all but 0 of 3 items"):
        prepare("kuaisar", raw, tmp_path / "out", ["num_negatives=1", "vocab_size=300"])


@pytest.mark.parametrize(("mode", "num_words", "query_has_tokens"), [("auto", 2, False), ("digits", 0, True), ("drop", 0, False)])
def test_anonymised_words_have_three_ways(tmp_path: Path, mode: str, num_words: int, query_has_tokens: bool) -> None:
    import numpy as np

    later = src(1, 10, START + 2 * DAY + 9, keyword='"[7, 1234]"')  # a test query: its words are in no vocabulary
    raw = write_world(tmp_path / "raw", [], [src(1, 11, START + 9, keyword="[7]"), later], [])
    manifest = prepare("kuaisar", raw, tmp_path / "out", [*SETTINGS, f"words={mode}"])
    catalog = tmp_path / "out" / "catalog"
    assert manifest.num_words == num_words
    assert (np.load(catalog / "query_tokens.npy") > 0).any() == query_has_tokens
    assert (catalog / "item_words.npy").exists() == (num_words > 0)
    queries = pq.read_table(catalog / "queries.parquet")["text"].to_pylist()
    assert sorted(queries) == ["7", "7 1234"]
    if num_words:
        assert np.load(catalog / "words.npy").tolist() == [5, 7]
        assert np.load(catalog / "item_words.npy")[:, :3].tolist() == [[1, 2, 0]] * 6
        assert np.load(catalog / "query_words.npy")[:, :2].tolist() == [[2, 0], [2, 0]]


def test_simulated_logs_are_read(tmp_path: Path) -> None:
    from data_shards.simulate import simulate

    simulate(tmp_path / "raw", users=60, items=300, days=6, seed=0)
    manifest = prepare("kuaisar", tmp_path / "raw", tmp_path / "out", ["min_interactions=2", "num_negatives=20", "vocab_size=300"])
    assert all(check["violations"] == 0 and check["checked"] > 0 for check in manifest.raw["leak_checks"].values()), json.dumps(
        manifest.raw["leak_checks"]
    )
