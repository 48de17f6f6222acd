"""Inputs that once failed (a folder GENSR_CASES, by default ../shared/cases), with what is right for each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_shards.errors import DataError
from data_shards.prepare import prepare

CASES = Path(os.environ.get("GENSR_CASES", "../shared/cases"))
TWENTY = ("num_negatives=20",)
LAST = ("split=leave_one_out", "num_negatives=2", "min_interactions=0")
ONE = ("num_negatives=2",)
CLICKS = ("min_interactions=1", "both_behaviours=false", "num_negatives=3")

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="no GENSR_CASES")

READ = [
    ("tables", "01-late-json-keys/raw", TWENTY), ("tables", "02-sparse-json-items/raw", TWENTY),
    ("tables", "05-parquet-binary-text/raw", TWENTY), ("tables", "07-uint64-ids/raw", TWENTY),
    ("tables", "06-float-ids/raw_int", TWENTY), ("tables", "odd_tables/pandas_tz_ns", LAST),
    ("amazon", "08-lone-surrogate/amazon", ("num_negatives=10",)),
    ("amazon", "09-integer-asin/amazon", ("num_negatives=10",)),
    ("amazon", "amazon_comma_blank", ONE), ("amazon", "amazon_list", ONE), ("amazon", "amazon_null", ONE),
    ("kuaisar", "odd/keyword_writings", CLICKS), ("kuaisar", "odd/type_null", CLICKS),
]  # fmt: skip
REFUSED = [
    ("tables", "06-float-ids/raw", TWENTY, r"events\.parquet:user_id:row 1: .*beyond 2\^53.*lost digits"),
    ("amazon", "amazon_num", ONE, r"X\.item\.json:row 4 \(3\): categories must be text"),
    ("kuaisar", "odd/id_float_fraction", CLICKS, r"rec_inter\.csv:user_id:row 5: .* got '3\.5'"),
    ("kuaisar", "odd/id_item_fraction", CLICKS, r"rec_inter\.csv:item_id:row 5: .* got '4\.6'"),
    ("kuaisar", "odd/caption_fraction", CLICKS, r"item_features\.csv:caption:row 2: .* got '\[1\.6, 31\]'"),
    ("kuaisar", "odd/click_half", CLICKS, r"rec_inter\.csv:click:row 2: .* got '0\.5'"),
    ("kuaisar", "outlier_day", CLICKS, r"last day of the log is 2031-01-01 \(1 of \d+ clicks\)"),
]
SAME = [("03-iso-offset/raw", "03-iso-offset/raw_ms", TWENTY)]


def made(case: str, folder: Path) -> Path:
    """A case copied to `folder`, with the files that its make.py makes."""
    top, _, rest = case.partition("/")
    shutil.copyfile(CASES / "world.py", folder / "world.py")
    if not (folder / top).exists():
        shutil.copytree(CASES / top, folder / top)
        if (folder / top / "make.py").is_file():
            subprocess.run([sys.executable, "make.py"], cwd=folder / top, check=True)
    return folder / top / rest


@pytest.mark.parametrize(("source", "case", "settings"), READ, ids=[case for _, case, _ in READ])
def test_it_is_read(tmp_path: Path, source: str, case: str, settings: tuple[str, ...]) -> None:
    manifest = prepare(source, made(case, tmp_path), tmp_path / "out", settings).raw
    if case.startswith("01"):
        assert (manifest["counts"]["raw"]["src"], manifest["counts"]["test"]["src"]) == (800, 400)
    if case.startswith("05"):
        items = pq.read_table(tmp_path / "out" / "catalog" / "items.parquet")["text"].to_pylist()
        assert all(text.startswith("红色 灯 ") for text in items)
    if case.endswith("keyword_writings"):
        assert manifest["counts"]["queries"] == 40
    if case.endswith("type_null"):
        assert manifest["dropped"]["src_inter.csv: no item_type"] == 1
    if case.endswith("comma_blank"):
        assert manifest["source"]["category_levels"] == {"3": 12}


@pytest.mark.parametrize(
    ("source", "case", "settings", "message"), REFUSED, ids=[case for _, case, _, _ in REFUSED]
)
def test_it_is_refused(
    tmp_path: Path, source: str, case: str, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(source, made(case, tmp_path), tmp_path / "out", settings)


@pytest.mark.parametrize(("first", "second", "settings"), SAME, ids=[case for case, _, _ in SAME])
def test_two_writings_are_the_same(
    tmp_path: Path, first: str, second: str, settings: tuple[str, ...]
) -> None:
    found = {
        prepare("tables", made(case, tmp_path), tmp_path / f"out{number}", settings).fingerprint
        for number, case in enumerate((first, second))
    }
    assert len(found) == 1


@pytest.mark.parametrize("case", ["04-tz-parquet/raw", "parquet_tz", "iso_offset"])
def test_the_time_zone_does_not_matter(tmp_path: Path, case: str) -> None:
    raw = made(case, tmp_path)
    script = (
        "import sys; from data_shards.prepare import prepare; "
        "print(prepare('tables', *sys.argv[1:3], sys.argv[3:]).hash)"
    )
    found = set()
    for zone in ("UTC", "Asia/Shanghai"):
        command = [sys.executable, "-c", script, str(raw), str(tmp_path / zone.lower().replace("/", "-"))]
        settings = TWENTY if case.startswith("04") else LAST
        ended = subprocess.run(
            [*command, *settings], capture_output=True, text=True, check=True, env={**os.environ, "TZ": zone}
        )
        found.add(ended.stdout)
    assert len(found) == 1
