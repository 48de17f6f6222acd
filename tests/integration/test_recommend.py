"""Answers from the whole catalogue: who is asked, what is found, what is left out, and what is refused."""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from data_shards.prepare import prepare
from data_shards.schema import REC, SPLITS, SRC, read_manifest
from tests.conftest import SMALL
from tests.runs import make_run
from tests.worlds import write_tables
from trainer.cli import app
from trainer.data.folder import PreparedFolder
from trainer.errors import DataError, GensrError, RequestError, RunError
from trainer.registry.store import open_model
from trainer.serving.recommend import Recommender
from trainer.serving.requests import ParsedRequest, RequestReader, id_text
from trainer.serving.users import NoUsers, Users, open_users, read_clicks, read_history

NEW_ITEM = {"item_id": "brand-new", "text": "xylophone mallet brand new", "category": "music"}
HISTORY = [{"item_id": "i3", "task": "rec"}, {"item_id": "i7", "task": "src"}]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with one item that nobody ever clicked."""
    folder = tmp_path_factory.mktemp("catalogue")
    raw = write_tables(folder / "raw")
    with open(raw / "items.jsonl", "a") as file:
        file.write(json.dumps(NEW_ITEM) + "\n")
    prepare("tables", raw, folder / "prepared", (*SMALL, "min_interactions=0"))
    return make_run(folder, folder / "prepared")


@pytest.fixture(scope="module")
def recommender(run_dir: Path) -> Recommender:
    return Recommender.from_run(run_dir)


def test_ranking_is_that_of_scoring_the_candidates(recommender: Recommender) -> None:
    """All items retrieved: the answer is the model's own order of the catalogue without the history."""
    others = [item for item in recommender.scorer.item_ids if item not in ("i3", "i7")]
    scores = dict(
        zip(
            others,
            recommender.scorer.score({"history": HISTORY, "task": "rec", "candidates": others}),
            strict=True,
        )
    )
    answer = recommender.recommend({"history": HISTORY, "task": "rec", "k": 12, "num_candidates": 1000})
    assert [item["score"] for item in answer["items"]] == pytest.approx(
        sorted(scores.values(), reverse=True)[:12], abs=1e-5
    )
    assert all(item["score"] == pytest.approx(scores[item["item_id"]], abs=1e-5) for item in answer["items"])
    seen_too = recommender.recommend(
        {"history": HISTORY, "task": "rec", "k": 1000, "num_candidates": 1000, "include_seen": True}
    )
    assert {item["item_id"] for item in seen_too["items"]} == set(recommender.scorer.item_ids)


def test_new_items_are_found_by_their_text(recommender: Recommender) -> None:
    """No clicks, so no CF vector: the semantic side alone can bring it, for a query and for a similar
    history."""
    row = recommender.scorer.item_ids.index("brand-new")
    assert not recommender.scorer.model.tables.cf[row].any()
    searched = ParsedRequest(items=[], tasks=[], task=SRC, query="xylophone mallet", candidates=[])
    assert row in recommender.candidates(searched, 5, [])
    answer = recommender.recommend(
        {"history": [], "task": "src", "query": "xylophone mallet", "k": 5, "num_candidates": 5}
    )
    assert "brand-new" in [item["item_id"] for item in answer["items"]]
    liked = ParsedRequest(items=[row], tasks=[REC], task=REC, query=None, candidates=[])
    assert recommender.candidates(liked, 3, [])[0] == row


def test_user_id_stands_for_all_clicks_of_the_user(run_dir: Path, recommender: Recommender) -> None:
    folder = run_dir.parents[1] / "data"
    read_manifest(folder)
    clicks = pd.concat(
        [
            pd.DataFrame(PreparedFolder.at(folder).columns(split, ["user", "item", "task", "time"]))
            for split in SPLITS
        ]
    )
    users = pd.read_parquet(folder / "catalog" / "users.parquet")["user_id"].tolist()
    mine = clicks[clicks.user == users.index("u3")].sort_values("time")
    history = [
        {"item_id": recommender.scorer.item_ids[item], "task": ("rec", "src")[task]}
        for item, task in zip(mine["item"], mine["task"], strict=True)
    ]
    request = {"task": "rec", "k": 5}
    assert recommender.recommend({**request, "user_id": "u3"}) == recommender.recommend(
        {**request, "history": history}
    )
    assert not {e["item_id"] for e in history} & {
        i["item_id"] for i in recommender.recommend({**request, "user_id": "u3"})["items"]
    }


