"""The queue before the model: what is computed together, what is dropped, what is refused."""

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from trainer.errors import RequestError
from trainer.serving.app import num_candidates
from trainer.serving.batching import Batcher, Draining, Overloaded


class Model:
    """Waits for `release` in its first batch; answers each request with itself."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.release = threading.Event()

    def __call__(self, requests: Sequence[Any]) -> list[Any]:
        self.batches.append([request["cost"] for request in requests])
        self.release.wait(10)
        return list(requests)


def run(model: Model, story: Any, **limits: int) -> Any:
    """story(batcher) in an event loop, with the batcher running."""

    async def main() -> Any:
        given = {"max_batch": 4, "max_waiting": 8, "max_cost": 100, **limits}
        batcher = Batcher(model, cost=lambda request: request["cost"], **given)  # type: ignore[arg-type]
        batcher.start()
        try:
            return await asyncio.wait_for(story(batcher), 20)
        finally:
            model.release.set()
            await batcher.stop()

    return asyncio.run(main())


async def ask(batcher: Batcher, model: Model, *costs: int) -> list["asyncio.Task[Any]"]:
    """Requests that wait behind a first one, which the model holds."""
    first = asyncio.ensure_future(batcher.answer({"cost": 0}))
    while not model.batches:
        await asyncio.sleep(0.005)
    others = [asyncio.ensure_future(batcher.answer({"cost": cost})) for cost in costs]
    await asyncio.sleep(0)
    return [first, *others]


def test_a_batch_is_bounded_by_requests_and_by_candidates() -> None:
    model = Model()

    async def story(batcher: Batcher) -> None:
        tasks = await ask(batcher, model, 60, 30, 20, 500, 1, 1, 1, 1)
        model.release.set()
        assert [answer["cost"] for answer in await asyncio.gather(*tasks)][1:4] == [60, 30, 20]

    run(model, story)
    assert model.batches == [[0], [60, 30], [20], [500], [1, 1, 1, 1]]


def test_a_cancelled_request_leaves_the_queue_and_is_not_computed() -> None:
    model = Model()

    async def story(batcher: Batcher) -> None:
        tasks = await ask(batcher, model, *range(1, 9))
        with pytest.raises(Overloaded):
            await batcher.answer({"cost": 9})
        for task in (tasks[0], *tasks[2:]):  # the first is being computed
            task.cancel()
        await asyncio.sleep(0)
        assert batcher.num_waiting == 1 and batcher.is_ready
        model.release.set()
        assert await tasks[1] == {"cost": 1}

    run(model, story)
    assert model.batches == [[0], [1]]


def test_draining_answers_what_waits_and_takes_nothing_new() -> None:
    model = Model()

    async def story(batcher: Batcher) -> None:
        tasks = await ask(batcher, model, 1, 2)
        batcher.drain()
        assert not batcher.is_ready and not batcher.is_idle
        with pytest.raises(Draining, match="shutting down"):
            await batcher.answer({"cost": 3})
        model.release.set()
        assert await asyncio.gather(*tasks) == [{"cost": 0}, {"cost": 1}, {"cost": 2}]
        await asyncio.sleep(0)
        assert batcher.is_idle

    run(model, story)


@pytest.mark.parametrize("answers", [[], [{"cost": 0}] * 2])
def test_a_wrong_number_of_answers_ends_no_queue(answers: list[Any]) -> None:
    def model(requests: Sequence[Any]) -> list[Any]:
        return answers if requests[0]["cost"] else list(requests)

    async def main() -> None:
        batcher = Batcher(model, 4, 8, 100, cost=lambda request: 1)
        batcher.start()
        with pytest.raises(AssertionError):
            await batcher.answer({"cost": 1})
        assert await batcher.answer({"cost": 0}) == {"cost": 0}
        await batcher.stop()

    asyncio.run(main())


def asked_together(model: Callable[[Sequence[Any]], list[Any]], *costs: int) -> list[Any]:
    """Answers, or what was raised, of requests that come at once."""

    async def main() -> list[Any]:
        batcher = Batcher(model, 4, 8, 100, cost=lambda request: 1)
        batcher.start()
        work: list[Coroutine[Any, Any, Any]] = [batcher.answer({"cost": cost}) for cost in costs]
        try:
            return await asyncio.gather(*work, return_exceptions=True)
        finally:
            await batcher.stop()

    return asyncio.run(main())


def test_a_bad_request_fails_alone() -> None:
    def model(requests: Sequence[Any]) -> list[Any]:
        sizes.append(len(requests))
        return [RequestError("bad luck") if request["cost"] == 13 else request for request in requests]

    sizes: list[int] = []
    one, bad, two = asked_together(model, 1, 13, 2)
    assert (one, str(bad), two) == ({"cost": 1}, "bad luck", {"cost": 2})
    assert sizes == [3]


def test_what_breaks_a_batch_fails_alone() -> None:
    def model(requests: Sequence[Any]) -> list[Any]:
        sizes.append(len(requests))
        assert sys.exc_info()[1] is None  # the one before holds its memory no longer
        if any(request["cost"] == 13 for request in requests):
            raise FileNotFoundError("users.parquet")  # what only this request needs
        return list(requests)

    sizes: list[int] = []
    one, broken, two = asked_together(model, 1, 13, 2)
    assert (one, str(broken), two) == ({"cost": 1}, "users.parquet", {"cost": 2})
    assert sizes == [3, 1, 1, 1]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, 400),
        ({"candidates": [1, 2]}, 2),
        ({"candidates": []}, 400),
        ({"k": 1000}, 1000),
        ({"num_candidates": 50}, 50),
        ({"num_candidates": 10**9}, 2000),
    ],
)
def test_the_cost_of_a_request_is_its_candidates(request_: dict[str, Any], expected: int) -> None:
    assert num_candidates(request_) == expected
