"""The web application: JSON questions about items, answered by a Recommender. `gensr serve MODEL` runs it,
`gensr ui MODEL` opens its page.

    POST /recommend  /search  /score     a request (Ask below) → {"items": [{"item_id", "score", …}],
                                         "scores": […], "model": {…}}
    GET  /health                         200 while the process lives
    GET  /ready                          200 while it can take requests, else 503
    GET  /model                          what answers, and its limits
    GET  /users  /users/ID/history       whose histories are known (a prepared folder is there)
    GET  /                               the page

Errors are {"error": reason}: 400 a request that cannot be answered, 413 a body that is too large, 503 too
many are waiting, 504 it took too long, and 500 with nothing but a number that the log repeats.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.errors import RequestError
from trainer.serving.batching import Batcher, Overloaded
from trainer.serving.recommend import Recommender

PAGE = Path(__file__).parent / "page"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_HISTORY, MAX_CANDIDATES, MAX_QUERY_WORDS, MAX_QUERY_CHARS, MAX_ID_CHARS = 2000, 2000, 256, 2000, 256
SAMPLE_USERS = 200
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
log = logging.getLogger("gensr.service")


@dataclass(frozen=True)
class Limits:
    """What one service takes on."""

    max_body_bytes: int = 1 << 20
    max_batch: int = 16  # requests ranked together
    max_waiting: int = 256  # requests in the queue; more are refused with 503
    timeout_s: float = 30.0  # from arrival to answer; longer is 504


ItemId = int | Annotated[str, Field(max_length=MAX_ID_CHARS)]


class Click(BaseModel):
    """One entry of a history."""

    model_config = ConfigDict(extra="forbid")
    item_id: ItemId
    task: Literal["rec", "src"] = "rec"


class Ask(BaseModel):
    """A request. trainer/serving/recommend.py has the meaning of each field."""

    model_config = ConfigDict(extra="forbid")
    user_id: ItemId | None = None
    history: Annotated[list[Click], Field(max_length=MAX_HISTORY)] | None = None
    query: (
        Annotated[str, Field(max_length=MAX_QUERY_CHARS)]
        | Annotated[list[int], Field(max_length=MAX_QUERY_WORDS)]
        | None
    ) = None
    candidates: Annotated[list[ItemId], Field(max_length=MAX_CANDIDATES)] | None = None
    k: int | None = None
    num_candidates: int | None = None
    include_seen: bool = False
    explain: bool = False
    with_text: bool = False


class AskScores(Ask):
    """A request for the scores of given candidates."""

    task: Literal["rec", "src"]
    candidates: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_CANDIDATES)]


def make_app(recommender: Recommender, limits: Limits = Limits(), host: str = "127.0.0.1") -> FastAPI:
    """The application around one model. `host`: the address it will listen on; on loopback, requests for
    other host names are refused."""
    batcher = Batcher(recommender.answer, limits.max_batch, limits.max_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title="gensr", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(_SizeLimit, max_bytes=limits.max_body_bytes)
    if host in LOOPBACK:  # a page elsewhere may not reach it through a name of its own (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]", "testserver"])
    _add_error_handlers(app)

    async def reply(task: str, ask: Ask) -> dict[str, Any]:
        return await asyncio.wait_for(
            batcher.answer({"task": task, **ask.model_dump(exclude_none=True)}), limits.timeout_s
        )

    @app.post("/recommend")
    async def recommend(ask: Ask) -> dict[str, Any]:
        return await reply("rec", ask)

    @app.post("/search")
    async def search(ask: Ask) -> dict[str, Any]:
        return await reply("src", ask)

    @app.post("/score")
    async def score(ask: AskScores) -> dict[str, Any]:
        return await reply(ask.task, ask)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        can = batcher.is_running and batcher.num_waiting < limits.max_waiting
        return JSONResponse({"ready": can, "waiting": batcher.num_waiting}, 200 if can else 503)

    @app.get("/model")
    async def model() -> dict[str, Any]:
        return {
            "model": recommender.facts,
            "num_items": recommender.num_items,
            "queries": recommender.query_mode,
            "limits": asdict(limits),
        }

    @app.get("/users")
    def users() -> dict[str, Any]:
        return recommender.some_users(SAMPLE_USERS)

    @app.get("/users/{user_id}/history")
    def history(user_id: str) -> dict[str, Any]:
        return {"user_id": user_id, "history": recommender.history_of(user_id)}

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def run(recommender: Recommender, host: str, port: int, limits: Limits = Limits()) -> None:
    """Serve until a signal; requests in work are finished."""
    import uvicorn

    uvicorn.run(
        make_app(recommender, limits, host),
        host=host,
        port=port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=10,
    )


# ---- errors and limits -------------------------------------------------------------------------------------


def _add_error_handlers(app: FastAPI) -> None:
    def fail(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": reason}, status, {**HEADERS, **(headers or {})})

    @app.exception_handler(RequestError)
    async def bad_request(request: Request, error: RequestError) -> JSONResponse:
        return fail(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return fail(400, "; ".join(dict.fromkeys(_problem(problem) for problem in error.errors()[:5])))

    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return fail(error.status_code, str(error.detail))

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> JSONResponse:
        return fail(503, "too many requests are waiting; try again", {"Retry-After": "1"})

    @app.exception_handler(asyncio.TimeoutError)  # TimeoutError itself from Python 3.11 on
    async def too_slow(request: Request, error: asyncio.TimeoutError) -> JSONResponse:
        return fail(504, "the answer took too long; ask for fewer candidates, or try again")

    @app.middleware("http")
    async def unexpected(request: Request, call_next: Any) -> Any:
        try:
            response = await call_next(request)
        except Exception:
            number = secrets.token_hex(4)
            log.exception("error %s in %s %s", number, request.method, request.url.path)
            return fail(500, f"internal error {number}; the service's log has the details")
        response.headers.update(HEADERS)
        return response


def _problem(problem: Any) -> str:
    """`history.0.item_id: Field required`, without the names of the types that were tried."""
    place = ".".join(
        str(part)
        for part in problem["loc"][1:]
        if not (isinstance(part, str) and ("[" in part or part in ("int", "str")))
    )
    return f"{place or 'the request'}: {problem['msg']}"


class _SizeLimit:
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
