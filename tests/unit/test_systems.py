"""Systems that a service compares: which one answers what, how they are named, and BM25 for queries that are
not in the data."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from trainer.data.folder import PreparedFolder
from trainer.errors import RequestError
from trainer.runs.weights import counted_model
from trainer.serving.systems import COUNTED, System, Systems, compared_systems, counted
from trainer.serving.users import NoUsers, Users


class Named:
    """Answers with its name and the query."""

    def __init__(self, name: str) -> None:
        self.name, self.batches = name, 0

    def answer_or_errors(self, requests: Sequence[Mapping[str, Any]]) -> list[Any]:
        self.batches += 1
        assert not [request for request in requests if "system" in request]
        return [{"by": self.name, "query": request["query"]} for request in requests]


@pytest.fixture(scope="module")
def users(prepared: Path) -> Users:
    return Users(PreparedFolder.at(prepared))


def test_requests_go_to_the_system_they_name_in_one_batch_each() -> None:
    model, other = Named("model"), Named("other")
    opened: list[str] = []

    def open_other() -> Named:
        opened.append("other")
        return other

    systems = Systems(
        [
            System("", "model", ("rec",), True, True, lambda: model),
            System("other", "other", ("rec",), True, True, open_other),
        ]
    )
    systems.answer_or_errors([{"query": "x"}])
    assert opened == []  # what nobody asks is not loaded
    asked = [{"query": "a", "system": "other"}, {"query": "b"}, {"query": "c", "system": "other"}] * 2
    answers: list[Any] = systems.answer_or_errors(asked)
    assert [(answer["by"], answer["query"]) for answer in answers] == [
        ("other", "a"),
        ("model", "b"),
        ("other", "c"),
    ] * 2
    assert opened == ["other"] and (model.batches, other.batches) == (2, 1)
    unknown, known = systems.answer_or_errors([{"query": "a", "system": "third"}, {"query": "b"}])
    assert isinstance(unknown, RequestError) and re.search(r"no 'third' here.*or: other", str(unknown))
    assert known == {"by": "model", "query": "b"}


def test_names_differ_and_hold_no_folder(users: Users) -> None:
    model = counted("popularity", users)
    names = ["/home/ann/runs/one", "runs/one/", "runs/bm25", "models:/demo@champion"]
    systems = compared_systems([(name, model) for name in names], users)
    assert [system.name for system in systems] == [
        *("one", "one (2)", "bm25 (2)", "demo@champion"),
        *COUNTED,
    ]
    assert compared_systems([], NoUsers("the folder is not here")) == compared_systems([], None) == []


@pytest.mark.parametrize("name", ["popularity", "item_knn"])
def test_a_model_that_ranks_the_whole_catalogue_leaves_out_the_history(users: Users, name: str) -> None:
    recommender = counted(name, users)
    (user,) = users.some(1)
    seen = {click["item_id"] for click in users.history(user, recommender.scorer.item_ids)}
    answer = recommender.recommend({"task": "rec", "user_id": user, "k": 20})
    assert len(answer["items"]) == 20 and not seen & {item["item_id"] for item in answer["items"]}
    assert seen & {
        item["item_id"]
        for item in recommender.recommend(
            {"task": "rec", "user_id": user, "k": recommender.num_items, "include_seen": True}
        )["items"]
    }


@pytest.mark.parametrize("name", ["bm25", "bm25_popularity"])
def test_bm25_answers_queries_that_are_not_in_the_data(users: Users, name: str) -> None:
    """A request's query is a row of no table of the folder. Scores of one that is in the data are those of
    evaluation."""
    recommender, folder = counted(name, users), users.folder
    queries = folder.query_texts()
    text, item_ids = queries[5], folder.item_ids()
    (scores,) = recommender.score(
        [{"task": "src", "history": [], "query": text, "candidates": item_ids[:40]}]
    )
    model = counted_model(name, {}, folder)
    events = recommender.scorer._batch(  # a batch of evaluation names the query by its row
        [recommender.scorer.parse({"task": "src", "query": text, "history": []}, "", needs_candidates=False)],
        [list(range(40))],
        type("Row", (), {"row": lambda self, text: 5})(),
        1,
    )
    assert scores == pytest.approx(model.probability(model.score(events))[0].tolist(), abs=1e-6)
    wanted = folder.items("text")["text"][7].as_py()
    assert f"{wanted} zyx" not in queries
    found = recommender.recommend({"task": "src", "query": f"{wanted} zyx", "k": 3, "with_text": True})
    assert words(wanted) & words(found["items"][0]["text"])


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
