"""The web application: JSON questions about items, answered by a Recommender. `gensr serve MODEL` runs it,
`gensr ui MODEL` opens its page.

    POST /recommend  /search  /score     Ask → Answer (payloads.py)
    GET  /health  /ready  /model         the process lives, and with which version; it takes requests (200 or
                                         503); what answers
    GET  /users  /users/ID/history       whose histories are known (a prepared folder is there)
    GET  /queries                        examples of queries, from the same folder
    GET  /metrics                        for Prometheus (metrics.py)
    GET  /docs  /openapi.json            with --docs
    GET  /                               the page

Errors are {"error": reason}: 400 a request that cannot be answered, 403 users that are not shown here, 413 a
body that is too large, 415 a body that is not JSON, 503 too many are waiting or the service is about to end,
504 it took too long, and 500 with nothing but a number that the log repeats. No answer names a folder of this
machine.
"""

import asyncio
import ipaddress
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.routing import Route
from starlette.types import Receive

from trainer.errors import EnvironmentProblem
from trainer.serving.api_docs import docs_page
from trainer.serving.batching import Batcher
from trainer.serving.follow import Follow, Follower
from trainer.serving.live import Live, public
from trainer.serving.metrics import CONTENT_TYPE
from trainer.serving.middleware import (
    CatchAll,
    ClientLeft,
    JsonOnly,
    KnownHosts,
    Observe,
    SizeLimit,
    add_error_handlers,
)
from trainer.serving.payloads import (
    MAX_CANDIDATES,
    Answer,
    Ask,
    AskScores,
    Error,
    ExampleQueries,
    Facts,
    Health,
    History,
    KnownUsers,
    Ready,
    SystemFacts,
)
from trainer.serving.recommend import DEFAULT_K, NUM_CANDIDATES, Recommender
from trainer.serving.server import ConnectionLimits, serve
from trainer.serving.systems import System

PAGE = Path(__file__).parent / "page"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SAMPLE_USERS, SAMPLE_QUERIES = 200, 20
USERS_OFF = "histories of users are not shown here (gensr serve --expose-users)"


@dataclass(frozen=True)
class Limits:
    """What one service takes on."""

    max_body_bytes: int = 1 << 20
    max_batch: int = 16  # requests ranked together
    max_batch_candidates: int = (
        4096  # that these hold together: under a second for the demo's model on 2 cores
    )
    max_waiting: int = 256  # requests in the queue; more are refused with 503
    timeout_s: float = 30.0  # from arrival to answer; longer is 504


@dataclass(frozen=True)
class Options:
    """What one service shows. host: the address it listens on; on loopback, requests for other host names are
    refused, and users' histories are shown."""

    host: str = "127.0.0.1"
    expose_users: bool = False  # to other machines, too
    docs: bool = False
    access_log: TextIO | None = None

    @property
    def shows_users(self) -> bool:
        return self.expose_users or is_loopback(self.host)

    @property
    def warning(self) -> str:
        """What whoever starts it should know about the address; empty on loopback."""
        if is_loopback(self.host):
            return ""
        return f"--host {self.host} can be reached from other machines: " + (
            "everyone there can read the histories of all users (--expose-users)"
            if self.expose_users
            else "/users, histories and example queries are off (--expose-users shows them)"
        )


