"""Mined negatives against a slow reading of the prepared folder, and a folder without them."""

import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pyarrow.parquet as pq
import pytest
from bm25s.tokenization import Tokenized
from scipy import sparse

from data_shards import hard_negatives as module
from data_shards.blocks import decode_blocks, tar_entries
from data_shards.errors import ConfigError, DataError
from data_shards.hard_negatives import bm25_weights, count_words, fill, largest, neighbours
from data_shards.options import load_prepare_settings, settings_with_effect
from data_shards.prepare import prepare
from data_shards.schema import SRC, TASKS, Manifest, read_manifest
from data_shards.verify import verify
from tests.conftest import SMALL
from tests.worlds import write_tables

WIDTH = 25


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of conftest's `prepared`, with mined negatives."""
    folder = tmp_path_factory.mktemp("hard")
    prepare("tables", write_tables(folder / "raw"), folder / "out", [*SMALL, f"hard_negatives={WIDTH}"])
    return folder / "out"


def events_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [
        event
        for shard in read_manifest(folder).shards(split)
        for block in decode_blocks(tar_entries(folder / shard.name), shard.blocks)
        for event in block.to_pylist()
    ]


def slow_bm25(texts: list[list[str]], query: list[str]) -> dict[int, float]:
    scores: dict[int, float] = {}
    average = sum(map(len, texts)) / len(texts)
    for item, text in enumerate(texts):
        score = 0.0
        for word in query:
            count, with_word = text.count(word), sum(word in other for other in texts)
            idf = math.log(1 + (len(texts) - with_word + 0.5) / (with_word + 0.5))
            score += idf * count / (count + 1.5 * (0.25 + 0.75 * len(text) / average))
        if score > 0:
            scores[item] = score
    return scores


def slow_neighbours(train: list[dict[str, Any]]) -> dict[int, dict[int, float]]:
    users: dict[int, set[int]] = defaultdict(set)
    for event in train:
        users[event["item"]].add(event["user"])
    found = {}
    for item, mine in users.items():
        cosine = {
            other: len(mine & theirs) / math.sqrt(len(mine) * len(theirs))
            for other, theirs in users.items()
            if other != item and mine & theirs
        }
        best = sorted(cosine, key=lambda other: (-round(cosine[other], 12), other))[: module.NEIGHBOURS]
        found[item] = {other: cosine[other] for other in best}
    return found


def check_chosen(chosen: list[int], scores: dict[int, float], seen: set[int], num_items: int) -> int:
    """`chosen` are the best unseen by score (equal ones in any order), then others → how many were mined."""
    assert len(set(chosen)) == WIDTH
    assert all(0 <= item < num_items for item in chosen)
    assert not set(chosen) & seen
    ranked = sorted((score for item, score in scores.items() if item not in seen), reverse=True)[:WIDTH]
    assert [scores[item] for item in chosen[: len(ranked)]] == pytest.approx(ranked)
    assert all(item not in scores for item in chosen[len(ranked) :])
    return len(ranked)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_negatives_are_those_of_a_slow_reading(hard: Path, split: str) -> None:
    by_split = {name: events_of(hard, name) for name in ("train", "valid", "test")}
    seen: dict[int, set[int]] = defaultdict(set)
    for events in by_split.values():
        for event in events:
            seen[event["user"]].add(event["item"])
    items, queries = (
        [
            re.findall(r"\w+", (text or "").lower())
            for text in pq.read_table(hard / "catalog" / f"{name}.parquet")["text"].to_pylist()
        ]
        for name in ("items", "queries")
    )
    near = slow_neighbours(by_split["train"])
    mined: Counter[str] = Counter()
    for event in by_split[split]:
        if event["task"] == SRC:
            scores: dict[int, float] = slow_bm25(items, queries[event["query"]])
        else:
            scores = {}
            for item in event["history_items"]:
                for other, value in near.get(item, {}).items():
                    scores[other] = scores.get(other, 0) + value
        found = check_chosen(event["hard_negatives"], scores, seen[event["user"]], len(items))
        mined[TASKS[event["task"]]] += found
    manifest = read_manifest(hard)
    facts = manifest.raw["hard_negatives"]
    assert facts["mined"][split] == mined
    assert set(facts["rules"]) == set(TASKS)
    assert manifest.num_hard_negatives == WIDTH
    shares = mined["src"] / (WIDTH * sum(event["task"] == SRC for event in by_split[split]))
    assert 0.2 < shares < 1  # some are filled up
    assert facts["seed"] > 0


