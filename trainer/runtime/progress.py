"""Progress of long steps as plain lines on stderr: at most one every few seconds, with rate and time left."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

EVERY_S = 3.0

Notify = Callable[[str], None]
"""A line for whoever waits."""
CountProgress = Callable[[int, int], None]
"""(done, in all)."""
StageProgress = Callable[[str, int, int], None]
"""(stage, done, in all), as StageLines takes them."""


class StageLines:
    """Callable as progress(stage, done, total); total = 0 where it is not known. A new stage speaks at once
    when it lasts."""

    def __init__(self, stream: TextIO | None = None, every_s: float = EVERY_S, enabled: bool = True) -> None:
        self._stream, self._every_s, self._enabled = stream, every_s, enabled
        self._stage = ""
        self._started_s = self._spoke_s = time.monotonic()

    def __call__(self, stage: str, done: int, total: int = 0) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started_s = stage, now
        if self._enabled and now - self._spoke_s >= self._every_s:
            self._spoke_s = now
            stream = self._stream or sys.stderr
            stream.write(stage_line(stage, done, total, now - self._started_s) + "\n")
            stream.flush()


def stage_line(stage: str, done: int, total: int, seconds: float) -> str:
    """`sort         1,200,000/4,000,000   30 %    400,000/s   7 s left`."""
    count = f"{done:,}/{total:,}   {100 * done / total:.0f} %" if total else (f"{done:,}" if done else "")
    rate = done / seconds if seconds > 0 else 0.0
    speed = f"   {rate:,.0f}/s" if rate >= 1 else ""
    left = f"   {(total - done) / rate:,.0f} s left" if total and rate > 0 else ""
    return f"  {stage:<12} {count}{speed}{left}".rstrip()


def clock(seconds: float) -> str:
    """3751 → 1:02:31."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
