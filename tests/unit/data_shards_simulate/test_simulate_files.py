"""The five files: schema, reproducibility, what the published logs are like, and failures that leave nothing
behind."""

import csv
import hashlib
import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest

from data_shards import simulate as package
from data_shards.errors import ConfigError, DataError
from data_shards.simulate import csv_tables, simulate

SMALL: dict[str, Any] = {"users": 60, "items": 500, "days": 5}
FILES = ("rec_inter.csv", "src_inter.csv", "social_network.csv", "user_features.csv", "item_features.csv")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulated") / "raw"
    simulate(out, users=300, items=1500, days=7, seed=3)
    return out


def read(folder: Path, name: str) -> pa.Table:
    return pa_csv.read_csv(folder / name)


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def test_headers_and_types_are_kuaisars(logs: Path) -> None:
    integer, real, text = pa.int64(), pa.float64(), pa.string()
    rec = read(logs, "rec_inter.csv").schema
    names = (
        "user_id item_id playing_time duration_ms time timestamp click forward like follow search "
        "search_item_related"
    )
    assert rec.names == names.split()
    assert rec.types == [integer, integer, real, real, pa.timestamp("s"), real] + [integer] * 6
    src = read(logs, "src_inter.csv").schema
    names = (
        "user_id search_session_id search_session_time search_session_timestamp keyword search_source "
        "item_id click_cnt item_type"
    )
    assert src.names == names.split()
    assert src.types == [integer, integer, pa.timestamp("s"), integer, text, text, integer, integer, text]
    items = read(logs, "item_features.csv").schema
    levels = [
        f"{level}_level_category_{part}"
        for level in ("first", "second", "third", "fourth")
        for part in ("id", "name", "name_en")
    ]
    assert items.names == [
        "item_id",
        "caption",
        "author_id",
        "item_type",
        "upload_time",
        "upload_type",
        *levels,
    ]
    names = "user_id search_active_level rec_active_level onehot_feat1 onehot_feat2"
    assert read(logs, "user_features.csv").schema.names == names.split()
    assert read(logs, "social_network.csv").schema.names == ["user_id", "user_follow_id"]
    assert sorted(p.name for p in logs.iterdir()) == sorted([*FILES, "simulated.json"])