def test_weights_explain_each_item(recommender: Recommender) -> None:
    answer = recommender.recommend(
        {"history": HISTORY, "task": "rec", "k": 3, "explain": True, "with_text": True}
    )
    for item in answer["items"]:
        assert [weight["item_id"] for weight in item["weights"]] == ["i3", "i7"]
        assert sum(weight["cf"] for weight in item["weights"]) == pytest.approx(1, abs=1e-5)
        assert sum(weight["semantic"] for weight in item["weights"]) == pytest.approx(1, abs=1e-5)
        assert item["text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be between 1 and 1000, got 0"),
        ({"k": 2.5}, "k must be a whole number, got 2.5"),
        ({"k": True}, "k must be a whole number"),
        ({"num_candidates": 10**9}, "num_candidates must be between 1 and 2000"),
        ({"include_seen": "yes"}, "include_seen must be true or false"),
        ({"history": None, "user_id": "nobody"}, "user 'nobody' is not in the training data"),
        ({"history": [{"item_id": "gone", "task": "rec"}]}, "does not know the items 'gone'"),
        ({"candidates": []}, "candidates is empty"),
        ({"with_text": "yes", "candidates": ["i1"]}, "with_text must be true or false"),
        ({"candidate": ["i1"]}, "'candidate' is not read: call it 'candidates'"),
        ({"history": [], "user_id": "u3"}, "history is empty and user_id is given"),
        ({"history": np.array([]), "user_id": "u3"}, "history is empty and user_id is given"),
        ({"history": [], "user": "u3"}, "'user' is not read: call it 'user_id'"),
        ({"history": None, "user": "u3"}, "'user' is not read: call it 'user_id'"),
        ({"history": None, "userId": "u3"}, "'userId' is not read: call it 'user_id'"),
        ({"task": "src", "query": "  "}, "query is missing"),
        ({"task": "src", "query": "", "history": HISTORY}, "query is missing"),
    ],
)
def test_bad_requests_are_named(recommender: Recommender, change: dict[str, Any], message: str) -> None:
    good = {"history": HISTORY, "task": "rec"}
    with pytest.raises(RequestError, match=message) as caught:
        recommender.answer([good, {**good, **change}])
    assert "request 2" in str(caught.value)


