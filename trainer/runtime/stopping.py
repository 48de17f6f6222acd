"""Ends of a run that its own steps do not decide: a signal, a second signal, and a step that never comes.

    first SIGTERM, SIGINT or SIGUSR1   all ranks stop at the same step boundary and save
    second SIGINT or SIGTERM           now, without saving
    the launcher is killed             SIGTERM to each of its processes (end_with_launcher)
    no sign of life for run.timeout_s  the end of this process: a peer is lost or hangs. What waits in a
                                       collective gives up after run.timeout_s,
                                       too; this is for what has no time-out of its own

A collective keeps Python's signal handlers from running: a thread reads the signals from a pipe and counts
the time.
"""

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# from here on a repetition means: now (launchers and shells repeat the first at once)
FORCE_AFTER_S = {signal.SIGINT: 3.0, signal.SIGTERM: 15.0}
GRACE_S = 10.0  # a second signal, or a time-out, lets the main thread end by itself for so long
LAST_WORDS_S = 5.0
EXIT_FORCED = 70  # sysexits' EX_SOFTWARE
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """From here on Linux sends this process SIGTERM when the one that started it ends.

    A launcher that is killed leaves its processes behind. One that still waits for its peers would meet those
    of the next job at the same address, and the two would train together.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class StopSignal:
    """`poll()` is called once a step on every rank. The ranks agree by an all-reduce over gloo on the CPU
    that runs beside the next step: nobody waits for it, and all ranks read the same answer one step later.

    timeout_s: with several processes, the longest time between two signs of life (`beat()`); 0 = for ever.
    last_words is called with the reason before the process is ended by force.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        timeout_s: float = 0,
        last_words: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.received = ""  # name of the signal this rank got
        self.all_idle = True  # no rank was busy when the last answer was asked for
        several = accelerator.num_processes > 1
        # of its own, a group of gloo waits half an hour
        wait = timedelta(seconds=timeout_s) if timeout_s else None
        self._group = torch.distributed.new_group(backend="gloo", timeout=wait) if several else None
        self._flags = torch.zeros(2, dtype=torch.int32)
        self._work: Any = None
        self._first_s: dict[int, float] = {}  # signal number → when it came first
        self._previous: dict[int, Any] = {}
        self._last_words = last_words
        self._limit_s = timeout_s + GRACE_S if several and timeout_s else float("inf")
        self._last_beat_s = time.monotonic()
        self._pipe: tuple[int, int] | None = None
        self._thread = threading.Thread(target=self._watch, name="stop-watch", daemon=True)

    def __enter__(self) -> "StopSignal":
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._last_beat_s = time.monotonic()
        self._thread.start()
        # ValueError: not in the main thread (a test or a notebook), so no signals to catch
        with contextlib.suppress(ValueError):
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
            self._previous_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            signal.set_wakeup_fd(self._previous_fd)
        assert self._pipe is not None
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for end in self._pipe:
            os.close(end)
        if self._work is not None and error_type is None:  # after an error a peer may be gone
            self._work.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first_s = self._first_s.setdefault(number, now)
        if now - first_s > FORCE_AFTER_S.get(signal.Signals(number), float("inf")):
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name

    def beat(self) -> None:
        """A sign of life."""
        self._last_beat_s = time.monotonic()

    def poll(self, busy: bool = False) -> bool:
        """True once any rank was asked to stop: the same answer at the same step on every rank. So is
        all_idle: whether no rank was `busy`."""
        self.beat()
        if self._group is None:
            self.all_idle = not busy
            return bool(self.received)
        agreed = False
        if self._work is not None:
            self._work.wait()
            agreed, anyone_busy = bool(self._flags[0]), bool(self._flags[1])
            self.all_idle = not anyone_busy
        self._flags = torch.tensor([int(bool(self.received)), int(busy)], dtype=torch.int32)
        self._work = torch.distributed.all_reduce(
            self._flags, op=torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed

    # ---- the thread ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self._pipe is not None
        first_s: dict[int, float] = {}
        forced_s, reason = float("inf"), ""
        while True:
            now = time.monotonic()
            silent_s = now - self._last_beat_s
            if now >= forced_s or silent_s >= self._limit_s:
                self._end(
                    reason
                    or f"no step for {silent_s:.0f} s: another process is lost or hangs (run.timeout_s)"
                )
            wait_s = min(forced_s - now, self._limit_s - silent_s, 3600.0)
            if not select.select([self._pipe[0]], [], [], wait_s)[0]:
                continue
            for number in os.read(self._pipe[0], 64):
                if number == 0:
                    return
                now = time.monotonic()
                if now - first_s.setdefault(number, now) > FORCE_AFTER_S.get(
                    signal.Signals(number), float("inf")
                ):
                    forced_s = min(forced_s, now + GRACE_S)
                    reason = f"a second {signal.Signals(number).name}, and no end within {GRACE_S:.0f} s"

    def _end(self, reason: str) -> None:
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(file=sys.stderr)  # where each thread hangs
        speaker = threading.Thread(target=self._last_words, args=(reason,), daemon=True)
        speaker.start()
        speaker.join(LAST_WORDS_S)  # what hangs may hold a lock or be the disk
        os._exit(EXIT_FORCED)


def end_with_children(pid: int) -> None:
    """Kills a launcher and its ranks: one left behind would hold a port and a core."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
