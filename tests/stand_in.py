"""A model for tests of the service: it answers at once, or when it is told to. As a program, `python -m
tests.stand_in [--receive-s S] [--send-s S]`, it is a service in front of that model; its first line is the
port."""

import argparse
import time
from collections.abc import Mapping, Sequence
from threading import Event
from typing import Any

from trainer.errors import RequestError
from trainer.serving.app import Options, make_app, open_access_log, run
from trainer.serving.server import ConnectionLimits, bind
from trainer.serving.users import NoUsers

SECONDS_PER_CANDIDATE = 1e-4  # of a request whose query is "heavy"


class StandIn:
    """Answers every request with its own k. The query "slow" waits for `release`, "heavy" takes its time for
    each candidate, "big" has an answer of 8 MB, "bad" is refused, "broken" is a bug."""

    num_items, query_mode = 3, "natural"
    title, tasks, explains = "stand-in", ("rec", "src"), False
    users: Any = NoUsers("none are known")

    def __init__(self) -> None:
        self.facts = {"name": "stand-in", "version": "1"}
        self.batches: list[int] = []
        self.release = Event()

    def answer_or_errors(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | RequestError]:
        self.batches.append(len(requests))
        queries = [request.get("query") for request in requests]
        if "slow" in queries:
            self.release.wait(10)
        heavy = [request for request in requests if request.get("query") == "heavy"]
        time.sleep(SECONDS_PER_CANDIDATE * sum(request["num_candidates"] for request in heavy))
        if "broken" in queries:
            raise KeyError("/etc/secret")
        texts = ["x" * 8_000_000 if query == "big" else "a lamp" for query in queries]
        return [
            RequestError("the request: no such thing")
            if query == "bad"
            else {
                "items": [{"item_id": "i1", "score": request.get("k") or 0, "text": text}],
                "scores": [0.5],
                "model": self.facts,
            }
            for request, query, text in zip(requests, queries, texts, strict=True)
        ]

    def some_users(self, count: int) -> dict[str, Any]:
        return {"users": ["u1"], "reason": ""}

    def history_of(self, user_id: str) -> list[dict[str, Any]]:
        if user_id == "nobody":
            raise RequestError(f"no user {user_id!r}")
        return [{"item_id": "i1", "task": "rec", "text": "a lamp"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--receive-s", type=float, default=10.0)
    parser.add_argument("--send-s", type=float, default=10.0)
    parser.add_argument("--access-log", default="")
    given = parser.parse_args()
    bound = bind("127.0.0.1", 0)

    def on_ready() -> None:
        print(bound.getsockname()[1], flush=True)

    options = Options(access_log=open_access_log(given.access_log))
    connections = ConnectionLimits(receive_s=given.receive_s, send_s=given.send_s)
    app = make_app(StandIn(), options=options)  # type: ignore[arg-type]
    run(app, bound, on_ready=on_ready, connections=connections)


if __name__ == "__main__":
    main()
