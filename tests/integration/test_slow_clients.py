"""A service as a process of its own, with few files to open, and clients that stall, leave or end it: a small
share of tests/torture/slow_clients.py."""

import json
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest

from tests.torture import slow_clients

FILES = 96  # that the service may open
RECEIVE_S, SEND_S = 1.5, 1.5


class Service:
    """`python -m tests.stand_in`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log = folder / "service.log"
        command = [sys.executable, "-m", "tests.stand_in", *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES)),
            )
        assert self.process.stdout is not None
        port = self.process.stdout.readline().strip()
        assert port, self.log.read_text()
        self.address = ("127.0.0.1", int(port))

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        connection = HTTPConnection(*self.address, timeout=20)
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, json.loads(text) if text.startswith(b"{") else text.decode()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    service = Service(folder, "--receive-s", str(RECEIVE_S), "--send-s", str(SEND_S))
    yield service
    service.stop()


def num_computed(service: Service) -> float:
    lines = service.ask("/metrics")[1].splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("gensr_batch_size_sum"))


@pytest.mark.parametrize("name", ["silent", "half a header", "half a body"])
def test_clients_that_stall_are_closed_and_nobody_waits_for_them(
    service: Service, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """More of them than the service may open files."""
    url = f"http://127.0.0.1:{service.address[1]}"
    arguments = ["--clients", str(FILES + 30), "--patience-s", "6", "--answer-s", "3", "--only", name]
    assert slow_clients.main([url, *arguments]) == 0, capsys.readouterr().out
    assert service.log.stat().st_size < 2000
    _, metrics = service.ask("/metrics")
    assert 'gensr_connections_closed_total{reason="too many connections"}' in metrics
    assert 'gensr_connections_closed_total{reason="slow request"}' in metrics


def test_a_client_that_does_not_read_its_answer_is_closed(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{service.address[1]}"
    arguments = ["--clients", "4", "--patience-s", "10", "--answer-s", "5", "--only", "unread answer"]
    assert slow_clients.main([url, *arguments, "--heavy-query", "big"]) == 0, capsys.readouterr().out
    assert 'reason="slow reader"} 4' in service.ask("/metrics")[1]


def test_what_clients_that_left_asked_for_is_not_computed(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    """60 requests of 0.2 s each: computed to the end they would take 12 s. Two of them are a batch."""
    before = num_computed(service)
    url = f"http://127.0.0.1:{service.address[1]}"
    arguments = ["--leavers", "60", "--answer-s", "3", "--only", "left", "--heavy-query", "heavy"]
    assert slow_clients.main([url, *arguments]) == 0, capsys.readouterr().out
    assert num_computed(service) - before < 10  # with the ordinary one
    assert 'path="/search",status="499"' in service.ask("/metrics")[1]


def test_a_slow_request_reads_408_and_a_pipelined_half_one_is_closed_too(service: Service) -> None:
    whole = slow_clients.request_bytes(service.address, "/search", {"query": "a"})
    for first_bytes, statuses in ((whole[:40], [b"408"]), (whole + whole[:-3], [b"200", b"408"])):
        (client,) = slow_clients.open_clients(service.address, 1, first_bytes)
        started, text = time.monotonic(), b""
        while piece := client.recv(1 << 16):
            text += piece
        assert re.findall(rb"HTTP/1\.1 (\d+)", text) == statuses
        assert RECEIVE_S - 0.2 < time.monotonic() - started < RECEIVE_S + 3
        client.close()


def test_a_connection_is_kept_for_the_next_request(service: Service) -> None:
    """The deadline is for one request, not for a connection."""
    connection = HTTPConnection(*service.address, timeout=5)
    connection.connect()
    own = connection.sock.getsockname()
    for _ in range(4):
        time.sleep(0.6)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read())["status"] == "ok"
        assert connection.sock is not None and connection.sock.getsockname() == own
    connection.close()


def test_sigterm_answers_what_was_taken_and_refuses_the_rest(tmp_path: Path) -> None:
    service = Service(tmp_path)
    heavy = {"query": "heavy", "num_candidates": 2000}
    try:
        with ThreadPoolExecutor(12) as pool:
            taken = [pool.submit(service.ask, "/search", heavy) for _ in range(12)]  # 2.4 s of work
            while (waiting := service.ask("/ready")[1]["waiting"]) < 5:
                time.sleep(0.01)
            service.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert service.ask("/ready")[0] == 503
            assert service.ask("/health")[0] == 200
            status, answer = service.ask("/search", {"query": "a"})
            assert (status, answer["error"].split(";")[0]) == (503, "the service is shutting down")
            statuses = [answer.result()[0] for answer in taken]  # 503: it came after the signal
            assert statuses.count(200) >= waiting and set(statuses) <= {200, 503}
        assert service.process.wait(10) == -signal.SIGTERM
        with pytest.raises(OSError):
            socket.create_connection(service.address, timeout=1)
        assert service.log.read_text() == ""
    finally:
        service.stop()


def test_a_second_signal_does_not_wait_for_the_batch_in_work(tmp_path: Path) -> None:
    """Which takes 10 seconds here."""
    service = Service(tmp_path)
    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(service.ask, "/search", {"query": "slow"})
            while not num_computed(service):
                time.sleep(0.02)
            for _ in range(2):
                service.process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            assert service.process.wait(5) == -signal.SIGINT
            assert isinstance(asked.exception(), OSError | HTTPException)
    finally:
        service.stop()


def test_an_idle_service_ends_soon_and_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    for signals, sleep_s in (([signal.SIGINT], 0.0), ([signal.SIGTERM, signal.SIGTERM], 0.3)):
        service = Service(tmp_path)
        try:
            for number in signals:
                service.process.send_signal(number)
                time.sleep(sleep_s)
            started = time.monotonic()
            service.process.wait(10)
            assert time.monotonic() - started < 5
            assert "Traceback" not in service.log.read_text()
        finally:
            service.stop()
