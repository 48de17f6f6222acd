"""What a verb makes of something damaged, and how a campaign counts it.

same        the answer of the undamaged original
refused     a GensrError: what, where and the fix
traceback   any other exception
changed     another answer without an error
hang        no answer in time
"""

import io
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from trainer.errors import GensrError

LIMIT_S = 60.0
BAD = ("traceback", "changed", "hang", "lost")


class Hang(BaseException):
    """No except clause of the program catches it."""


@contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def silence() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def outcome_of(run: Callable[[], Any], expected: Any, limit_s: float = LIMIT_S) -> tuple[str, str]:
    """(outcome, what is to be known of it). expected: the original's answer; None where any will do."""
    try:
        with time_limit(limit_s), warnings.catch_warnings(), silence():
            warnings.simplefilter("ignore")
            found = run()
    except GensrError as error:
        return "refused", str(error)
    except Hang:
        return "hang", f"no answer in {limit_s:.0f} s"
    except (Exception, RecursionError):
        return "traceback", traceback.format_exc()
    if expected is None or found == expected:
        return "same", ""
    return "changed", f"{found} instead of {expected}"


@dataclass
class Tally:
    """Outcomes of one campaign, and the bad ones in words."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, outcome: str, what: str, detail: str) -> None:
        self.counts[outcome] += 1
        if outcome in BAD:
            self.bad.append(f"{self.name}: {outcome}: {what}\n{detail}")

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def row(self) -> str:
        """A row of docs/RESULTS.md."""
        shown = ("same", "refused", *BAD)
        return f"| {self.name} | {self.total:,} | " + " | ".join(f"{self.counts[n]:,}" for n in shown) + " |"


HEADER = (
    "| campaign | cases | same answer | refused | tracebacks | other answer | hangs | lost |\n"
    "|---|---|---|---|---|---|---|---|"
)
