"""Requests that arrive while a batch is computed become the next batch: no waiting when it is quiet, full
batches under load."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trainer.errors import RequestError

Request = Mapping[str, Any]
Answer = dict[str, Any]
Waiting = tuple[Request, "asyncio.Future[Answer]"]


class Overloaded(Exception):
    """Too many requests are waiting already."""


class Batcher:
    """Answers single requests through a function of many. All methods but the function run in one event loop;
    the function in one thread."""

    def __init__(
        self, answer_all: Callable[[Sequence[Request]], list[Answer]], max_batch: int, max_waiting: int
    ) -> None:
        self._answer_all, self._max_batch = answer_all, max_batch
        self._waiting: asyncio.Queue[Waiting] = asyncio.Queue(max_waiting)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gensr-model")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Drop what waits, let the batch in work end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def num_waiting(self) -> int:
        return self._waiting.qsize()

    async def answer(self, request: Request) -> Answer:
        """The answer to one request. Raises RequestError for a bad one, Overloaded when too many are waiting.
        Cancelled, it leaves the queue."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((request, future))
        except asyncio.QueueFull as error:
            raise Overloaded from error
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._max_batch and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            # where a future is done already, whoever asked has gone
            batch = [(request, future) for request, future in batch if not future.done()]
            if not batch:
                continue
            answers = await loop.run_in_executor(
                self._thread, self._answer_batch, [request for request, _ in batch]
            )
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def _answer_batch(self, requests: Sequence[Request]) -> list[Answer | Exception]:
        """A bad request fails alone: the others of its batch are then answered one by one."""
        try:
            return list(self._answer_all(requests))
        except Exception as error:
            if len(requests) == 1:
                return [error]
            if not isinstance(error, RequestError):
                return [error] * len(requests)
        return [answer for request in requests for answer in self._answer_batch([request])]
