"""The web application around a model: statuses, limits, batches. The model is a stand-in;
tests/integration/test_page.py and test_registry_to_user.py have a real one, and
tests/integration/test_slow_clients.py a real server."""

import contextlib
import io
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from tests.stand_in import StandIn
from trainer.cli import app as cli
from trainer.errors import EnvironmentProblem
from trainer.serving.app import USERS_OFF, Limits, Options, make_app, open_access_log
from trainer.serving.metrics import Metrics
from trainer.serving.payloads import Answer
from trainer.serving.server import bind, connection_budget
from trainer.serving.systems import System

URL = "http://127.0.0.1"
QUERY_NEEDS = "must be text of at most 2000 characters, or a list of at most 256 word numbers"


class Queries:
    """Of trainer/serving/users.py, what the service asks for."""

    reason = ""

    def frequent_queries(self, count: int) -> list[str]:
        return ["red lamp"]


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture
def client(stand_in: StandIn) -> Iterator[TestClient]:
    app = make_app(stand_in, Limits(max_body_bytes=2000, max_batch=4, max_waiting=8, timeout_s=5.0))  # type: ignore[arg-type]
    with TestClient(app, URL, raise_server_exceptions=False) as client:
        yield client
        stand_in.release.set()


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_answers_health_and_the_page(client: TestClient) -> None:
    assert client.post("/recommend", json={"user_id": 3, "k": 7}).json()["items"] == [
        {"item_id": "i1", "score": 7, "text": "a lamp"}
    ]
    assert client.post("/search", json={"query": "lamp"}).status_code == 200
    assert client.post("/score", json={"task": "rec", "candidates": [1]}).status_code == 200
    health = {"status": "ok", "model": {"name": "stand-in", "version": "1"}, "problem": ""}
    assert client.get("/health").json() == health
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
            "history.0.task: Input should be 'rec' or 'src', got 'buy'",
        ),
        ("/recommend", {"user": 3}, "user: the field 'user' is not read. Did you mean user_id?"),
        (
            "/recommend",
            {"history": [{"item_id": 1, "item": 1}]},
            "history.0.item: the field 'item' is not read. Did you mean item_id?",
        ),
        ("/score", {"task": "rec"}, "candidates: Field required"),
        ("/score", {"task": "rec", "candidates": []}, "candidates: List should have at least 1 item"),
        (
            "/recommend",
            {"k": "many"},
            "k: Input should be a valid integer, unable to parse string as an integer, got 'many'",
        ),
        ("/search", {"query": 5}, f"query: {QUERY_NEEDS}, got 5"),
        ("/search", {"query": ["red", 2]}, f"query: {QUERY_NEEDS}, got ['red', 2]"),
        ("/search", {"query": [1] * 257}, f"query: {QUERY_NEEDS}, got [1, 1, 1, 1, 1, 1, ...]"),
        (
            "/search",
            {"query": "a", "history": [{"item_id": 1, "query": {}}]},
            f"history.0.query: {QUERY_NEEDS}, got {{}}",
        ),
        (
            "/score",
            {"task": "rec", "candidates": ["i1", 1.5]},
            "candidates.1: must be a whole number or text of at most 256 characters, got 1.5",
        ),
        (
            "/recommend",
            {"user_id": True},
            "user_id: must be a whole number or text of at most 256 characters, got True",
        ),
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
    assert answer.json()["error"].startswith("the body is not JSON: Expecting property name")


