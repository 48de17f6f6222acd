"""Parts of the events, against a loop over the stored events."""

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_shards.schema import NO_QUERY, TASKS
from trainer.config import Config, DataConfig
from trainer.data import EvalStream
from trainer.data.blocks import read_blocks
from trainer.data.folder import PreparedFolder
from trainer.evaluation.metrics import METRICS
from trainer.evaluation.ranking import rank_events
from trainer.evaluation.sampled import report, task_reports, write_evaluation
from trainer.evaluation.segments import (
    BUCKETS,
    CLICKS,
    ITEMS_OF_QUERY,
    LENGTHS,
    bucketed,
    segment_reports,
    segments_of,
)


@pytest.fixture(scope="module")
def folder(prepared):
    return PreparedFolder.at(prepared)


@pytest.fixture(scope="module")
def ranks(folder):
    stream = EvalStream(folder, "test", DataConfig(history_max=5), batch_size=32)
    return rank_events(lambda batch: (batch.candidates % 7).float(), stream)


def slow_bucket(value: int, starts: tuple[int, ...]) -> str:
    for start, stop in itertools.pairwise(starts):
        if start <= value < stop:
            return str(start) if stop == start + 1 else f"{start}–{stop - 1}"
    return f"≥{starts[-1]}"


def test_names_of_buckets():
    assert BUCKETS["item_popularity"] == ("0", "1–4", "5–19", "20–79", "≥80")
    assert BUCKETS["query_ambiguity"] == ("0", "1", "2–4", "5–19", "≥20")
    values = np.arange(120)
    for starts in (LENGTHS, CLICKS, ITEMS_OF_QUERY):
        assert bucketed(values, starts).tolist() == [slow_bucket(int(value), starts) for value in values]


def test_segments_equal_a_loop_over_the_events(folder, ranks):
    events = [
        event
        for shard in folder.manifest.shards("test")
        for block in read_blocks(folder.path, shard)
        for event in block.to_pylist()
    ]
    train = folder.columns("train", ["query", "item"])
    clicked: dict[int, set[int]] = {}
    for query, item in zip(train["query"].tolist(), train["item"].tolist(), strict=True):
        clicked.setdefault(query, set()).add(item)
    by_id = {event["event_id"]: event for event in events}
    found = segments_of(folder, "test", ranks)
    assert set(found) == set(BUCKETS)
    for place, event_id in enumerate(ranks.event_id.tolist()):
        event = by_id[event_id]
        hour = event["time"] // 3_600_000 % 24
        query = event["query"]
        expected = {
            "history_length": slow_bucket(len(event["history_items"]), LENGTHS),
            "item_popularity": slow_bucket(int((train["item"] == event["item"]).sum()), CLICKS),
            "query_ambiguity": None
            if query == NO_QUERY
            else slow_bucket(len(clicked.get(query, ())), ITEMS_OF_QUERY),
            "time_of_day": BUCKETS["time_of_day"][hour // 6],
        }
        assert {name: buckets[place] for name, buckets in found.items()} == expected


def test_reports_are_means_of_the_parts_and_are_stored(folder, ranks, tmp_path):
    segments = segments_of(folder, "test", ranks)
    reports = segment_reports(ranks, segments)
    values = ranks.metric_values()[:, METRICS.index("ndcg@10")].numpy()
    assert "query_ambiguity" not in reports["rec"]
    for task, names in reports.items():
        for name, buckets in names.items():
            total = sum(one["num_events"] for one in buckets.values())
            assert total == (ranks.task == TASKS.index(task)).sum()
            for bucket, one in buckets.items():
                mine = (ranks.task == TASKS.index(task)) & (segments[name] == bucket)
                assert one["ndcg@10"] == pytest.approx(values[mine].mean())
                low, high = one["ci95"]["ndcg@10"]
                assert low <= one["ndcg@10"] <= high
    document = report(task_reports(ranks), folder, "test", Config(), segments=reports)
    assert document["segments"] == reports
    write_evaluation(tmp_path, folder, "test", ranks, document, segments)
    table = pq.read_table(tmp_path / "evaluation-test.parquet")
    for name, buckets in segments.items():
        assert table[name].to_pylist() == buckets.tolist()


def test_a_log_of_whole_days_has_no_time_of_day(folder, ranks, monkeypatch):
    def facts(*_: object) -> tuple[np.ndarray, ...]:
        count = len(ranks.event_id)
        return np.full(count, NO_QUERY), np.arange(count) * 86_400_000, np.zeros(count, np.int64)

    monkeypatch.setattr("trainer.evaluation.segments._facts", facts)
    assert set(segments_of(folder, "test", ranks)) == {"history_length", "item_popularity"}