def test_counts_are_returned_and_seen_by_another_reader(tmp_path: Path) -> None:
    counts = simulate(tmp_path / "raw", **SMALL)
    for name in FILES:
        with open(tmp_path / "raw" / name, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        assert len(rows) - 1 == counts[name]
        assert {len(row) for row in rows} == {len(csv_tables.HEADERS[name])}


@pytest.mark.parametrize("chunk_users", [1, 17])
def test_same_bytes_whatever_the_chunking(tmp_path: Path, chunk_users: int) -> None:
    simulate(tmp_path / "a", **SMALL, seed=5)
    simulate(tmp_path / "b", **SMALL, seed=5, chunk_users=chunk_users)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_another_seed_is_another_world(tmp_path: Path) -> None:
    simulate(tmp_path / "a", **SMALL, seed=5)
    simulate(tmp_path / "b", **SMALL, seed=6)
    a, b = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert all(a[name] != b[name] for name in FILES)


def test_times(logs: Path) -> None:
    rec = read(logs, "rec_inter.csv")
    stamp = column(rec, "timestamp")
    shown_together = np.unique(np.stack([column(rec, "user_id"), stamp]), axis=1, return_counts=True)[1]
    assert shown_together.mean() > 3  # one distribution time for several items
    assert shown_together.max() <= 8
    beijing = timezone(timedelta(hours=8))
    first_day = datetime(2023, 5, 22, tzinfo=beijing)
    assert stamp.min() >= first_day.timestamp() * 1000
    assert stamp.max() < (first_day + timedelta(days=7)).timestamp() * 1000
    for row in (0, len(stamp) - 1):
        expected = datetime.fromtimestamp(int(stamp[row] // 1000), beijing).replace(tzinfo=None)
        assert rec["time"][row].as_py() == expected


def test_clicks_and_sessions_look_like_the_published_ones(logs: Path) -> None:
    rec, src = read(logs, "rec_inter.csv"), read(logs, "src_inter.csv")
    assert 0.15 < column(rec, "click").mean() < 0.35  # several impressions without click for one with
    session, clicks = column(src, "search_session_id"), column(src, "click_cnt")
    clicked = np.bincount(session, clicks)[np.unique(session)] > 0
    assert 0.33 < 1 - clicked.mean() < 0.47
    assert set(np.unique(clicks)) == {0, 1, 2}
    one_keyword = {(s, k) for s, k in zip(session.tolist(), src["keyword"].to_pylist(), strict=True)}
    assert len(one_keyword) == len(np.unique(session))
    keywords = [json.loads(text) for text in src["keyword"].to_pylist()]
    assert all(1 <= len(words) <= 4 and min(words) >= 1 for words in keywords)
    # searches that follow a watched item say so
    assert column(rec, "search").sum() > 0.6 * len(np.unique(session))
    assert (column(rec, "search_item_related") <= column(rec, "search")).all()


def test_items_of_the_logs_and_of_the_features(logs: Path) -> None:
    rec = read(logs, "rec_inter.csv")
    src = read(logs, "src_inter.csv")
    items = read(logs, "item_features.csv")
    known = set(column(items, "item_id").tolist())
    assert len(known) == len(items)
    video = column(src, "item_type") == "VIDEO"
    others = set(column(src, "item_id")[~video].tolist())
    assert 0.05 < 1 - video.mean() < 0.2
    assert not others & known
    unknown = set(column(rec, "item_id").tolist()) - known
    assert len(unknown) < 0.01 * len(known)  # a few videos without features, as published
    captions = [json.loads(text) for text in items["caption"].to_pylist()]
    assert 0.01 < np.mean([not words for words in captions]) < 0.06
    assert 4 < np.mean([len(words) for words in captions]) < 7
    first = items["first_level_category_name_en"].to_pylist()
    fourth = items["fourth_level_category_name_en"].to_pylist()
    assert 0.01 < first.count("empty") / len(first) < 0.08
    assert 0.4 < fourth.count("empty") / len(fourth) < 0.8
    names = items["third_level_category_name_en"].to_pylist()
    assert all(third == "empty" for one, third in zip(first, names, strict=True) if one == "empty")
    assert (column(items, "first_level_category_id") > 0).sum() == len(first) - first.count("empty")


def test_nothing_is_shown_again_after_a_click_or_before_its_upload(logs: Path) -> None:
    rec = read(logs, "rec_inter.csv")
    src = read(logs, "src_inter.csv")
    items = read(logs, "item_features.csv")
    video = column(src, "item_type") == "VIDEO"
    user = np.concatenate([column(rec, "user_id"), column(src, "user_id")[video]])
    item = np.concatenate([column(rec, "item_id"), column(src, "item_id")[video]])
    time = np.concatenate([column(rec, "timestamp"), column(src, "search_session_timestamp")[video]])
    click = np.concatenate([column(rec, "click"), column(src, "click_cnt")[video]]) > 0
    clicked_at = {(u, i): t for u, i, t in zip(user[click], item[click], time[click], strict=True)}
    assert len(clicked_at) == click.sum()
    assert all(t <= clicked_at.get((u, i), t) for u, i, t in zip(user, item, time, strict=True))
    day = column(items, "upload_time").astype("datetime64[D]").astype(int)
    uploaded = dict(zip(column(items, "item_id").tolist(), day.tolist(), strict=True))
    shown_day = (time / 1000 + 8 * 3600) // 86400
    assert all(uploaded.get(i, 0) <= d for i, d in zip(item.tolist(), shown_day, strict=True))


def test_users_of_the_logs_have_features(logs: Path) -> None:
    users = read(logs, "user_features.csv")
    assert sorted(column(users, "user_id").tolist()) == list(range(1, 301))
    assert set(np.unique(column(users, "onehot_feat1"))) <= {0, 1, 2}
    assert set(np.unique(column(users, "onehot_feat2"))) <= set(range(8))
    assert set(np.unique(column(read(logs, "src_inter.csv"), "user_id"))) <= set(range(1, 301))
    follows = read(logs, "social_network.csv")
    assert (column(follows, "user_id") != column(follows, "user_follow_id")).all()


def test_ids_tell_nothing_about_topic_or_popularity(logs: Path) -> None:
    rec, items = read(logs, "rec_inter.csv"), read(logs, "item_features.csv")
    category = column(items, "first_level_category_id")
    assert abs(np.corrcoef(column(items, "item_id"), category)[0, 1]) < 0.1
    shown = np.bincount(column(rec, "item_id"))[1:]
    assert abs(np.corrcoef(np.arange(len(shown)), shown)[0, 1]) < 0.1


def test_rows_per_day_is_what_was_asked(tmp_path: Path) -> None:
    counts = simulate(tmp_path / "raw", users=300, items=60_000, days=8, rows_per_day=40)
    rows = counts["rec_inter.csv"] + counts["src_inter.csv"]
    assert rows == pytest.approx(300 * 8 * 40, rel=0.1)


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "raw"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="exists already"):
        simulate(out, **SMALL)
    assert [p.name for p in tmp_path.rglob("*")] == ["raw", "mine.txt"]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"users": 0}, "users must be"), ({"items": 20}, "items must be"), ({"days": 1}, "days must be")],
)
def test_sizes_that_make_no_world_are_named_together(
    tmp_path: Path, sizes: dict[str, int], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        simulate(tmp_path / "raw", **(SMALL | sizes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(package.csv_tables, "user_columns", fail)
    with pytest.raises((DataError, KeyboardInterrupt)) as caught:
        simulate(tmp_path / "raw", **SMALL)
    if isinstance(failure, OSError):
        assert "No space left" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_progress_ends_complete(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    simulate(
        tmp_path / "raw",
        **SMALL,
        chunk_users=20,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert ("items", 500, 500) in seen
    assert [done for what, done, _ in seen if what == "users"] == [20, 40, 60]


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    """Peak memory of ten times the rows stays within 60 MB: what is held is a chunk of users and 20 bytes an
    item."""
    script = (
        "import resource, sys; from data_shards.simulate import simulate\n"
        "simulate(sys.argv[1], users=int(sys.argv[2]), items=2000, days=10)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for users in (300, 3000):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / str(users)), str(users)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 60