@pytest.mark.parametrize("declared", ["text/plain", "application/x-www-form-urlencoded", "", None])
def test_a_body_that_is_not_declared_as_json_is_415(client: TestClient, declared: str | None) -> None:
    headers = {} if declared is None else {"Content-Type": declared}
    answer = client.post("/recommend", content=b"{}", headers=headers)
    assert (answer.status_code, "Content-Type: application/json" in answer.json()["error"]) == (415, True)
    declared = "Application/JSON; charset=utf-8"
    assert client.post("/recommend", content=b"{}", headers={"Content-Type": declared}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1900,
        b'{"query": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"k": NaN}',
        b'{"query": "\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"user_id": "\\udfff\\udfff"}',
        b'{"query": {"a": []}}',
        b'{"history": [{"item_id": [1], "task": ["rec"]}]}',
        b'{"history": {"item_id": 1}}',
        b'{"candidates": [[1]]}',
        b"\xff\xfe\x00",
        b"null",
        b"",
    ],
)
def test_odd_json_is_400_with_a_reason(client: TestClient, body: bytes, capsys: Any) -> None:
    answer = client.post("/search", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [RecursionError, MemoryError])
def test_a_body_that_exhausts_the_parser_is_400(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def exhausted(text: bytes) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("starlette.requests.json.loads", exhausted)
        answer = client.post("/search", content=b"{}", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


def test_an_unknown_user_is_400_and_an_unknown_page_404(client: TestClient) -> None:
    assert client.get("/users/nobody/history").json() == {"error": "no user 'nobody'"}
    for path in ("/nothing", "/../app.py", "/%2e%2e/app.py", "/..%2fapp.py"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})


def test_a_wrong_method_is_405_and_heads_are_answered(client: TestClient) -> None:
    for method, path, status in (
        ("HEAD", "/health", 200),
        ("HEAD", "/ready", 200),
        ("HEAD", "/", 200),
        ("GET", "/app.js", 200),
        ("GET", "/recommend", 405),
        ("POST", "/health", 405),
        ("POST", "/app.js", 405),
        ("POST", "/nowhere", 404),
    ):
        body: Any = {} if method == "POST" else None
        assert client.request(method, path, json=body).status_code == status, (method, path)
    assert client.get("/recommend").headers["allow"] == "POST"


def test_ids_of_users_may_hold_anything(client: TestClient) -> None:
    for asked, user_id in (("a%2Fb", "a/b"), ("a%2Fhistory", "a/history"), ("%3F", "?"), ("", "")):
        assert client.get(f"/users/{asked}/history").json()["user_id"] == user_id


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


def test_other_host_names_are_refused_on_loopback(client: TestClient, stand_in: StandIn) -> None:
    for host in ("evil.example", "testserver", "localhost.evil.example", "", "[::2]"):
        answer = client.get("/model", headers={"Host": host})
        assert (answer.status_code, "host name" in answer.json()["error"]) == (400, True), host
    for host in ("localhost:8000", "LOCALHOST", "127.0.0.1", "[::1]:8000"):
        assert client.get("/model", headers={"Host": host}).status_code == 200, host
    with TestClient(make_app(stand_in, options=Options(host="0.0.0.0")), URL) as client:  # type: ignore[arg-type]
        assert client.get("/model", headers={"Host": "gensr.example"}).status_code == 200


def test_users_are_shown_on_loopback_only_unless_they_are_exposed(stand_in: StandIn) -> None:
    shown = ({"users": ["u1"], "reason": ""}, 200, ["red lamp"], 200)
    hidden: tuple[Any, ...] = ({"users": [], "reason": USERS_OFF}, 403, [], 403)
    for options, expected in (
        (Options(), shown),
        (Options(host="::1"), shown),
        (Options(host="0.0.0.0", expose_users=True), shown),
        (Options(host="0.0.0.0"), hidden),
        (Options(host="gensr.example"), hidden),
        (Options(host="::"), hidden),
    ):
        stand_in.users = Queries()
        with TestClient(make_app(stand_in, options=options), URL) as client:  # type: ignore[arg-type]
            answers = (
                client.get("/users").json(),
                client.get("/users/u1/history").status_code,
                client.get("/queries").json()["queries"],
                client.post("/recommend", json={"user_id": "u1", "explain": True}).status_code,
            )
            assert answers == expected, options
            assert client.post("/recommend", json={"user_id": "u1"}).status_code == 200
            assert client.post("/recommend", json={"history": [], "explain": True}).status_code == 200
    assert Options().warning == ""
    assert "are off" in Options(host="0.0.0.0").warning
    assert "everyone there can read" in Options(host="0.0.0.0", expose_users=True).warning


def test_no_folder_of_this_machine_is_shown(stand_in: StandIn) -> None:
    stand_in.facts = {"run": "/home/ann/runs/one", "manifest_hash": "12", "retriever": "/home/ann/runs/knn"}
    with TestClient(make_app(stand_in), URL) as client:  # type: ignore[arg-type]
        texts = [
            client.get("/model").text,
            client.get("/metrics").text,
            client.post("/recommend", json={}).text,
        ]
    assert all("ann" not in text and "one" in text for text in texts), texts


def test_answers_fit_their_models_and_docs_are_shown_when_asked_for(
    client: TestClient, stand_in: StandIn
) -> None:
    Answer.model_validate(client.post("/recommend", json={}).json())
    assert {client.get(path).status_code for path in ("/docs", "/openapi.json", "/redoc")} == {404}
    with TestClient(make_app(stand_in, options=Options(docs=True)), URL) as client:  # type: ignore[arg-type]
        document = client.get("/openapi.json").json()
        page = client.get("/docs").text
    schemas = document["components"]["schemas"]
    assert {"Ask", "AskScores", "Answer", "Error", "Facts", "KnownUsers", "History"} <= set(schemas)
    for text in (*document["paths"], "The best items of the whole catalogue", 'href="#Answer"'):
        assert text in page


def test_other_systems_answer_when_they_are_named(stand_in: StandIn) -> None:
    other = StandIn()
    other.facts = {"name": "other", "version": "2"}
    system = System("other", "Other", ("src",), False, True, lambda: other)
    with TestClient(make_app(stand_in, others=[system]), URL) as client:  # type: ignore[arg-type]
        facts = client.get("/model").json()
        assert [(one["name"], one["title"], one["tasks"]) for one in facts["systems"]] == [
            ("", "stand-in", ["rec", "src"]),
            ("other", "Other", ["src"]),
        ]
        asked = client.post("/search", json={"query": "a", "system": "other"}).json()
        assert asked["model"] == {"name": "other", "version": "2"}
        assert client.post("/search", json={"query": "a"}).json()["model"] == stand_in.facts
        refused = client.post("/search", json={"query": "a", "system": "none"})
        assert (refused.status_code, "no 'none' here" in refused.json()["error"]) == (400, True)
        history = [{"item_id": "i1", "task": "src", "query": "lamp"}]
        assert client.post("/recommend", json={"history": history}).status_code == 200


def test_metrics_and_the_access_log(stand_in: StandIn) -> None:
    log = io.StringIO()
    options = Options(access_log=log)
    with TestClient(make_app(stand_in, options=options), URL) as client:  # type: ignore[arg-type]
        client.post("/search", json={"query": "a", "user_id": "ann"})
        client.post("/search", json={"query": "bad", "user_id": "ann"})
        client.get("/users/ann/history")
        client.get("/ann.html")
        metrics = client.get("/metrics")
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = metrics.text.splitlines()
    for line in (
        'gensr_requests_total{path="/search",status="200"} 1',
        'gensr_requests_total{path="/search",status="400"} 1',
        'gensr_requests_total{path="/users/{user_id}/history",status="200"} 1',
        'gensr_request_seconds_bucket{path="/search",le="+Inf"} 2',
        'gensr_request_seconds_count{path="/search"} 2',
        "gensr_queue_length 0",
        'gensr_batch_size_bucket{le="1"} 2',
        "gensr_batch_size_count 2",
        'gensr_model_info{name="stand-in",version="1"} 1',
    ):
        assert line in lines, metrics.text
    samples = re.compile(r'[a-z_]+(\{([a-z_]+="[^"]*",?)+\})? [0-9.]+')
    assert all(line.startswith(("# HELP ", "# TYPE ")) or samples.fullmatch(line) for line in lines)
    records = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(record["method"], record["path"], record["status"]) for record in records] == [
        ("POST", "/search", 200),
        ("POST", "/search", 400),
        ("GET", "/users/{user_id}/history", 200),
        ("GET", "other", 404),
        ("GET", "/metrics", 200),
    ]
    assert records[0].keys() == {"time", "method", "path", "status", "ms", "request_bytes", "response_bytes"}
    assert records[0]["request_bytes"] == len('{"query":"a","user_id":"ann"}')
    assert "ann" not in log.getvalue() + metrics.text


