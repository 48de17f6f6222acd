"""Values of every odd kind in every field of a request: an answer, or a RequestError that names no folder."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.runs import make_run
from trainer.errors import RequestError
from trainer.serving.app import make_app
from trainer.serving.payloads import Answer
from trainer.serving.recommend import Recommender

ODD: list[Any] = [
    *(None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**400, 10**30),
    *("", "x", "²", "٣", "9" * 23, "\ud800", b"x"),
    *([], [1], [[1]], ["\ud800"], [10**30], [-5], [None], ["²"], {}, {"a": 1}),
    *(np.array([1, 2]), np.array(["rec", "src"])),
]
FIELDS = ["history", "task", "query", "candidates", "k", "num_candidates", "user_id"]
FIELDS += ["include_seen", "explain", "with_text"]


@pytest.fixture(scope="module", params=["prepared", "prepared_words"])
def recommender(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    source: Path = request.getfixturevalue(request.param)
    return Recommender.from_run(make_run(tmp_path_factory.mktemp("odd"), source))


def odd_requests(recommender: Recommender) -> list[dict[str, Any]]:
    item_id = recommender.scorer.item_ids[0]
    query = "1 2" if recommender.query_mode == "words" else "red lamp"
    good: dict[str, Any] = {"history": [{"item_id": item_id, "task": "rec"}], "task": "src", "query": query}
    good["candidates"] = [item_id]  # not the whole catalogue: the test is about what is read
    requests = [{**copy.deepcopy(good), field: odd} for field in FIELDS for odd in ODD]
    requests += [{"user_id": odd, "task": "rec"} for odd in ODD]
    for odd in ODD:
        histories = ([odd], [{"item_id": odd, "task": "rec"}], [{"item_id": item_id, "task": odd}])
        requests += [{**good, "history": history} for history in histories]
    return requests


def test_the_recommender_answers_or_says_what_is_wrong(recommender: Recommender) -> None:
    folder = str(recommender._items_file.parents[2])
    reasons = []
    for request in odd_requests(recommender):
        try:
            recommender.answer([request])
        except RequestError as error:
            reasons.append(str(error))
    assert len(reasons) > 200
    assert not [reason for reason in reasons if folder in reason]


def test_the_service_answers_200_or_400(recommender: Recommender) -> None:
    folder = str(recommender._items_file.parents[2])
    with TestClient(make_app(recommender), "http://127.0.0.1", raise_server_exceptions=False) as client:
        for request in odd_requests(recommender):
            body = {name: value for name, value in request.items() if name != "task"}
            try:
                text = json.dumps(body)
            except TypeError:  # no JSON can hold it
                continue
            answer = client.post("/search", content=text, headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 400), (text, answer.text)
            assert folder not in answer.text
            if answer.status_code == 200:
                Answer.model_validate(answer.json())
        for path in ("/model", "/users", "/queries", "/users/nobody/history", "/metrics"):
            assert folder not in client.get(path).text, path


def test_example_queries_are_the_most_frequent_and_can_be_asked(recommender: Recommender) -> None:
    with TestClient(make_app(recommender), "http://127.0.0.1") as client:
        queries = client.get("/queries").json()["queries"]
        assert len(queries) == len(set(queries)) == 20
        assert client.post("/search", json={"query": queries[0]}).json()["items"]
