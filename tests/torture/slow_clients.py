"""URL [--clients 150 --patience-s 15 --leavers 100 --query "red lamp"]: what clients that stall or leave do
to a running `gensr serve`.

One attack after the other: clients that connect and say nothing, that send half their headers, half a body,
that do not read their answer, and that ask for something heavy and leave. During each attack an ordinary
client asks; after --patience-s the attackers' connections must have been closed. Prints a JSON line for each
attack; exit code 1 when an ordinary request was not answered with 200 within --answer-s, or connections
stayed.
"""

import argparse
import json
import select
import socket
import sys
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

Address = tuple[str, int]
Body = dict[str, Any]


def request_bytes(address: Address, path: str, body: Body) -> bytes:
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(text) + text


def open_clients(address: Address, count: int, first_bytes: bytes) -> list[socket.socket]:
    """Connections that have sent `first_bytes` and read nothing. Those that the service refuses are left
    out."""
    clients = []
    for _ in range(count):
        try:
            client = socket.create_connection(address, timeout=5)
            clients.append(client)
            client.sendall(first_bytes)
        except OSError:
            continue
    return clients


def leave(address: Address, count: int, request: bytes) -> list[socket.socket]:
    """Ask for something, and close the connection without reading."""
    for client in open_clients(address, count, request):
        client.close()
    return []


def attacks(address: Address, num_clients: int, num_leavers: int, query: str) -> dict[str, Any]:
    """Name → function that starts it."""
    heavy = {"query": query, "history": [], "k": 1000, "num_candidates": 2000, "with_text": True}
    whole = request_bytes(address, "/search", heavy)

    def opens(first_bytes: bytes) -> Callable[[], list[socket.socket]]:
        return lambda: open_clients(address, num_clients, first_bytes)

    return {
        "silent": opens(b""),
        "half a header": opens(whole[:40]),
        "half a body": opens(whole[:-5]),
        "unread answer": opens(whole),
        "left": lambda: leave(address, num_leavers, whole),
    }


def ask(address: Address, path: str, body: Body | None, answer_s: float) -> tuple[int, float]:
    """(status, seconds) of one ordinary request on a connection of its own; status 0: no answer."""
    started = time.monotonic()
    connection = HTTPConnection(*address, timeout=answer_s)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        status = connection.getresponse().status
    except (OSError, HTTPException):
        status = 0
    finally:
        connection.close()
    return status, round(time.monotonic() - started, 2)


def still_open(clients: list[socket.socket], patience_s: float, reads: bool) -> int:
    """How many of the connections the service has not closed after a while. reads: take what it has sent;
    else only look whether it is gone (a client that reads is a slow reader no more)."""
    until = time.monotonic() + patience_s
    left = list(clients)
    while left and time.monotonic() < until:
        left = [client for client in left if not is_closed(client, reads)]
        time.sleep(0.1)
    return len(left)


def is_closed(client: socket.socket, reads: bool) -> bool:
    if not reads:
        poll = select.poll()
        poll.register(client, select.POLLRDHUP)
        return bool(poll.poll(0))
    client.setblocking(False)
    try:
        while client.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def attack(
    address: Address, name: str, start: Callable[[], list[socket.socket]], query: str, given: Any
) -> dict[str, Any]:
    """Starts one attack, asks meanwhile, and waits until its connections are gone."""
    clients = start()
    asked = [
        ask(address, "/health", None, given.answer_s),
        ask(address, "/search", {"query": query, "history": [], "k": 3}, given.answer_s),
    ]
    stayed = still_open(clients, given.patience_s, reads=name != "unread answer")
    for client in clients:
        client.close()
    return {
        "attack": name,
        "clients": len(clients),
        "statuses": [status for status, _ in asked],
        "slowest_s": max(seconds for _, seconds in asked),
        "still_open": stayed,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=150)
    parser.add_argument("--leavers", type=int, default=100)
    parser.add_argument(
        "--patience-s", type=float, default=15.0, help="until a stalled connection must be gone"
    )
    parser.add_argument("--answer-s", type=float, default=10.0, help="for an ordinary request")
    parser.add_argument("--query", default="red lamp", help="of an ordinary search")
    parser.add_argument("--heavy-query", default="", help="of the requests that are heavy; default: --query")
    parser.add_argument("--only", nargs="*", default=[], help="names of attacks; default: all")
    given = parser.parse_args(arguments)
    url = urlsplit(given.url)
    address = (url.hostname or "127.0.0.1", url.port or 80)
    failed = False
    for name, start in attacks(
        address, given.clients, given.leavers, given.heavy_query or given.query
    ).items():
        if given.only and name not in given.only:
            continue
        result = attack(address, name, start, given.query, given)
        print(json.dumps(result), flush=True)
        failed |= result["statuses"] != [200, 200] or result["still_open"] > 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
