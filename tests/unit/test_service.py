"""The web application around a model: statuses, limits, batches. The model is a stand-in;
tests/integration/test_service.py has a real one."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from trainer.errors import RequestError
from trainer.serving.app import Limits, make_app


class StandIn:
    """Answers a request with its own k; "slow" waits for `release`, "bad" is refused, "broken" is a bug."""

    num_items, query_mode = 3, "natural"

    def __init__(self) -> None:
        self.facts = {"name": "stand-in", "version": "1"}
        self.batches: list[int] = []
        self.release = threading.Event()

    def answer(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        self.batches.append(len(requests))
        queries = [request.get("query") for request in requests]
        if "slow" in queries:
            self.release.wait(10)
        if "broken" in queries:
            raise KeyError("/etc/secret")
        if "bad" in queries:
            raise RequestError("the request: no such thing")
        return [
            {
                "items": [{"item_id": "i1", "score": request.get("k") or 0}],
                "scores": [0.5],
                "model": self.facts,
            }
            for request in requests
        ]

    def some_users(self, count: int) -> dict[str, Any]:
        return {"users": [], "reason": "none"}

    def history_of(self, user_id: str) -> list[dict[str, Any]]:
        raise RequestError(f"no user {user_id!r}")


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture
def client(stand_in: StandIn) -> Iterator[TestClient]:
    app = make_app(stand_in, Limits(max_body_bytes=2000, max_batch=4, max_waiting=8, timeout_s=5.0))  # type: ignore[arg-type]
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
        stand_in.release.set()


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_answers_health_and_the_page(client: TestClient) -> None:
    assert client.post("/recommend", json={"user_id": 3, "k": 7}).json()["items"] == [
        {"item_id": "i1", "score": 7}
    ]
    assert client.post("/search", json={"query": "lamp"}).status_code == 200
    assert client.post("/score", json={"task": "rec", "candidates": [1]}).status_code == 200
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"ready": True, "waiting": 0}
    assert client.get("/model").json()["limits"]["max_body_bytes"] == 2000
    page = client.get("/")
    assert "<title>gensr</title>" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/search", {"query": "bad"}, "no such thing"),
        ("/recommend", {"history": [{"task": "rec"}]}, "history.0.item_id: Field required"),
        (
            "/recommend",
            {"history": [{"item_id": 1, "task": "buy"}]},
            "history.0.task: Input should be 'rec' or 'src'",
        ),
        ("/recommend", {"user": 3}, "user: Extra inputs are not permitted"),
        ("/score", {"task": "rec"}, "candidates: Field required"),
        ("/score", {"task": "rec", "candidates": []}, "candidates: List should have at least 1 item"),
        ("/recommend", {"k": "many"}, "k: Input should be a valid integer"),
        ("/recommend", [1, 2], "the request: Input should be a valid dictionary"),
    ],
)
def test_a_bad_request_is_400_with_the_reason(client: TestClient, path: str, body: Any, reason: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_no_json_is_400(client: TestClient) -> None:
    answer = client.post("/recommend", content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "JSON decode error" in answer.json()["error"]


def test_an_unknown_user_is_400_and_an_unknown_page_404(client: TestClient) -> None:
    assert client.get("/users/nobody/history").json() == {"error": "no user 'nobody'"}
    for path in ("/nothing", "/../app.py", "/%2e%2e/app.py", "/..%2fapp.py"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})


def test_a_bug_is_500_without_its_story(client: TestClient) -> None:
    answer = client.post("/search", json={"query": "broken"})
    assert answer.status_code == 500
    assert answer.json()["error"].startswith("internal error ")
    assert "secret" not in answer.text


def test_a_large_body_is_413_whatever_its_header_says(client: TestClient) -> None:
    assert client.post("/recommend", json={"query": "x" * 3000}).status_code == 413

    def pieces() -> Iterator[bytes]:  # sent in chunks: no Content-Length
        yield b'{"query": "'
        for _ in range(30):
            yield b"x" * 100
        yield b'"}'

    answer = client.post("/recommend", content=pieces(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (413, "the request is larger than 2,000 bytes")


def test_other_host_names_are_refused_on_loopback(client: TestClient) -> None:
    assert client.get("/model", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/model", headers={"Host": "localhost:8000"}).status_code == 200


def test_what_arrives_meanwhile_is_one_batch_and_a_bad_one_fails_alone(
    client: TestClient, stand_in: StandIn
) -> None:
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.post, "/search", json={"query": "slow"})
        wait_for(lambda: stand_in.batches == [1])
        others = [
            pool.submit(client.post, "/search", json={"query": query, "k": k})
            for k, query in enumerate(["a", "bad", "c", "d"])
        ]
        wait_for(lambda: client.get("/ready").json()["waiting"] == 4)
        stand_in.release.set()
        assert first.result().status_code == 200
        answers = [other.result() for other in others]
    assert [answer.status_code for answer in answers] == [200, 400, 200, 200]
    assert [answer.json()["items"][0]["score"] for answer in answers if answer.status_code == 200] == [
        0,
        2,
        3,
    ]
    assert stand_in.batches == [1, 4, 1, 1, 1, 1]


def test_a_full_queue_is_503_and_readiness_says_so(client: TestClient, stand_in: StandIn) -> None:
    with ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(client.post, "/search", json={"query": "slow"})]
        wait_for(lambda: stand_in.batches == [1])
        waiting += [pool.submit(client.post, "/recommend", json={}) for _ in range(8)]
        wait_for(lambda: client.get("/ready").json()["waiting"] == 8)
        refused = client.post("/recommend", json={})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        stand_in.release.set()
        assert {answer.result().status_code for answer in waiting} == {200}


def test_an_answer_that_takes_too_long_is_504_and_the_next_one_is_served(stand_in: StandIn) -> None:
    with TestClient(make_app(stand_in, Limits(timeout_s=0.2))) as client:  # type: ignore[arg-type]
        assert client.post("/search", json={"query": "slow"}).status_code == 504
        stand_in.release.set()
        assert client.post("/search", json={"query": "a"}).status_code == 200