def test_without_a_history_the_most_clicked_items_are_answered(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recommender.users.reason == ""
    clicks: Counter[str] = Counter()
    for user_id in recommender.users.some(1000):
        clicks.update(str(click["item_id"]) for click in recommender.history_of(user_id))
    answer = recommender.recommend({"history": [], "task": "rec", "k": 5, "explain": True})
    items = [str(item["item_id"]) for item in answer["items"]]
    assert sorted(clicks[item] for item in items) == sorted(clicks.values())[-5:]
    assert answer["scores"] == sorted(answer["scores"], reverse=True)
    monkeypatch.setattr(recommender, "users", NoUsers("the training data is not here"))
    with pytest.raises(RequestError, match="history is empty: there is nothing to recommend from"):
        recommender.recommend({"history": [], "task": "rec"})


def test_users_are_those_of_the_training_data(run_dir: Path, tmp_path: Path) -> None:
    folder = run_dir.parents[1] / "data"
    assert open_users(folder, read_manifest(folder).hash, must_be_there=False).reason == ""
    for other in (tmp_path, folder, ""):
        nobody = open_users(other, "another hash", must_be_there=False)
        assert "Give a history instead" in nobody.reason
        assert (nobody.some(3), nobody.frequent_queries(3), len(nobody.popular(3))) == ([], [], 0)
        with pytest.raises(RequestError, match="request 2: user_id cannot be looked up"):
            nobody.history("u1", [], "request 2")
    with pytest.raises(DataError):
        open_users(folder, "another hash", must_be_there=True)


def test_fields_that_are_not_ours_are_carried(recommender: Recommender) -> None:
    good = {"history": HISTORY, "task": "rec", "k": 2}
    carried = {"id": 1, "user": "u3", "user_id": "nobody", "label": True, "text": "x", "candidate": None}
    assert recommender.recommend({**good, **carried}) == recommender.recommend(good)


def test_a_prepared_folder_that_has_moved_is_named_and_has_to_be_that_of_the_run(
    run_dir: Path, prepared: Path, tmp_path: Path
) -> None:
    data = run_dir.parents[1] / "data"
    moved = data.rename(tmp_path / "moved")
    try:
        with pytest.raises(RunError, match=r"has moved, set data\.dir in .*config\.yaml .*give --data"):
            open_model(run_dir)
        assert open_model(run_dir, data_dir=moved).users.some(1)
        with pytest.raises(DataError, match=r"has another split .* than .* was trained on"):
            open_model(run_dir, data_dir=prepared)
    finally:
        moved.rename(data)


def test_whole_floats_are_ids() -> None:
    reader = RequestReader([7, 12], "natural", (REC, SRC))
    history = [{"item_id": 7.0, "task": "rec"}]
    parsed = reader.parse({"task": "rec", "history": history, "candidates": [np.float64(12)]}, "it")
    assert (parsed.items, parsed.candidates) == ([0], [1])
    with pytest.raises(RequestError, match=r"7\.5"):
        reader.parse({"task": "rec", "candidates": [7.5]}, "it")
    assert [id_text(one) for one in (3.0, "3.0", 3, float("inf"))] == ["3", "3.0", "3", "inf"]


def test_first_callers_read_the_clicks_once(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[PreparedFolder] = []

    def slowly(folder: PreparedFolder) -> Any:
        read.append(folder)
        time.sleep(0.05)
        return read_clicks(folder)

    monkeypatch.setattr("trainer.serving.users.read_clicks", slowly)
    users = Users(PreparedFolder.at(prepared))
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(users.row, ["u3"] * 4))
    assert len(set(rows)) == len(read) == 1
    assert users.row("u3") == rows[0]


def test_history_files(tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    for text in (json.dumps(HISTORY), "\n".join(json.dumps(entry) for entry in HISTORY)):
        path.write_text(text)
        assert read_history(path) == HISTORY
    odd = [{"item_id": "i3", "task": "src", "query": "red\u2028lamp"}]  # a line to Python, none to JSON
    path.write_text(json.dumps(odd[0], ensure_ascii=False), encoding="utf-8")
    assert read_history(path) == odd
    path.write_text("i3, i7")
    with pytest.raises(RequestError, match="not a JSON list"):
        read_history(path)


def test_commands(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text(json.dumps(HISTORY))

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(app, [arguments[0], str(run_dir), *arguments[1:]])

    document = json.loads(
        call("recommend", "--history", str(tmp_path / "history.json"), "-k", "4", "--json").stdout
    )
    assert len(document["items"]) == 4
    assert np.diff([item["score"] for item in document["items"]]).max() <= 0
    found = json.loads(
        call("search", "--query", "xylophone mallet", "--candidates", "3", "-k", "3", "--json").stdout
    )
    assert "brand-new" in [item["item_id"] for item in found["items"]]
    assert (
        "xylophone mallet brand new"
        in call("search", "--query", "xylophone mallet", "--candidates", "3").stdout
    )
    for arguments in (
        ["recommend"],
        ["recommend", "--user", "nobody"],
        ["search", "--query", " "],
        ["search", "--query", "x", "-k", "0"],
    ):
        result = call(*arguments)
        assert result.exit_code == 1
        assert isinstance(result.exception, GensrError)
