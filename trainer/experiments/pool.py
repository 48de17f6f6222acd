"""`--jobs N`: N runs at once on this machine. The cells of a table, the variants of a paper and the runs of a
sweep are tasks of a Pool: threads that each wait for one child process.

    cores      a run has cores // jobs threads, unless run.threads or OMP_NUM_THREADS says how many
    GPUs       a run has one of CUDA_VISIBLE_DEVICES, else of all; none has two runs
    Ctrl-C     the first tells every child once, which saves and ends; a second kills what still runs
"""

import contextlib
import heapq
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

from trainer.errors import ConfigError
from trainer.experiments import forked
from trainer.runtime.launch import num_cores
from trainer.runtime.progress import Notify, clock
from trainer.runtime.stopping import FORCE_AFTER_S

STOP_WAIT_S = 120.0  # for children that were told to stop: they save first
Result = TypeVar("Result")

_here = threading.local()  # .pool and .environment, in a pool's threads


def cuda_devices() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them: those that this process may use."""
    from trainer.runtime.device import has_gpu

    if not has_gpu():
        return []
    import torch

    number = torch.cuda.device_count()
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given[:number] or [str(device) for device in range(number)]


def environments(jobs: int) -> list[dict[str, str]]:
    """What each of the jobs gets beside this process's environment; one job gets the whole machine, as
    without a pool. Raises ConfigError for more jobs than the machine has devices, or cores."""
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {jobs}")
    if jobs == 1:
        return [{}]
    devices, cores = cuda_devices(), num_cores()
    if devices and jobs > len(devices):
        raise ConfigError(
            f"--jobs {jobs}: each run needs a CUDA device of its own, and this machine has {len(devices)}. "
            f"Give --jobs {len(devices)}; CUDA_VISIBLE_DEVICES= makes the runs use the CPU"
        )
    if not devices and jobs > cores:
        raise ConfigError(
            f"--jobs {jobs}: each run needs a core of its own, and this machine has {cores}. "
            f"Give --jobs {cores}"
        )
    shared = {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    if os.environ.get("OMP_NUM_THREADS"):
        shared = {}
    return [{**shared, **({"CUDA_VISIBLE_DEVICES": devices[job]} if devices else {})} for job in range(jobs)]


class Pool:
    """with Pool(jobs) as pool: pool.submit(…); pool.wait()

    An exception within the `with`, KeyboardInterrupt above all, tells every child to stop, and waits for
    them; another one kills them. A task that raises KeyboardInterrupt, because somebody has stopped its
    child, stops all.
    """

    def __init__(self, jobs: int = 1) -> None:
        """Raises ConfigError for more jobs than the machine holds."""
        self._environments = environments(jobs)
        self._changed = threading.Condition()
        self._tasks: list[tuple[int, int, Callable[[], None], Future[Any]]] = []  # a heap
        self._order = itertools.count()
        self._num_open = 0  # tasks that wait or run
        self._children: list[BaseProcess] = []
        self._error: BaseException | None = None  # the first that a task raised
        self._closed = False
        self.stopping = False
        self._threads = [
            threading.Thread(target=self._work, args=(environment,), name=f"job-{job}", daemon=True)
            for job, environment in enumerate(self._environments)
        ]

    @property
    def jobs(self) -> int:
        return len(self._environments)

    def submit(self, task: Callable[[], Result], place: int = 0) -> "Future[Result]":
        """Runs the task as soon as a thread is free: those of the lowest place first, then in the order in
        which they came. A task may submit others."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(task())
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
                if isinstance(error, KeyboardInterrupt):
                    self.stop()
                future.set_exception(error)

        with self._changed:
            if self.stopping:
                raise KeyboardInterrupt
            heapq.heappush(self._tasks, (place, next(self._order), run, future))
            self._num_open += 1
            self._changed.notify()
        return future

    def wait(self) -> None:
        """Until all tasks have ended, also those that tasks submit. Raises what the first of them raised."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_open or self._error is not None)
            if self._error is not None:
                raise self._error

    def run_child(self, log: Path, main: Callable[..., None], *arguments: object) -> int:
        """Exit code of a process that calls main(*arguments) and adds what it prints to the log. Ctrl-C does
        not reach it: this process passes it on, once. Raises KeyboardInterrupt when the pool stops."""
        with self._changed:  # stop() sees every child that has been started
            if self.stopping:
                raise KeyboardInterrupt
            child = forked.start(main, arguments, _here.environment, log)
            self._children.append(child)
        code = forked.exit_code(child)
        with self._changed:
            self._children.remove(child)
            if self.stopping:
                raise KeyboardInterrupt
        return code

    def stop(self) -> None:
        """Tells every child once, and begins nothing any more."""
        with self._changed:
            if self.stopping:
                return
            self.stopping = True
            for *_, future in self._tasks:
                future.set_exception(KeyboardInterrupt())
            self._num_open -= len(self._tasks)
            self._tasks.clear()
            self._changed.notify_all()
            for child in self._children:
                child.terminate()

    def kill(self) -> None:
        """Ends every child and what it has started."""
        self.stop()
        with self._changed:
            for child in self._children:
                assert child.pid is not None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)

    def __enter__(self) -> "Pool":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                self.stop()
            if not self._is_over(STOP_WAIT_S if kind is not None else None):
                self.kill()
        except BaseException:  # asked a second time
            self.kill()
            raise
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            for thread in self._threads:
                thread.join()

    def _is_over(self, timeout_s: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_open, timeout_s)

    def _work(self, environment: dict[str, str]) -> None:
        _here.pool, _here.environment = self, environment
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._closed)
                if not self._tasks:
                    return
                run = heapq.heappop(self._tasks)[2]
            run()
            with self._changed:
                self._num_open -= 1
                self._changed.notify_all()


def run_child(log: Path, main: Callable[..., None], *arguments: object) -> int:
    """Pool.run_child() of the pool whose task asks; of one for this child alone where none does."""
    pool: Pool | None = getattr(_here, "pool", None)
    if pool is not None:
        return pool.run_child(log, main, *arguments)
    with Pool() as alone:
        return alone.submit(lambda: alone.run_child(log, main, *arguments)).result()


@contextmanager
def interruptible() -> Iterator[None]:
    """A scheduler's SIGTERM is a KeyboardInterrupt, as Ctrl-C is. Launchers and shells repeat the first
    signal at once: a second one counts after FORCE_AFTER_S only, as in a run."""
    first_s: dict[int, float] = {}

    def interrupt(number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if number not in first_s or now_s - first_s[number] > FORCE_AFTER_S[signal.Signals(number)]:
            first_s.setdefault(number, now_s)
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Steps:
    """Counts tasks and tells how long the rest will take: as long as those of this call did, `jobs` at once.
    Lines of tasks that run at once do not mix."""

    def __init__(self, total: int, notify: Notify, jobs: int = 1) -> None:
        self.total, self.jobs = total, jobs
        self.number = self.num_run = 0
        self.seconds = 0.0
        self._notify = notify
        self._running: dict[int, float] = {}  # number of a step → when it began
        self._lock = threading.RLock()

    def notify(self, line: str) -> None:
        with self._lock:
            self._notify(line)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        with self._lock:
            left = f"   {clock(self._left_s())} left" if self.num_run else ""
            self.number += 1
            number = self.number
            self.notify(f"[{number}/{self.total}] {title}{left}")
            self._running[number] = started = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                del self._running[number]
                self.num_run += 1
                self.seconds += time.monotonic() - started

    def _left_s(self) -> float:
        """When a step begins: it, those after it, and what the running ones lack; no less than one takes."""
        mean_s, now_s = self.seconds / self.num_run, time.monotonic()
        running_s = sum(max(0.0, mean_s - (now_s - began_s)) for began_s in self._running.values())
        return max(mean_s, (mean_s * (self.total - self.number) + running_s) / self.jobs)

    def skip(self, number: int = 1) -> None:
        with self._lock:
            self.number += number
