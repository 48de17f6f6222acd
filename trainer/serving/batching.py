"""Requests that arrive while a batch is computed become the next batch: no waiting when it is quiet, full
batches under load. A request whose client has left, or that waited too long, is dropped before it is
computed."""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trainer.errors import RequestError

Request = Mapping[str, Any]
Answer = dict[str, Any]
Waiting = dict["asyncio.Future[Answer]", Request]


class Refused(Exception):
    """The service takes no request now. The text says why."""


class Overloaded(Refused):
    """Too many requests are waiting already."""


class Draining(Refused):
    """The service is about to end: it answers what it has taken, and nothing new."""


class Batcher:
    """Answers single requests through a function of many, which gives a RequestError in the place of the
    answer to a bad one. All methods but the function run in one event loop; the function in one thread.

    cost: of one request, in candidates. A batch holds at most `max_batch` requests that cost at most
    `max_cost` together; a request that costs more is a batch of its own.
    on_batch: is told the number of requests of each batch.
    """

    def __init__(
        self,
        answer_all: Callable[[Sequence[Request]], Sequence[Answer | RequestError]],
        max_batch: int,
        max_waiting: int,
        max_cost: int,
        cost: Callable[[Request], int],
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._answer_all, self._cost, self._on_batch = answer_all, cost, on_batch
        self._max_batch, self._max_waiting, self._max_cost = max_batch, max_waiting, max_cost
        self._waiting: Waiting = {}  # in order of arrival
        self._computing: Waiting = {}
        self._arrived = asyncio.Event()
        self._draining = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gensr-model")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def drain(self) -> None:
        """Take nothing new, answer what waits."""
        self._draining = True

    async def stop(self) -> None:
        """Drop what waits, let the batch in work end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken now."""
        is_running = self._task is not None and not self._task.done()
        return is_running and not self._draining and self.num_waiting < self._max_waiting

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._computing

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def answer(self, request: Request) -> Answer:
        """The answer to one request. Raises RequestError for a bad one, Refused when it is not taken.
        Cancelled, it leaves the queue at once."""
        if self._draining:
            raise Draining("the service is shutting down; ask another one, or try again")
        if self.num_waiting >= self._max_waiting:
            raise Overloaded("too many requests are waiting; try again")
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[future] = request
        self._arrived.set()
        try:
            return await future
        finally:
            self._waiting.pop(future, None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._computing = self._next_batch()
            if not self._computing:
                self._arrived.clear()
                continue
            self._on_batch(len(self._computing))
            answers = await loop.run_in_executor(
                self._thread, self._answer_batch, list(self._computing.values())
            )
            for future, answer in zip(self._computing, answers, strict=True):
                if future.done():  # whoever asked has gone
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
            self._computing = {}

    def _next_batch(self) -> Waiting:
        """Takes the oldest requests out of the queue. {} when none waits."""
        batch: Waiting = {}
        cost = 0
        for future, request in itertools.islice(self._waiting.items(), self._max_batch):
            cost += self._cost(request)
            if batch and cost > self._max_cost:
                break
            batch[future] = request
        for future in batch:
            del self._waiting[future]
        return batch

    def _answer_batch(self, requests: Sequence[Request]) -> Sequence[Answer | Exception]:
        """What fails all of them (a bug, data that are gone, memory) may be the fault of one: each is then
        asked alone."""
        try:
            answers = self._answer_all(requests)
            assert len(answers) == len(requests), (len(answers), len(requests))
            return answers
        except Exception as error:
            if len(requests) == 1:
                return [error]
        # behind the error, which holds the memory of what it broke
        return [self._answer_batch([request])[0] for request in requests]