def test_the_rest_of_the_folder_is_as_without(hard: Path, prepared: Path) -> None:
    for split in ("train", "valid", "test"):
        plain, mined = events_of(prepared, split), events_of(hard, split)
        assert [
            {name: value for name, value in event.items() if name != "hard_negatives"} for event in mined
        ] == plain
    manifest = read_manifest(prepared)
    assert manifest.num_hard_negatives == 0
    assert "hard_negatives" not in {**manifest.raw, **manifest.raw["settings"]}
    assert "hard_negatives" not in settings_with_effect(load_prepare_settings("tables"))
    checks = read_manifest(hard).raw["leak_checks"]
    assert checks["hard_negatives_unseen"] == checks["hard_negatives_unique"]
    assert checks["hard_negatives_unseen"]["checked"] == WIDTH * sum(
        read_manifest(hard).num_events(split) for split in ("valid", "test")
    )


def test_a_folder_is_verified_and_a_seed_repeats_it(hard: Path, tmp_path: Path) -> None:
    manifest = read_manifest(hard)
    verify(hard, manifest)
    raw = {**manifest.raw, "counts": {**manifest.raw["counts"], "items": 5}}
    with pytest.raises(DataError):
        verify(hard, Manifest(raw=raw, hash=""))
    again = [*SMALL, f"hard_negatives={WIDTH}", "threads=1"]
    prepare("tables", write_tables(tmp_path / "raw"), tmp_path / "out", again)
    shards = [shard["sha256"] for shard in read_manifest(tmp_path / "out").raw["shards"]["test"]]
    assert shards == [shard["sha256"] for shard in manifest.raw["shards"]["test"]]


def test_anonymised_words_are_words(tmp_path: Path) -> None:
    raw = write_tables(tmp_path / "raw", anonymised=True)
    manifest = prepare("tables", raw, tmp_path / "out", [*SMALL, "hard_negatives=10"])
    assert manifest.raw["hard_negatives"]["mined"]["test"]["src"] > 0


def test_too_few_items_and_a_negative_number_are_errors(tmp_path: Path) -> None:
    raw = write_tables(tmp_path / "raw")
    with pytest.raises(DataError, match=r"Use hard_negatives=\d+ or fewer"):
        prepare("tables", raw, tmp_path / "out", [*SMALL, "hard_negatives=149"])
    with pytest.raises(ConfigError, match="hard_negatives"):
        prepare("tables", raw, tmp_path / "out", ["hard_negatives=-1"])


def test_weights_are_those_of_bm25s() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.integers(30, size=rng.integers(1, 9))) for _ in range(50)]
    counts, _ = count_words(texts, [])
    terms = [np.repeat(row.indices, row.data.astype(int)).tolist() for row in counts]
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    vocabulary = {str(term): term for term in range(counts.shape[1])}
    index.index(Tokenized(ids=terms, vocab=vocabulary), create_empty_token=False, show_progress=False)
    parts = index.scores
    theirs = sparse.csc_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=counts.shape)
    np.testing.assert_allclose(bm25_weights(counts).toarray(), theirs.T.toarray(), rtol=1e-5)


def test_pieces_do_not_change_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(20, size=300))
    whole = neighbours(user, rng.integers(15, size=300), 18)
    monkeypatch.setattr(module, "MAX_SCORES", 5)
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(20, size=300))
    small = neighbours(user, rng.integers(15, size=300), 18)
    assert (whole != small).nnz == 0
    assert whole.nnz > 0
    assert neighbours(user[:0], user[:0], 18).nnz == 0


def test_only_the_newest_clicks_of_a_user_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLICKS_OF_USER", 2)
    found = neighbours(np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 3]), 4)
    assert {tuple(pair) for pair in np.argwhere(found.toarray() > 0)} == {(1, 2), (2, 1), (0, 3), (3, 0)}


def test_equal_scores_go_to_the_lower_item() -> None:
    assert largest(np.array([1.0, 2, 2, 2]), np.array([0, 9, 4, 7]), 2).tolist() == [2, 3]
    assert largest(np.array([1.0]), np.array([5]), 3).tolist() == [0]


def test_gaps_are_filled_without_repeats() -> None:
    mined = np.array([[4, 2, -1, -1], [1, 2, 3, 4]], np.int32)
    uniform = np.array([[2, 8, 4, 9], [5, 6, 7, 8]], np.int32)
    assert fill(mined, uniform).tolist() == [[4, 2, 8, 9], [1, 2, 3, 4]]
