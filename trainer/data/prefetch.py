"""Batches made ahead of time."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from trainer.batch import Batch

PREFETCH = 8  # batches made ahead by the loader's thread


def prefetched(
    stream: Any,
    num_workers: int = 0,
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Batches made ahead of time: by a thread (num_workers=0), or by worker processes, in the same order.

    The thread then applies `prepare` to each and, for a GPU, lays it into memory that the device copies from
    by itself.
    """

    def ready(batch: Batch) -> Batch:
        batch = prepare(batch)
        if torch.device(device).type != "cuda":
            return batch
        # a thread begins on the first GPU, and would take memory there for nothing
        with torch.cuda.device(device):
            return batch.pin_memory()

    if num_workers:
        stream = torch.utils.data.DataLoader(
            stream, batch_size=None, num_workers=num_workers, prefetch_factor=PREFETCH
        )
    return _from_thread(map(ready, stream))


def _from_thread(batches: Iterator[Batch]) -> Iterator[Batch]:
    made: queue.Queue[Any] = queue.Queue(PREFETCH)
    stop = threading.Event()

    def put(value: Any) -> bool:
        while not stop.is_set():
            try:
                made.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=produce, daemon=True, name="gensr-loader")
    thread.start()
    try:
        while True:
            value = made.get()
            if value is None:
                return
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
