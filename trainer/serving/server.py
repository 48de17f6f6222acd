"""The server under the application: uvicorn, with what it lacks against clients that stall. A request must be
whole, and an answer taken, within a time. Connections are bounded below what the process may open; the one
that stalls longest makes room for a new one. A signal first drains the queue."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trainer.errors import EnvironmentProblem
from trainer.serving.batching import Batcher

RESERVED_FILES = 32  # descriptors for what the process opens while it serves
BACKLOG = 128  # connections that wait to be accepted; asyncio accepts as many at once
DRAIN_LINGER_S = (
    1.0  # after SIGTERM /ready says 503 for at least so long: whoever watches it asks every second
)
ACCEPT_LOG_S = 60.0  # between two lines about connections that cannot be accepted
log = logging.getLogger("gensr.service")


@dataclass(frozen=True)
class ConnectionLimits:
    """What clients may take. receive_s: from the first byte of a request to its last, send_s: until a client
    has taken what it was sent."""

    max_connections: int = 512
    receive_s: float = 10.0
    send_s: float = 10.0


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, which does not listen yet: clients are refused until the service is
    there. Port 0 takes a free one. Raises EnvironmentProblem."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise EnvironmentProblem(f"--host {host}: no such address: {error}") from error
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error
    return bound


def _cannot_listen(host: str, port: int, error: OSError) -> EnvironmentProblem:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return EnvironmentProblem(
        f"cannot listen on {host} port {port}: {reason}. Choose another port with --port, or --port 0 for a "
        "free one"
    )


def serve(
    app: Any,
    bound: socket.socket,
    batcher: Batcher,
    limits: ConnectionLimits = ConnectionLimits(),
    drain_s: float = 30.0,
    on_closed: Callable[[str], None] = lambda reason: None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal, then answer what was taken, for at most drain_s; a second signal ends it at once.

    on_closed: is told why a connection was ended. on_ready: called once requests are accepted. Raises
    EnvironmentProblem when the address was taken after bind()."""
    num_connections, backlog = connection_budget(limits.max_connections)

    def connection(**given: Any) -> Connection:
        return Connection(limits, num_connections, on_closed, **given)

    config = uvicorn.Config(
        app,
        http=connection,  # type: ignore[arg-type]  # it is called, never asked for its type
        ws="none",
        loop="asyncio",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=backlog,
        timeout_graceful_shutdown=5,  # after the drain: for answers on their way out
    )
    host, port = bound.getsockname()[:2]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            Server(config, batcher, drain_s, on_ready).run(sockets=[bound])
    except OSError as error:
        raise _cannot_listen(host, port, error) from error


def connection_budget(wanted: int) -> tuple[int, int]:
    """(connections, backlog) that fit beside the files that are open now. asyncio accepts a whole backlog
    before the first of its connections can be refused."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return wanted, BACKLOG
    left = max(allowed - len(os.listdir("/proc/self/fd")) - RESERVED_FILES, 4)
    backlog = min(BACKLOG, left // 2)
    return min(wanted, left - backlog), backlog


class Server(uvicorn.Server):
    """uvicorn's server, which on a signal refuses new requests first, answers those that it took, and then
    closes."""

    def __init__(
        self, config: uvicorn.Config, batcher: Batcher, drain_s: float, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._batcher, self._drain_s, self._on_ready = batcher, drain_s, on_ready
        self._signal: int | None = None
        self._signalled_at = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(QuietAccepts())
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            # uvicorn's own way out waits for the batch in work, which may take minutes
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._batcher.drain()
        self._signal, self._signalled_at = sig, time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        if self._signal is not None and not self.should_exit and self._is_drained():
            super().handle_exit(self._signal, None)
        return await super().on_tick(counter)

    def _is_drained(self) -> bool:
        passed_s = time.monotonic() - self._signalled_at
        linger_s = DRAIN_LINGER_S if self._signal == signal.SIGTERM else 0.0
        return passed_s > self._drain_s or (self._batcher.is_idle and passed_s >= linger_s)


class QuietAccepts:
    """asyncio logs a traceback for every connection that it cannot accept, thousands a second when files run
    out. Here that is one line a minute."""

    def __init__(self) -> None:
        self._logged_at = -ACCEPT_LOG_S

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "accept" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._logged_at >= ACCEPT_LOG_S:
            self._logged_at = time.monotonic()
            log.error("connections cannot be accepted: %s (ulimit -n)", context.get("exception"))


class Connection(H11Protocol):
    """One client. It is ended when a request is not whole in time, or when an answer is not taken in time."""

    def __init__(
        self, limits: ConnectionLimits, max_connections: int, on_closed: Callable[[str], None], **given: Any
    ) -> None:
        super().__init__(**given)
        self._limits, self._max_connections, self._on_closed = limits, max_connections, on_closed
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._waits_since = self.loop.time()  # for a request to become whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # pause_writing() comes with the first byte that waits
        self._receiving = self.loop.call_later(self._limits.receive_s, self._end, 408, "slow request")
        if len(self.connections) > self._max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop("_receiving")
        self._stop("_sending")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._waits_since = self.loop.time()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending = self.loop.call_later(self._limits.send_s, self._abort, "slow reader")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("_sending")

    @property
    def waits(self) -> bool:
        """Whether the client's next bytes are awaited: an idle connection, or a request that is not whole."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _watch(self) -> None:
        """One deadline for each request, from its first byte; uvicorn's own ends idle connections."""
        started = self.conn.their_state is h11.SEND_BODY or (self.waits and self.conn.trailing_data[0])
        if self.transport.is_closing() or not started:
            self._stop("_receiving")
        elif self._receiving is None:
            self._waits_since = self.loop.time()
            self._receiving = self.loop.call_later(self._limits.receive_s, self._end, 408, "slow request")

    def _make_room(self) -> None:
        """Ends the connection whose client stalls longest; it may be this one."""
        stalled = [one for one in self.connections if isinstance(one, Connection) and one.waits]
        oldest = min(stalled, key=lambda one: one._waits_since, default=self)
        oldest._end(503, "too many connections")

    def _end(self, status: int, reason: str) -> None:
        """Closes the connection; before that a client that has begun a request, or none yet, reads why."""
        if self.transport.is_closing():
            return
        self._on_closed(reason)
        answered = self.cycle is not None and self.cycle.response_started
        if not answered or (self.cycle.response_complete and self.conn.trailing_data[0]):
            self.transport.write(b"HTTP/1.1 %d \r\nConnection: close\r\nContent-Length: 0\r\n\r\n" % status)
        self.transport.close()

    def _abort(self, reason: str) -> None:
        """Resets the connection: what the client has not taken is dropped by the kernel, too."""
        self._on_closed(reason)
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _stop(self, name: str) -> None:
        timer: asyncio.TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
        setattr(self, name, None)