def test_a_log_that_cannot_be_written_costs_no_answer(stand_in: StandIn) -> None:
    with open("/dev/full", "w") as full:
        options = Options(access_log=full)
        with TestClient(make_app(stand_in, options=options), URL) as client:  # type: ignore[arg-type]
            assert [client.get("/health").status_code for _ in range(3)] == [200] * 3
        with contextlib.suppress(OSError):
            full.close()


def test_a_label_of_prometheus_is_escaped() -> None:
    assert 'name="a\\\\b\\"c\\nd"' in Metrics({"name": 'a\\b"c\nd'}).text(0)


def test_a_port_in_use_is_told_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.registry.store.open_model", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for arguments in (["serve", "runs/one", "--port", port], ["ui", "runs/one", "--port", port]):
            result = CliRunner().invoke(cli, arguments)
            assert isinstance(result.exception, EnvironmentProblem), result.output
            assert f"port {port}: Address already in use" in str(result.exception)
    with pytest.raises(EnvironmentProblem, match="no such address"):
        bind("no.such.host.invalid", 0)
    with pytest.raises(EnvironmentProblem, match="--access-log"):
        open_access_log("/nowhere/at/all.log")


@pytest.mark.parametrize(
    "option", [("--max-batch", "0"), ("--max-batch", "-1"), ("--max-waiting", "0"), ("--timeout", "0")]
)
def test_limits_that_answer_nobody_are_refused(option: tuple[str, str]) -> None:
    result = CliRunner().invoke(cli, ["serve", "runs/one", *option])
    assert result.exit_code == 2 and option[0] in result.output


