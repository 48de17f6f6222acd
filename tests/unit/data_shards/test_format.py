"""The prepared folder as another program sees it."""

import re
from pathlib import Path

import pyarrow as pa
import pytest

from data_shards.schema import TRAIN_SCHEMA, eval_schema, read_manifest

README = Path(__file__).parents[3] / "data_shards" / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
EXAMPLES = [block for block in BLOCKS if '"OUT/' in block]  # the others are sources: tests/docs


@pytest.mark.parametrize("example", EXAMPLES, ids=["tarfile", "webdataset"])
def test_the_examples_of_the_readme_read_a_folder(
    prepared: Path, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(example.replace("OUT", str(prepared)), {})
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) > 10
    if "tarfile" in example:
        assert re.search(r"^  before: \d+ recommended$", printed, re.MULTILINE)
        assert re.search(r"^  before: \d+ found by '\w+ \w+'$", printed, re.MULTILINE)
        assert re.search(r"^item \d+ \['\w+'\]$", printed, re.MULTILINE)


def test_ten_lines_of_webdataset_and_pyarrow_read_a_shard(prepared: Path) -> None:
    import webdataset as wds

    rows = 0
    for entry in wds.WebDataset(str(prepared / "shards" / "train-000000.tar"), shardshuffle=False):
        block = pa.ipc.open_stream(entry["arrow"]).read_all()
        assert block.schema == TRAIN_SCHEMA
        rows += block.num_rows
        lists = (block[f"history_{name}"].to_pylist() for name in ("items", "tasks", "queries"))
        for history, tasks, queries in zip(*lists, strict=True):
            assert len(history) == len(tasks) == len(queries) <= 20
    assert rows == read_manifest(prepared).shards("train")[0].num_events


def test_evaluation_blocks_carry_the_negatives_and_no_impressions(prepared: Path) -> None:
    from data_shards.blocks import decode_blocks, tar_entries

    shard = read_manifest(prepared).shards("test")[0]
    for block in decode_blocks(tar_entries(prepared / shard.name), shard.blocks):
        assert block.schema == eval_schema(99)
