"""The Amazon readers: both generations of the releases, and the pair made from them."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_shards.documents import storable
from data_shards.errors import DataError
from data_shards.inspect import count_table
from data_shards.prepare import prepare
from data_shards.sources.amazon import SEPARATORS, category_query, item_text
from tests.unit.data_shards.test_categories import paths_by_item
from tests.unit.data_shards.test_reference import read_back

SETTINGS = ("num_negatives=2", "vocab_size=300")
SHARED = Path(os.environ.get("GENSR_SHARED_DATA", "../shared/data"))


def write_lines(path: Path, lines: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def reviews() -> list[dict[str, Any]]:
    """Three users, five items each, one a day; the last two of user A on one day."""
    days = [1, 2, 3, 4, 4]
    return [
        {
            "reviewerID": user,
            "asin": f"B{start + number}",
            "overall": 5.0,
            "unixReviewTime": 1_400_000_000 + 86_400 * (days[number] if user == "A" else number),
        }
        for user, start in (("A", 0), ("B", 2), ("C", 4))
        for number in range(5)
    ]


def test_a_query_is_the_words_of_the_path_once_without_stop_words() -> None:
    assert (
        category_query(["Industrial & Scientific", "Tapes, Adhesives", "Tapes for the Lab"])
        == "industrial scientific tapes adhesives lab"
    )
    assert category_query(["Men's Books", "Self-Help"]) == "men's books self help"
    assert category_query([]) == ""
    assert SEPARATORS[","].split("Tools,Nuts, Bolts,Wing Nuts") == ["Tools", "Nuts, Bolts", "Wing Nuts"]


def test_the_text_is_the_path_below_the_root_and_the_title() -> None:
    assert item_text(["Root", "A", "B"], "T", "categories_title") == "A B T"
    assert item_text(["Root", "A", "B"], "T", "title_categories") == "T A B"
    assert item_text(["Root"], "T", "categories_title") == "T"


def test_the_pair_gives_two_events_a_purchase_in_list_order(tmp_path: Path) -> None:
    (tmp_path / "Tiny.inter.json").write_text(json.dumps({"0": [0, 1, 2, 3, 9], "1": [3, 4, 0], "2": [5, 1]}))
    items = {
        str(i): {"title": f"Title {i}", "brand": "B", "categories": "Root,Kind" if i else ""}
        for i in range(6)
    }
    (tmp_path / "Tiny.item.json").write_text(json.dumps(items))
    manifest = prepare("amazon", tmp_path, tmp_path / "out", SETTINGS)
    assert manifest.raw["dropped"] == {
        "item not in the metadata": 1,
        "search event of an item without a category path": 2,
    }
    assert (manifest.raw["source"]["paths"], manifest.raw["source"]["paths_of_one_item"]) == (1, 0)
    events = read_back(tmp_path / "out")
    assert {(e["user"], e["item"], e["task"], e["query"]) for e in events["test"]} == {
        (0, 3, "rec", None),
        (0, 3, "src", "root kind"),
        (1, 0, "rec", None),
    }, "user 2 has two moments only and just trains; item 0 has no path"
    assert {e["item"] for e in events["valid"]} == {2, 4}
    assert all(
        e["history"] == [(0, "rec"), (1, "src"), (2, "src")] for e in events["test"] if e["user"] == 0
    ), "a purchase is in a history once"
    texts = {
        row["item_id"]: row["text"]
        for row in pq.read_table(tmp_path / "out" / "catalog" / "items.parquet").to_pylist()
    }
    assert (texts[0], texts[1]) == ("Title 0", "Kind Title 1")


def test_no_query_belongs_to_one_item_alone(tmp_path: Path) -> None:
    paths = ["Root,A,B,C", "Root,A,B", "Root,A,D", "Root,A,D", "Root,E", "Root,F,F", "Rest,G", "Root,A,B,C"]
    bought = {"0": [0, 1, 2, 3, 4], "1": [5, 6, 4, 0, 1]}
    (tmp_path / "Tiny.inter.json").write_text(json.dumps(bought))
    (tmp_path / "Tiny.item.json").write_text(
        json.dumps({str(i): {"title": f"Title {i}", "categories": path} for i, path in enumerate(paths)})
    )
    queries, manifests = {}, {}
    for option in (1, 2):
        manifests[option] = prepare(
            "amazon", tmp_path, tmp_path / f"out{option}", [*SETTINGS, f"min_query_items={option}"]
        ).raw
        events = [event for split in read_back(tmp_path / f"out{option}").values() for event in split]
        queries[option] = {event["item"]: event["query"] for event in events if event["task"] == "src"}
    assert queries[1] == {
        0: "root b c",
        1: "root b",
        2: "root d",
        3: "root d",
        4: "root e",
        5: "root f",
        6: "rest g",
    }
    assert queries[2] == {0: "root b", 1: "root b", 2: "root d", 3: "root d", 4: "root", 5: "root"}, (
        "7 has the path of 0, but nobody bought it"
    )
    source = manifests[2]["source"]
    assert (
        source["paths_of_one_item"],
        source["items_with_shorter_query"],
        source["items_without_query"],
    ) == (5, 3, 1)
    assert manifests[2]["dropped"] == {"search event of an item that shares no query": 1}


def meta_2014(number: int) -> str:
    row = {
        "asin": f"B{number}",
        "title": f"It's item {number}",
        "categories": [["Kindle Store"], ["Kindle Store", "Books", "Kind &amp; Co"]],
    }
    return repr(row)  # a Python literal, no JSON


def meta_2018(number: int) -> str:
    return json.dumps(
        {
            "asin": f"B{number}",
            "title": f"It&#39;s <b>item</b> {number}",
            "category": ["Kindle Store", "Books", "Kind & Co"],
        }
    )


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (meta_2014, ("reviews_Kindle_5.json.gz", "meta_Kindle.json.gz")),
        (meta_2018, ("Kindle_5.json.gz", "meta_Kindle.json.gz")),
    ],
)
def test_both_generations_of_the_release(tmp_path: Path, form: Any, names: tuple[str, str]) -> None:
    spoilt = [{"reviewerID": "A", "asin": "B1"}, {"asin": "B1", "unixReviewTime": 1_400_000_000}]
    write_lines(tmp_path / names[0], [json.dumps(row) for row in reviews() + spoilt + reviews()[:1]])
    write_lines(
        tmp_path / names[1], [form(number) for number in [*range(12), 3]] + [json.dumps({"title": "no id"})]
    )
    manifest = prepare("amazon", tmp_path, tmp_path / "out", SETTINGS)
    assert manifest.raw["dropped"] == {
        "review without a time": 1,
        "review without a user or an item": 1,
        "metadata without an item": 1,
        "duplicate click": 2,
        "repeated item row": 1,
    }
    assert manifest.num_items == 9, "items that nobody bought are not in the catalogue"
    test = read_back(tmp_path / "out")["test"]
    assert {(e["user"], e["item"]) for e in test} == {("A", "B3"), ("A", "B4"), ("B", "B6"), ("C", "B8")}, (
        "all purchases of the last day"
    )
    assert {e["query"] for e in test} == {None, "kindle store books kind co"}
    assert all(len(e["history"]) == 3 for e in test if e["user"] == "A")
    texts = pq.read_table(tmp_path / "out" / "catalog" / "items.parquet").to_pylist()
    assert {row["text"] for row in texts} == {
        f"Books Kind & Co It's item {row['item_id'][1:]}" for row in texts
    }
    path = ["Kindle Store", "Books", "Kind & Co"]
    assert paths_by_item(tmp_path / "out") == {row["item_id"]: path for row in texts}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "Kindle_5.json.gz", [json.dumps(row) for row in reviews()])
    write_lines(tmp_path / "meta_Kindle.json.gz", [meta_2018(1), "{'asin': open('x')}"])
    with pytest.raises(DataError, match=r"meta_Kindle\.json\.gz:row 2: neither JSON nor a Python literal"):
        prepare("amazon", tmp_path, tmp_path / "out", SETTINGS)
    whole = (tmp_path / "Kindle_5.json.gz").read_bytes()
    write_lines(tmp_path / "meta_Kindle.json.gz", [meta_2018(1)])
    (tmp_path / "Kindle_5.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"Kindle_5\.json\.gz:row \d+: the file is damaged or cut off"):
        prepare("amazon", tmp_path, tmp_path / "out", SETTINGS)


def write_pair(folder: Path, categories: list[Any], histories: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    bought = histories or {str(user): [(user + n) % len(categories) for n in range(4)] for user in range(4)}
    items = {str(i): {"title": f"Title {i}", "categories": path} for i, path in enumerate(categories)}
    (folder / "X.inter.json").write_text(json.dumps(bought))
    (folder / "X.item.json").write_text(json.dumps(items))
    return folder


def categories_of(out: Path) -> list[Any]:
    rows = pq.read_table(out / "catalog" / "items.parquet").to_pylist()
    return [row["category"] for row in sorted(rows, key=lambda row: row["item_id"])]


@pytest.mark.parametrize(
    ("categories", "expected", "note"),
    [
        (
            [*["Office, Paper, Copy"] * 3, "Office, Pens", None],
            [*["Office > Paper > Copy"] * 3, "Office > Pens", None],
            "split at ', '; levels: 1 of 0, 1 of 2, 3 of 3",
        ),
        (["Tools,Nuts, Bolts"] * 4 + ["Nuts, Bolts"], ["Tools > Nuts, Bolts"] * 4 + ["Nuts, Bolts"], ""),
        (
            [*["Nuts, Bolts"], *["Tools > Nuts, Bolts"] * 4],
            [*["Nuts, Bolts"], *["Tools > Nuts, Bolts"] * 4],
            "split at ' > '; levels: 1 of 1, 4 of 2",
        ),
        (["Tools|Nuts, Bolts"] * 5, ["Tools > Nuts, Bolts"] * 5, "split at '|'; levels: 5 of 2"),
        (["Tools;Nuts"] * 5, ["Tools;Nuts"] * 5, "not split; levels: 5 of 1"),
        ([["Office", "Paper, Thin"]] * 4 + [[]], ["Office > Paper, Thin"] * 4 + [None], ""),
        ([None, "", [None], "A", ["A"]], [None, None, None, "A", "A"], "not split; levels: 3 of 0, 2 of 1"),
    ],
)  # fmt: skip
def test_category_paths_of_a_pair(
    tmp_path: Path, categories: list[Any], expected: list[Any], note: str
) -> None:
    manifest = prepare(
        "amazon",
        write_pair(tmp_path / "raw", categories),
        tmp_path / "out",
        ["num_negatives=1", "vocab_size=300"],
    )
    assert categories_of(tmp_path / "out") == expected
    said = [line for line in count_table(manifest.raw) if "categories were" in line]
    assert said == ([f"  categories were {note}"] if note else [])
    assert ("category_levels" in manifest.raw["source"]) == bool(note)


@pytest.mark.parametrize("wrong", [7, {"a": 1}, [1, 2], True, [["a"], "b"]])
def test_categories_of_a_wrong_type_are_named(tmp_path: Path, wrong: Any) -> None:
    raw = write_pair(tmp_path / "raw", ["A", "B", wrong])
    with pytest.raises(
        DataError, match=r"X\.item\.json:row 3 \(2\): categories must be text or a list of texts"
    ):
        prepare("amazon", raw, tmp_path / "out", SETTINGS)


def release(folder: Path, change: Any, change_meta: Any = None) -> Path:
    """The release of 2018 with changed records."""
    folder.mkdir()
    write_lines(folder / "Kindle_5.json.gz", [json.dumps(change(row)) for row in reviews()])
    metas = [(change_meta or change)(json.loads(meta_2018(number))) for number in range(12)]
    write_lines(folder / "meta_Kindle.json.gz", [json.dumps(meta) for meta in metas])
    return folder


def test_ids_as_numbers_and_times_as_text_are_the_same_log(tmp_path: Path) -> None:
    def numeric(row: dict[str, Any], kind: Any = int) -> dict[str, Any]:
        row["asin"] = kind(row["asin"].replace("B", "10000"))
        if "unixReviewTime" in row:
            row["unixReviewTime"] = kind(row["unixReviewTime"])
        return row

    as_numbers = release(tmp_path / "numbers", lambda row: numeric(row, int))
    as_text = release(tmp_path / "text", lambda row: numeric(row, str))
    first = prepare("amazon", as_numbers, tmp_path / "out1", SETTINGS)
    assert first.fingerprint == prepare("amazon", as_text, tmp_path / "out2", SETTINGS).fingerprint


def test_white_space_around_an_id_is_no_part_of_it(tmp_path: Path) -> None:
    def spaced(row: dict[str, Any]) -> dict[str, Any]:
        return row | {key: f" {row[key]}\t" for key in ("reviewerID", "asin") if key in row}

    plain = prepare("amazon", release(tmp_path / "plain", dict), tmp_path / "out1", SETTINGS)
    raw = release(tmp_path / "spaced", spaced, dict)
    with gzip.open(raw / "Kindle_5.json.gz", "at") as file:
        file.write(json.dumps({**reviews()[0], "reviewerID": " "}) + "\n")
    found = prepare("amazon", raw, tmp_path / "out2", SETTINGS)
    assert found.fingerprint == plain.fingerprint
    assert found.raw["dropped"]["review without a user or an item"] == 1
    kinds = ["Root,Kind"] * 10
    bought = {" 0": [" 0", "1 ", 2, 3], "1": [1, 2, 3, 4], "2": [2, 3, 4, 5], "3": [3, 4, 5, 6]}
    found = prepare("amazon", write_pair(tmp_path / "pair", kinds, bought), tmp_path / "out3", SETTINGS)
    plain = prepare("amazon", write_pair(tmp_path / "pair2", kinds), tmp_path / "out4", SETTINGS)
    assert found.fingerprint == plain.fingerprint
    twice = write_pair(tmp_path / "twice", kinds, bought | {"0": [1]})
    with pytest.raises(DataError, match=r"X\.inter\.json: two entries have the id '0' but for white space"):
        prepare("amazon", twice, tmp_path / "out5", SETTINGS)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("asin", ["B1"], r"Kindle_5\.json\.gz:row 1: asin must be text or an integer, got \['B1'\]"),
        ("asin", 1.5, r"asin must be text or an integer, got 1\.5"),
        ("asin", True, r"asin must be text or an integer, got True"),
        ("reviewerID", {"a": 1}, r"Kindle_5\.json\.gz:row 1: reviewerID must be text"),
        ("unixReviewTime", "soon", r"row 1: unixReviewTime must be seconds since 1970, got 'soon'"),
        ("unixReviewTime", [1], r"row 1: unixReviewTime must be seconds since 1970"),
        ("unixReviewTime", float("inf"), r"row 1: unixReviewTime must be seconds since 1970, got inf"),
        ("unixReviewTime", True, r"row 1: unixReviewTime must be seconds since 1970, got True"),
        ("unixReviewTime", 10**400, r"row 1: unixReviewTime must be seconds since 1970"),
    ],
)
def test_a_field_of_a_wrong_type_is_named(tmp_path: Path, field: str, value: Any, message: str) -> None:
    raw = release(tmp_path / "raw", lambda row: {**row, field: value}, lambda row: row)
    with pytest.raises(DataError, match=message):
        prepare("amazon", raw, tmp_path / "out", SETTINGS)


def test_a_time_in_milliseconds_is_counted(tmp_path: Path) -> None:
    raw = release(tmp_path / "raw", lambda row: row)
    rows = [*reviews(), {**reviews()[0], "unixReviewTime": 1_400_000_000_000}]
    write_lines(raw / "Kindle_5.json.gz", [json.dumps(row) for row in rows])
    dropped = prepare("amazon", raw, tmp_path / "out", SETTINGS).raw["dropped"]
    assert dropped["time after 2099 (in milliseconds? it must be seconds)"] == 1


def test_half_an_emoji_becomes_the_replacement_character(tmp_path: Path) -> None:
    def spoil(row: dict[str, Any]) -> dict[str, Any]:
        key = "reviewerID" if "reviewerID" in row else "title"
        return {
            **row,
            key: f"{row[key]}\ud83d",
            **({"category": ["Caf\ud83d", "x"]} if key == "title" else {}),
        }

    prepare("amazon", release(tmp_path / "raw", spoil), tmp_path / "out", SETTINGS)
    catalog = tmp_path / "out" / "catalog"
    assert all("\ufffd" in user for user in pq.read_table(catalog / "users.parquet")["user_id"].to_pylist())
    items = pq.read_table(catalog / "items.parquet").to_pylist()
    assert all(row["text"].endswith("\ufffd") and row["category"] == "Caf\ufffd > x" for row in items)


def test_both_halves_of_an_emoji_are_one_character() -> None:
    assert storable("a\ud83d\ude00b") == "a\U0001f600b"
    assert storable("\ude00\ud83d") == "\ufffd\ufffd"
    assert storable("é") == "é"


@pytest.mark.parametrize("line", ["[" * 100_000, "{'a': " + "(" * 5000, "{{1}: 2}", "{[1]: 2}"])
def test_a_line_that_cannot_be_parsed_is_no_crash(tmp_path: Path, line: str) -> None:
    raw = release(tmp_path / "raw", lambda row: row)
    write_lines(raw / "meta_Kindle.json.gz", [line])
    with pytest.raises(DataError, match=r"meta_Kindle\.json\.gz:row 1: neither JSON nor a Python literal"):
        prepare("amazon", raw, tmp_path / "out", SETTINGS)


@pytest.mark.skipif(
    not (SHARED / "amazon_scientific").is_dir(), reason="no GENSR_SHARED_DATA/amazon_scientific"
)
def test_scientific_has_its_known_counts(tmp_path: Path) -> None:
    manifest = prepare("amazon", SHARED / "amazon_scientific", tmp_path / "out", ["vocab_size=500"])
    counts = manifest.raw["counts"]
    assert (counts["users"], counts["items"]) == (8_317, 4_344)
    assert sum(counts[split]["rec"] for split in ("train", "valid", "test")) == 58_492
    assert counts["test"]["rec"] == counts["valid"]["rec"] == 8_317


@pytest.mark.skipif(
    not (SHARED / "amazon_giftcards_raw").is_dir(), reason="no GENSR_SHARED_DATA/amazon_giftcards_raw"
)
def test_gift_cards_are_read(tmp_path: Path) -> None:
    manifest = prepare(
        "amazon", SHARED / "amazon_giftcards_raw", tmp_path / "out", ["num_negatives=50", "vocab_size=500"]
    )
    assert (manifest.num_users, manifest.num_items, manifest.raw["counts"]["raw"]["rec"]) == (458, 148, 2_972)