def open_access_log(name: str) -> TextIO | None:
    """ "-" is stderr, "" none, else a file to append to. Raises EnvironmentProblem."""
    if name in ("", "-"):
        return sys.stderr if name else None
    try:
        return open(name, "a", encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(f"--access-log {name}: cannot be written: {error.strerror}") from error


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_app(
    recommender: Recommender,
    limits: Limits = Limits(),
    options: Options = Options(),
    others: Sequence[System] = (),
    follow: Follow | None = None,
) -> FastAPI:
    """The application around one model; `app.state` holds its `batcher` and `live`. others: systems that
    requests may name to compare it with. follow: where its newer versions come from."""
    live = Live(recommender, others)
    follower = Follower(follow, live) if follow is not None else None
    batcher = Batcher(
        live.systems.answer_or_errors,
        limits.max_batch,
        limits.max_waiting,
        limits.max_batch_candidates,
        num_candidates,
        live.metrics.batch,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        if follower is not None:
            follower.start()
        yield
        if follower is not None:
            follower.stop()
        await batcher.stop()

    app = FastAPI(title="gensr", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.batcher, app.state.live = batcher, live
    app.add_middleware(SizeLimit, max_bytes=limits.max_body_bytes)  # innermost first
    app.add_middleware(JsonOnly)
    if is_loopback(options.host):
        app.add_middleware(KnownHosts, hosts={*LOOPBACK, options.host})
    app.add_middleware(CatchAll)
    app.add_middleware(Observe, metrics=live.metrics, access_log=options.access_log)
    add_error_handlers(app)
    _add_questions(app, batcher, limits, options)
    _add_state(app, live, limits)
    _add_examples(app, live, options)
    if options.docs:
        _add_docs(app)
    _add_page(app)
    return app


def run(
    app: FastAPI,
    bound: socket.socket,
    limits: Limits = Limits(),
    on_ready: Callable[[], None] = lambda: None,
    connections: ConnectionLimits | None = None,
) -> None:
    """Serve what make_app() made on a socket of bind() until a signal; what was taken is answered."""
    batcher, metrics = app.state.batcher, app.state.live.metrics
    serve(app, bound, batcher, connections or ConnectionLimits(), limits.timeout_s, metrics.closed, on_ready)


def num_candidates(request: Mapping[str, Any]) -> int:
    """How many candidates the model ranks for a request; the Recommender refuses more than MAX_CANDIDATES."""
    given = request.get("candidates")
    found = max(request.get("k", DEFAULT_K), request.get("num_candidates", NUM_CANDIDATES))
    return min(len(given) if given else found, MAX_CANDIDATES)


# ---- routes ------------------------------------------------------------------------------------------------


def _add_questions(app: FastAPI, batcher: Batcher, limits: Limits, options: Options) -> None:
    # the model is documented, not applied: large answers need not be checked twice
    described: dict[int | str, dict[str, Any]] = {
        200: {"model": Answer},
        **{status: {"model": Error} for status in (400, 403, 413, 415, 503, 504)},
    }

    async def reply(task: str, ask: Ask, request: Request) -> JSONResponse:
        if ask.explain and ask.user_id is not None and ask.history is None and not options.shows_users:
            raise HTTPException(403, f"explain names what the user clicked: {USERS_OFF}")
        work = batcher.answer({"task": task, **ask.model_dump(exclude_none=True)})
        answer = await while_connected(work, request.receive, limits.timeout_s)
        return JSONResponse({**answer, "model": public(answer["model"])})

    @app.post("/recommend", responses=described)
    async def recommend(ask: Ask, request: Request) -> Response:
        """The best items of the whole catalogue for a history, or scores of the given candidates."""
        return await reply("rec", ask, request)

    @app.post("/search", responses=described)
    async def search(ask: Ask, request: Request) -> Response:
        """The same for a query, and for a history if one is given."""
        return await reply("src", ask, request)

    @app.post("/score", responses=described)
    async def score(ask: AskScores, request: Request) -> Response:
        """Scores of given candidates, in the order given."""
        return await reply(ask.task, ask, request)


async def while_connected(
    work: Coroutine[Any, Any, dict[str, Any]], receive: Receive, timeout_s: float
) -> dict[str, Any]:
    """The result of `work`, which is cancelled when the client leaves (ClientLeft) or when it takes longer
    than timeout_s (TimeoutError). The request's body has been read."""

    async def until_left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answer, left = asyncio.ensure_future(work), asyncio.ensure_future(until_left())
    try:
        await asyncio.wait({answer, left}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ClientLeft if left.done() else asyncio.TimeoutError
    finally:
        answer.cancel()
        left.cancel()


def _add_state(app: FastAPI, live: Live, limits: Limits) -> None:
    batcher: Batcher = app.state.batcher

    @app.head("/health", include_in_schema=False)  # monitors ask with HEAD
    @app.get("/health")
    async def health() -> Health:
        """200 while the process lives."""
        return Health(model=live.names, problem=live.problem)

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses={200: {"model": Ready}, 503: {"model": Ready}})
    async def ready() -> Response:
        """200 while requests are taken, else 503."""
        can = batcher.is_ready
        return JSONResponse({"ready": can, "waiting": batcher.num_waiting}, 200 if can else 503)

    @app.get("/model")
    async def model() -> Facts:
        """What answers, and its limits."""
        recommender = live.recommender
        return Facts(
            model=public(recommender.facts),
            systems=[SystemFacts(**system.facts) for system in live.systems.systems.values()],
            num_items=recommender.num_items,
            queries=recommender.query_mode,
            limits=asdict(limits),
        )

    @app.get("/metrics", response_class=Response)
    async def metrics_text() -> Response:
        """Counters in the text format of Prometheus."""
        return Response(live.metrics.text(batcher.num_waiting), media_type=CONTENT_TYPE)


def _add_examples(app: FastAPI, live: Live, options: Options) -> None:
    @app.get("/users")
    def users() -> KnownUsers:
        """Some users whose histories are known."""
        if not options.shows_users:
            return KnownUsers(users=[], reason=USERS_OFF)
        return KnownUsers(**live.recommender.some_users(SAMPLE_USERS))

    @app.get("/users/{user_id:path}/history", responses={400: {"model": Error}, 403: {"model": Error}})
    def history(user_id: str) -> History:
        """A user's clicks, oldest first."""
        if not options.shows_users:
            raise HTTPException(403, USERS_OFF)
        return History(user_id=user_id, history=live.recommender.history_of(user_id))

    @app.get("/queries")
    def queries() -> ExampleQueries:
        """Some queries that users wrote."""
        if not options.shows_users:
            return ExampleQueries(queries=[], reason=USERS_OFF)
        known = live.recommender.users
        return ExampleQueries(queries=known.frequent_queries(SAMPLE_QUERIES), reason=known.reason)


def _add_page(app: FastAPI) -> None:
    """A route for each file: mounted at "/", they would answer for every path that is asked by a wrong
    method."""
    files = StaticFiles(directory=PAGE, html=True)
    for path in ("/", *(f"/{file.name}" for file in sorted(PAGE.iterdir()))):
        app.router.routes.append(Route(path, files, methods=["GET"]))


def _add_docs(app: FastAPI) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return app.openapi()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))
