"""URL [--clients 1 8 32 --seconds 10 --candidates 100]: requests per second and latency of a running `gensr
serve`, by number of clients.

Each client keeps one connection and asks again as soon as it has its answer: recommendations for users of the
service, every fourth request a search with the text of an item that was recommended before. Prints a line for
each number of clients, then one JSON object. An answer without items is an error.
"""

import argparse
import json
import sys
import threading
import time
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import numpy as np


class Client(threading.Thread):
    """Asks until `until`; keeps the latency of every answer and the first reason of a failure."""

    def __init__(
        self,
        host: str,
        port: int,
        users: list[Any],
        only_numbers: bool,
        seed: int,
        until: float,
        num_candidates: int,
    ) -> None:
        super().__init__(daemon=True)
        self.connection = HTTPConnection(host, port, timeout=60)
        self.users = users
        self.only_numbers = only_numbers
        self.until = until
        self.num_candidates = num_candidates
        self.random = np.random.default_rng(seed)
        self.latencies_s: list[float] = []
        self.errors: list[str] = []

    def run(self) -> None:
        text = ""
        while time.perf_counter() < self.until:
            path = "/recommend"
            body = {"user_id": self.users[self.random.integers(len(self.users))], "with_text": True}
            if text and len(self.latencies_s) % 4 == 3:
                path, body = "/search", {**body, "query": text}
            started = time.perf_counter()
            status, answer = self.ask(path, {**body, "num_candidates": self.num_candidates})
            self.latencies_s.append(time.perf_counter() - started)
            if status != 200 or not answer.get("items"):
                self.errors.append(f"{status} {answer.get('error', 'no items')}")
            else:
                words = answer["items"][0]["text"].split()
                text = " ".join([word for word in words if word.isdigit() or not self.only_numbers][:3])

    def ask(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())


def load(
    host: str,
    port: int,
    users: list[Any],
    only_numbers: bool,
    num_clients: int,
    seconds: float,
    num_candidates: int,
) -> dict[str, Any]:
    started = time.perf_counter()
    clients = [
        Client(host, port, users, only_numbers, seed, started + seconds, num_candidates)
        for seed in range(num_clients)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    wall_s = time.perf_counter() - started
    latencies_ms = 1000 * np.concatenate([client.latencies_s for client in clients])
    p50, p95, p99 = np.percentile(latencies_ms, [50, 95, 99])
    errors = [error for client in clients for error in client.errors]
    row = {
        "clients": num_clients,
        "requests": len(latencies_ms),
        "requests_per_s": round(len(latencies_ms) / wall_s, 1),
    }
    return {
        **row,
        "p50_ms": round(p50, 1),
        "p95_ms": round(p95, 1),
        "p99_ms": round(p99, 1),
        "errors": len(errors),
        "first_error": (errors or [""])[0],
    }


def get(host: str, port: int, path: str) -> dict[str, Any]:
    connection = HTTPConnection(host, port, timeout=60)
    connection.request("GET", path)
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--candidates", type=int, default=100, help="that the model ranks in each request")
    options = parser.parse_args()
    url = urlsplit(options.url)
    host, port = url.hostname or "127.0.0.1", url.port or 80
    users, only_numbers = get(host, port, "/users")["users"], get(host, port, "/model")["queries"] == "words"
    if not users:
        print(f"{options.url} knows no users: start it where its prepared folder is", file=sys.stderr)
        return 1
    rows = []
    for num_clients in options.clients:
        rows.append(load(host, port, users, only_numbers, num_clients, options.seconds, options.candidates))
        print(
            "  ".join(
                f"{name} {value}" for name, value in rows[-1].items() if name != "first_error" or value
            ),
            file=sys.stderr,
        )
    print(json.dumps({"seconds": options.seconds, "candidates": options.candidates, "load": rows}))
    return 0 if not any(row["errors"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
