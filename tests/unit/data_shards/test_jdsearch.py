"""The JDsearch reader on a written example and on the published sample."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_shards.errors import DataError
from data_shards.prepare import prepare
from tests.unit.data_shards.test_reference import read_back

SHARED = Path(os.environ.get("GENSR_SHARED_DATA", "../shared/data"))
HEADER = (
    "query\tcandidate_wid_list\tcandidate_label_list\thistory_qry_list\thistory_wid_list\thistory_type_list\t"
    "history_time_list\n"
)
PRODUCTS = (
    "wid\tname\tbrand_id\tbrand_name\tcate_id_1\tcate_name_1\tcate_id_2\tcate_name_2\tcate_id_3\tcate_name_3\t"
    "cate_id_4\tcate_name_4\tshop_id\n"
)
SETTINGS = ("num_negatives=1", "vocab_size=300")


def write_example(folder: Path, line: str) -> Path:
    (folder / "user_behavior_data.txt").write_text(HEADER + line + "\n")
    products = [
        f"{wid}\t1\x182\x18{wid}\t5\t6\t7\t70\t8\t80\t9\t90\t10\t100\t3\n"
        for wid in (456, 457, 789, 889, 256)
    ]
    (folder / "product_meta_data.txt").write_text(PRODUCTS + "".join(products))
    return folder


def test_the_example_of_its_authors(tmp_path: Path) -> None:
    line = (
        "12\x1832\x1856\t456_457_789\t3.0_0.0_0.0\t"
        "323\x18328\x18196_-1_12\x1854\t889_256_345\tORD_CLICK_CART\t0_12_4_5"
    )
    write_example(tmp_path, line + "\n" + "7\t457_789\t0.0_1.0\t-1_-1\t457_789\tCLICK_CLICK\t0_1_1")
    prepare("jdsearch", tmp_path, tmp_path / "out", SETTINGS)
    events = read_back(tmp_path / "out")
    mine = {
        split: [(e["item"], e["task"], e["query"], e["time"]) for e in events[split] if e["user"] == 1]
        for split in events
    }
    assert mine["test"] == [(456, "src", "12 32 56", 21)]
    assert mine["valid"] == [(345, "src", "12 54", 16)]
    assert sorted(mine["train"]) == [(256, "rec", None, 12), (889, "src", "323 328 196", 0)]
    test = next(e for e in events["test"] if e["user"] == 1)
    assert test["history"] == [(889, "src"), (256, "rec"), (345, "src")]
    assert test["history_queries"] == ["323 328 196", None, "12 54"]
    catalog = tmp_path / "out" / "catalog"
    ids = {row["id"]: row["name"] for row in pq.read_table(catalog / "categories.parquet").to_pylist()}
    assert ids == {1: "7", 2: "8", 3: "9", 4: "10"}, "cate_id_1 … 4"
    of_item = zip(
        pq.read_table(catalog / "items.parquet")["item_id"].to_pylist(),
        np.load(catalog / "item_category-000000.npy").tolist(),
        strict=True,
    )
    assert {item: row for item, row in of_item if item in (456, 345)} == {456: [1, 2, 3, 4], 345: [0] * 4}


def test_lists_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_example(tmp_path, "12\t456\t1.0\t-1_-1\t889_256\tORD_CLICK\t0_12")
    with pytest.raises(
        DataError,
        match=r"user_behavior_data\.txt:row 2: lists of different lengths: 2 items, 2 queries, 2 intervals",
    ):
        prepare("jdsearch", tmp_path, tmp_path / "out", SETTINGS)


@pytest.mark.skipif(not (SHARED / "jdsearch_sample").is_dir(), reason="no GENSR_SHARED_DATA/jdsearch_sample")
def test_the_published_sample_is_read(tmp_path: Path) -> None:
    manifest = prepare(
        "jdsearch", SHARED / "jdsearch_sample", tmp_path / "out", ["num_negatives=20", "vocab_size=300"]
    )
    assert manifest.num_users == 3
    assert manifest.num_words > 100


GOOD = "12\x1832\t456_457\t1_0\t-1_12\t889_256\tORD_CLICK\t0_12_4"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("12\x1832", "red", r"user_behavior_data\.txt:row 2: a query must be integers, got 'red'"),
        ("1_0", "0.5_0", r"user_behavior_data\.txt:row 2: a label must be an integer, got '0\.5'"),
        ("0_12_4", "0_inf_4", r"user_behavior_data\.txt:row 2: intervals must be numbers"),
        ("0_12_4", "0_-12_4", r"user_behavior_data\.txt:row 2: an interval must not be negative, got '-12'"),
        ("889_256", "889_2.5", r"user_behavior_data\.txt:row 2: invalid literal"),
        ("889_256", f"889_{2**63}", r"user_behavior_data\.txt:row 2: an item id must fit 64 bits"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_example(tmp_path, GOOD.replace(old, new))
    with pytest.raises(DataError, match=message):
        prepare("jdsearch", tmp_path, tmp_path / "out", SETTINGS)


def test_products_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_example(tmp_path, GOOD)
    products = tmp_path / "product_meta_data.txt"
    whole = products.read_bytes()
    products.write_bytes(whole.replace(b"\n457\t", b"\n457.5\t"))
    with pytest.raises(
        DataError, match=r"product_meta_data\.txt:wid:row 3: must be an integer, got '457\.5'"
    ):
        prepare("jdsearch", tmp_path, tmp_path / "out", SETTINGS)
    products.write_bytes(b"\xff" + whole)
    with pytest.raises(DataError, match=r"product_meta_data\.txt:row 1: not UTF-8 text"):
        prepare("jdsearch", tmp_path, tmp_path / "out", SETTINGS)
