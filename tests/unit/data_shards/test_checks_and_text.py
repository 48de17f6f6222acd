"""Leak checks find what they are for; tokenizers; the decoded example."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_shards import prepare as module
from data_shards.checks import check_prepared
from data_shards.errors import DataError
from data_shards.inspect import describe, inspect
from data_shards.options import PrepareSettings, load_prepare_settings
from data_shards.prepare import prepare
from data_shards.text import Words, encode_texts, get_tokenizer, split_words
from data_shards.work import Work
from data_shards.write import EventColumns
from tests.conftest import SMALL
from tests.worlds import write_tables


def prepare_small(folder: Path) -> None:
    raw = write_tables(folder / "raw", users=12, items=60, days=4)
    prepare("tables", raw, folder / "out", ["num_negatives=20", "vocab_size=300"])


def changed(name: str, change: Any) -> Any:
    """A stand-in for check_prepared that first changes one column of the clicks."""

    def check(work: Work, columns: EventColumns, *rest: Any) -> Any:
        values = np.array(getattr(columns, name))
        change(values, columns)
        return check_prepared(work, dataclasses.replace(columns, **{name: values}), *rest)

    return check


def later_than_its_history(values: np.ndarray, columns: EventColumns) -> None:
    first_click = int(np.flatnonzero((columns.split == 0) & (columns.history_count == 0))[0])
    values[first_click] += 10 * 86_400_000


def into_validation(values: np.ndarray, columns: EventColumns) -> None:
    first_click = np.flatnonzero((columns.split == 0) & (columns.history_count == 0))[0]
    values[int(first_click)] = 1


@pytest.mark.parametrize(
    ("column", "change", "check"),
    [
        ("time", later_than_its_history, "history_before_target"),
        ("split", into_validation, "history_train_only"),
        ("item", lambda values, _: values.__setitem__(slice(None), values[::-1].copy()), "event_once"),
    ],
)
def test_a_leak_is_found_and_nothing_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, change: Any, check: str
) -> None:
    monkeypatch.setattr(module, "check_prepared", changed(column, change))
    with pytest.raises(DataError, match=f"leak checks failed.*{check}"):
        prepare_small(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_wrong_query_in_a_history_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_other_queries(work: Work) -> EventColumns:
        columns = event_columns(work)
        return dataclasses.replace(columns, history_query=columns.history_query[::-1].copy())

    event_columns = module._event_columns
    monkeypatch.setattr(module, "_event_columns", with_other_queries)
    with pytest.raises(DataError, match=r"leak checks failed: {'history_queries': \d+}"):
        prepare_small(tmp_path)


def test_clicked_and_repeated_negatives_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module,
        "draw_negatives",
        lambda rows, user, taken, num_items, width, seed: np.full(
            (len(rows), width), taken[0] % num_items, np.int32
        ),
    )
    with pytest.raises(DataError, match=r"leak checks failed.*negatives_unique.*negatives_unseen"):
        prepare_small(tmp_path)


def settings(*overrides: str) -> PrepareSettings:
    return load_prepare_settings("tables", overrides)


def test_a_trained_tokenizer_is_the_same_every_time_and_reads_everything(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    texts = [f"garden lamp number {number % 7}" for number in range(300)]
    first, second = (get_tokenizer(settings("vocab_size=300"), order) for order in (texts, texts[::-1]))
    assert first.to_str() == second.to_str()
    first.save(str(tmp_path / "tokenizer.json"))
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert loaded.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    yes, no = (loaded.encode(answer, add_special_tokens=False) for answer in ("Yes", "No"))
    assert len(yes) == len(no) == 1
    assert yes != no
    everything = "".join(chr(code) for code in range(32, 127)) + " é 牛 Ωmega"
    ids = loaded.encode(everything, add_special_tokens=False)
    assert 2 not in ids
    assert loaded.decode(ids).strip() == everything.lower().strip()


def test_tokens_are_cut_padded_and_the_same_for_either_case() -> None:
    tokenizer = get_tokenizer(settings("vocab_size=300"), ["garden lamp"] * 50)
    tokens = encode_texts(
        tokenizer, ["Garden LAMP", "garden lamp", "", "garden lamp " * 20, "Garden LAMP"], 6, lowercase=True
    )
    assert tokens.shape == (5, 6)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    np.testing.assert_array_equal(tokens[0], tokens[4])
    assert (tokens[2] == 0).all()
    assert (tokens[3] > 0).all()


def test_few_long_texts_are_encoded_at_once_and_the_tokens_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = get_tokenizer(settings("vocab_size=300"), ["garden lamp"] * 50)
    texts = [f"{'garden ' * (number % 9)}lamp {number}" for number in range(200)]
    whole = encode_texts(tokenizer, texts, 6, lowercase=True)
    parts: list[list[str]] = []

    class Recorded:
        def encode_batch(self, part: list[str], **options: bool) -> list[Any]:
            parts.append(part)
            return tokenizer.encode_batch(part, **options)

    monkeypatch.setattr("data_shards.text.ENCODED_CHARACTERS", 300)
    recorded: Any = Recorded()
    np.testing.assert_array_equal(encode_texts(recorded, texts, 6, lowercase=True), whole)
    assert [text for part in parts for text in part] == texts
    assert max(len("".join(part)) for part in parts) < 300 + max(map(len, texts))
    assert encode_texts(tokenizer, [], 6, lowercase=True).shape == (0, 6)


def test_word_lists_become_ids_of_known_words_in_order() -> None:
    words = Words(np.array([3, 8, 20]))
    matrix = words.matrix(*split_words(["20 9 3", "", "8 8 8 8", "5"]), 3)
    assert matrix.tolist() == [[3, 1, 0], [0, 0, 0], [2, 2, 2], [0, 0, 0]]


def test_inspect_decodes_an_event_and_finds_a_cut_file(prepared: Path, tmp_path: Path) -> None:
    import shutil

    facts = inspect(prepared)
    example = facts["example"]
    assert example["task"] == "src"
    assert example["user_id"].startswith("u")
    assert example["item_id"].startswith("i")
    assert len(example["negatives"]) == 99
    topic = example["query"].split()[0]
    assert example["item_text"].startswith(topic), "the query names the item's topic"
    assert all(click["item_id"].startswith("i") for click in example["history"])
    assert facts["shards"]["train"]["events"] == sum(facts["counts"]["train"].values())
    assert any("OK" in line and "negatives_unseen" in line for line in describe(facts))
    shutil.copytree(prepared, tmp_path / "copy")
    shard = tmp_path / "copy" / "shards" / "valid-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"valid-000000\.tar has \d+ bytes, the manifest says \d+"):
        inspect(tmp_path / "copy")


def test_words_of_validation_and_test_queries_are_in_no_vocabulary(tmp_path: Path) -> None:
    """A word that only a test query has would be known only through the test split."""
    import json

    raw = write_tables(tmp_path / "raw", anonymised=True)
    rows = [json.loads(line) for line in (raw / "events.jsonl").read_text().splitlines()]
    last = max((row for row in rows if row["task"] == "src"), key=lambda row: row["time"])
    for row in rows:
        if row["time"] == last["time"]:
            row["query"] = [1003, 987654]
    (raw / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare("tables", raw, tmp_path / "out", SMALL)
    assert 987654 not in np.load(tmp_path / "out" / "catalog" / "words.npy")
    assert (
        "1003 987654" in pq.read_table(tmp_path / "out" / "catalog" / "queries.parquet")["text"].to_pylist()
    )