def test_a_browser_in_the_terminal_does_not_hold_up_the_service(
    monkeypatch: pytest.MonkeyPatch, stand_in: StandIn
) -> None:
    """One that ends with its last page: here once the service has been up for a while."""
    opened, closed, ended = Event(), Event(), Event()

    def browser(url: str) -> None:
        opened.set()
        closed.wait(10)
        ended.set()

    def run(*given: Any, **_: Any) -> None:
        given[3]()  # on_ready
        assert opened.wait(10) and not ended.is_set()

    monkeypatch.setattr("webbrowser.open", browser)
    monkeypatch.setattr("trainer.registry.store.open_model", lambda *_, **__: stand_in)
    monkeypatch.setattr("trainer.serving.app.run", run)
    result = CliRunner().invoke(cli, ["ui", "runs/one", "--port", "0"])
    closed.set()
    assert result.exit_code == 0, result.output


def test_few_files_are_few_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    open_now = len(os.listdir("/proc/self/fd"))
    for allowed, (least, most) in ((open_now + 100, (4, 100)), (open_now, (1, 4)), (10**6, (512, 512))):
        monkeypatch.setattr("resource.getrlimit", lambda _, allowed=allowed: (allowed, allowed))
        connections, backlog = connection_budget(512)
        assert least <= connections <= most and backlog >= 1
        assert connections + backlog <= max(allowed - open_now, 4)


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
    assert stand_in.batches == [1, 4]


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
    with TestClient(make_app(stand_in, Limits(timeout_s=0.2)), URL) as client:  # type: ignore[arg-type]
        assert client.post("/search", json={"query": "slow"}).status_code == 504
        stand_in.release.set()
        assert client.post("/search", json={"query": "a"}).status_code == 200
