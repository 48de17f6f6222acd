"""What stands between a connection and the routes, outermost first: every request is counted and logged,
every error becomes {"error": reason}, and requests are refused that come through a foreign host name, are not
JSON, or are too large."""

import asyncio
import json
import logging
import reprlib
import secrets
import time
from collections.abc import Collection
from datetime import datetime, timezone
from typing import Any, TextIO

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data_shards.settings import did_you_mean
from trainer.errors import RequestError
from trainer.serving.batching import Refused
from trainer.serving.metrics import Metrics
from trainer.serving.payloads import Ask, Click

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
QUESTIONS = ("/recommend", "/search", "/score")
PATHS = frozenset(
    [*QUESTIONS, "/health", "/ready", "/model", "/users", "/queries", "/metrics", "/docs", "/openapi.json"]
)
METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
SAY_ALL = ("missing", "too_short", "too_long")  # errors about what is not there, or how much is
CLIENT_LEFT = 499  # nobody reads it: the status in logs and metrics, as nginx writes it
log = logging.getLogger("gensr.service")


class ClientLeft(Exception):
    """Whoever asked has closed the connection."""


def failure(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """{"error": reason}. Half a surrogate pair of what the client sent is shown escaped."""
    text = reason.encode("utf-8", "backslashreplace").decode("utf-8")
    return JSONResponse({"error": text}, status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """The status of each error that a route may raise."""

    @app.exception_handler(RequestError)
    async def bad_request(request: Request, error: RequestError) -> Response:
        return failure(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return failure(400, "; ".join(dict.fromkeys(_problem(problem) for problem in error.errors()[:5])))

    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: StarletteHTTPException) -> Response:
        return failure(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return failure(503, str(error), {"Retry-After": "1"})

    @app.exception_handler(asyncio.TimeoutError)  # TimeoutError itself from Python 3.11 on
    async def too_slow(request: Request, error: asyncio.TimeoutError) -> Response:
        return failure(504, "the answer took too long; ask for fewer candidates, or try again")

    @app.exception_handler(ClientLeft)
    async def left(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=CLIENT_LEFT)


def _problem(problem: Any) -> str:
    """`history.0.task: Input should be 'rec' or 'src', got 5`"""
    place = ".".join(map(str, problem["loc"][1:]))
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']} (character {problem['loc'][-1]})"
    if problem["type"] == "extra_forbidden":
        name = str(problem["loc"][-1])
        known = Click.model_fields if "history" in problem["loc"] else Ask.model_fields
        return f"{place}: the field {name!r} is not read.{did_you_mean(name, list(known))}"
    got = "" if problem["type"] in SAY_ALL else f", got {reprlib.repr(problem['input'])}"
    return f"{place or 'the request'}: {problem['msg'].removeprefix('Value error, ')}{got}"


def path_label(path: str) -> str:
    """The route of a path, without ids of users; "other" stands for the page's files and for what is not
    there."""
    if path in PATHS:
        return path
    return "/users/{user_id}/history" if path.startswith("/users/") else "other"


class Observe:
    """Counts every request, and writes one JSON line for it: no body, no id of a user, no address."""

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: TextIO | None) -> None:
        self.app, self.metrics, self.access_log = app, metrics, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, taken, sent, started = 0, 0, 0, time.perf_counter()
        left = False

        async def counted_receive() -> Message:
            nonlocal taken, left
            message = await receive()
            left |= message["type"] == "http.disconnect" and not status
            taken += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status, sent
            status = message.get("status", status)
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, counted_receive, counted_send)
        finally:
            status = CLIENT_LEFT if left else status or 500
            seconds, path = time.perf_counter() - started, path_label(scope["path"])
            self.metrics.request(path, status, seconds)
            self._write(scope["method"], path, status, seconds, taken, sent)

    def _write(self, method: str, path: str, status: int, seconds: float, taken: int, sent: int) -> None:
        if self.access_log is None:
            return
        record = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "method": method if method in METHODS else "other",
            "path": path,
            "status": status,
            "ms": round(1000 * seconds, 1),
            "request_bytes": taken,
            "response_bytes": sent,
        }
        try:
            self.access_log.write(json.dumps(record) + "\n")
            self.access_log.flush()
        except OSError:  # a full disk: the service answers all the same
            pass


class CatchAll:
    """A bug is a 500 with nothing but a number, which the log repeats. Every answer gets HEADERS."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            await self.app(scope, receive, with_headers)
        except Exception:
            number = secrets.token_hex(4)
            log.exception("error %s in %s", number, path_label(scope["path"]))
            if started:
                raise
            reason = f"internal error {number}; the service's log has the details"
            await failure(500, reason)(scope, receive, with_headers)


class KnownHosts:
    """A page elsewhere may not reach a service on loopback through a name of its own (DNS rebinding)."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app, self.hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _host_name(Headers(scope=scope).get("host", "")) not in self.hosts:
            await failure(400, "the host name of the request is not one of this service")(
                scope, receive, send
            )
        else:
            await self.app(scope, receive, send)


def _host_name(host: str) -> str:
    """`[::1]:8000` → ::1, `localhost:8000` → localhost."""
    return (host[1:].split("]")[0] if host.startswith("[") else host.split(":")[0]).lower()


class JsonOnly:
    """Bodies that are not declared as JSON are refused: a form of another site cannot send that type without
    asking first, and what a body without a type means differs between versions of FastAPI."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            declared = Headers(scope=scope).get("content-type", "")
            if declared.split(";")[0].strip().lower() != "application/json":
                answer = failure(415, "send JSON, with the header Content-Type: application/json")
                return await answer(scope, receive, send)
        await self.app(scope, receive, send)


class SizeLimit:
    """Stops reading a body beyond the limit, whatever its Content-Length says."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                raise HTTPException(413, f"the request is larger than {self.max_bytes:,} bytes")
            return message

        await self.app(scope, counted, send)
