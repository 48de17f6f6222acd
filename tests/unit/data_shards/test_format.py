"""The prepared folder as another program sees it."""

from pathlib import Path

import pyarrow as pa

from data_shards.schema import TRAIN_SCHEMA, eval_schema, read_manifest


def test_ten_lines_of_webdataset_and_pyarrow_read_a_shard(prepared: Path) -> None:
    import webdataset as wds

    rows = 0
    for entry in wds.WebDataset(str(prepared / "shards" / "train-000000.tar"), shardshuffle=False):
        block = pa.ipc.open_stream(entry["arrow"]).read_all()
        assert block.schema == TRAIN_SCHEMA
        rows += block.num_rows
        for history, tasks in zip(
            block["history_items"].to_pylist(), block["history_tasks"].to_pylist(), strict=True
        ):
            assert len(history) == len(tasks) <= 20
    assert rows == read_manifest(prepared).shards("train")[0].num_events


def test_evaluation_blocks_carry_the_negatives_and_no_impressions(prepared: Path) -> None:
    from data_shards.blocks import decode_blocks, tar_entries

    shard = read_manifest(prepared).shards("test")[0]
    for block in decode_blocks(tar_entries(prepared / shard.name), shard.blocks):
        assert block.schema == eval_schema(99)
