"""Batches made ahead of time."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch

from trainer.batch import Batch

PREFETCH = 8  # batches made ahead by the loader's thread


def prefetched(stream: Any, num_workers: int = 0) -> Iterator[Batch]:
    """Batches made ahead of time: by a thread (num_workers=0), or by worker processes, in the same order."""
    if num_workers:
        return iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=num_workers, prefetch_factor=PREFETCH))
    return _from_thread(stream)


def _from_thread(stream: Any) -> Iterator[Batch]:
    ready: queue.Queue[Any] = queue.Queue(PREFETCH)
    stop = threading.Event()

    def put(value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for batch in stream:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=produce, daemon=True, name="gensr-loader")
    thread.start()
    try:
        while True:
            value = ready.get()
            if value is None:
                return
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
