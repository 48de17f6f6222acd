"""Progress of long steps, on stderr: a bar in place on a terminal, else a line every few seconds, both with
rate and time left.

A step takes `progress(stage, done, total)`. Deep ones call report(), which is silent until a program calls
show_stages(): as with logging, the program decides.
"""

import atexit
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from data_shards.progress import StageProgress

if TYPE_CHECKING:
    from rich.console import Console

EVERY_S = 3.0  # between two lines
REFRESH_S = 0.1  # between two pictures of a bar
LASTS_S = 0.5  # a stage that is over sooner shows no bar and no line
STAGE_WIDTH = 12

Notify = Callable[[str], None]
"""A line for whoever waits."""
CountProgress = Callable[[int, int], None]
"""(done, in all)."""


def silent(line: str) -> None:
    """A Notify that shows nothing."""


def is_terminal() -> bool:
    """Whether a person watches; GENSR_NO_BAR=1 says no."""
    return sys.stderr.isatty() and not os.environ.get("GENSR_NO_BAR")


def draws_bars() -> bool:
    """Whether a bar can stay in place: rich draws none on a dumb terminal, the shell of an editor say."""
    return is_terminal() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


# ---- a bar in place ----------------------------------------------------------------------------------------


def bar_width(terminal_width: int) -> int:
    return 30 if terminal_width >= 110 else 16 if terminal_width >= 70 else 6


def fitted(fields: Sequence[str], least_wanted: Sequence[int], room: int) -> str:
    """The fields two spaces apart; where they do not fit into `room` characters, those named by
    `least_wanted` (places in `fields`, in that order) are left out."""
    kept = list(fields)
    for place in least_wanted:
        if len("  ".join(filter(None, kept))) <= room:
            break
        if place < len(kept):
            kept[place] = ""
    return "  ".join(filter(None, kept))


def wrapped(line: str, width: int, indent: int) -> list[str]:
    """The line in parts of at most `width` characters, broken between words: a path stays whole, so that it
    can be copied. Later parts begin `indent` spaces in."""
    return textwrap.wrap(
        line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


class Bar:
    """What is done, a bar, and the numbers that fit beside it. Cleared at the end of the program, whatever
    ends it."""

    def __init__(
        self, console: "Console", label_width: int, label: str = "", auto_refresh: bool = True
    ) -> None:
        """label: what it says first. auto_refresh: redrawn ten times a second by a thread, with what is
        printed above it; else by refresh()."""
        from rich.progress import BarColumn, Progress, TextColumn

        self._console, self._label_width = console, label_width
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=bar_width(console.width)),
            TextColumn("{task.fields[line]}", markup=False),
        )
        self.progress = Progress(
            *columns,
            console=console,
            transient=True,
            auto_refresh=auto_refresh,
            redirect_stdout=auto_refresh and sys.stdout.isatty(),  # an answer in a pipe stays there
            redirect_stderr=auto_refresh,
        )
        self._task = self.progress.add_task(self._fixed(label), total=None, line="")
        self.progress.start()
        atexit.register(self.progress.stop)  # else a terminal may keep its cursor hidden

    @property
    def room(self) -> int:
        """Characters beside the bar: of the terminal's width as it is now, less a space between two columns
        and the last place of the line."""
        width = self._console.width
        return width - self._label_width - bar_width(width) - 3

    def show(
        self,
        label: str | None = None,
        done: int | None = None,
        total: int | None = None,
        line: str | None = None,
    ) -> None:
        """Change what is given. total=0: not known."""
        if label is not None:
            self.progress.update(self._task, description=self._fixed(label))
        if total is not None:
            self.progress.update(self._task, total=total or None)
        if done is not None:
            self.progress.update(self._task, completed=done)
        if line is not None:
            self.progress.update(self._task, line=line)

    def _fixed(self, label: str) -> str:
        return f"{label[: self._label_width]:<{self._label_width}}"

    def stop(self) -> None:
        self.progress.stop()
        atexit.unregister(self.progress.stop)


class StageBar:
    """Callable as progress(stage, done, total); total = 0 where it is not known. A stage that lasts is
    shown."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console

        self._console = Console(file=stream, stderr=stream is None, highlight=False)
        self._bar: Bar | None = None
        self._stage, self._started_s, self._drawn_s = "", time.monotonic(), 0.0

    def __call__(self, stage: str, done: int, total: int = 0) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started_s = stage, now
        is_over = bool(total) and done >= total
        if self._bar is None and (is_over or now - self._started_s < LASTS_S):
            return
        if now - self._drawn_s < REFRESH_S and not is_over:
            return
        if self._bar is None:
            self._bar = Bar(self._console, STAGE_WIDTH, stage, auto_refresh=False)
        self._drawn_s = now
        line = stage_numbers(done, total, now - self._started_s, self._bar.room)
        self._bar.show(stage, done, total, line)
        self._bar.progress.refresh()

    def clear(self) -> None:
        """Before something else is printed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._stage = None, ""


def stage_numbers(done: int, total: int, seconds: float, room: int) -> str:
    """`1,200,000/4,000,000  0:00:07 left  400,000/s`, what fits of it."""
    rate = done / seconds if seconds > 0 else 0.0
    count = f"{done:,}/{total:,}" if total else (f"{done:,}" if done else "")
    left = f"{clock((total - done) / rate)} left" if total and rate > 0 else ""
    return fitted([count, left, f"{rate:,.0f}/s" if rate >= 1 else ""], (2, 1), room)


# ---- lines -------------------------------------------------------------------------------------------------


class StageLines:
    """Callable as progress(stage, done, total); total = 0 where it is not known. A stage that lasts
    speaks."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._stage = ""
        self._started_s = self._spoke_s = time.monotonic()

    def __call__(self, stage: str, done: int, total: int = 0) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started_s = stage, now
        lasts = now - self._started_s >= LASTS_S  # shorter ones, such as epochs, are not worth a line each
        if self._enabled and lasts and now - self._spoke_s >= EVERY_S:
            self._spoke_s = now
            sys.stderr.write(stage_line(stage, done, total, now - self._started_s) + "\n")
            sys.stderr.flush()


def stage_line(stage: str, done: int, total: int, seconds: float) -> str:
    """`sort         1,200,000/4,000,000   30 %    400,000/s   7 s left`."""
    count = f"{done:,}/{total:,}   {100 * done / total:.0f} %" if total else (f"{done:,}" if done else "")
    rate = done / seconds if seconds > 0 else 0.0
    speed = f"   {rate:,.0f}/s" if rate >= 1 else ""
    left = f"   {(total - done) / rate:,.0f} s left" if total and rate > 0 else ""
    return f"  {stage:<{STAGE_WIDTH}} {count}{speed}{left}".rstrip()


def clock(seconds: float) -> str:
    """3751 → 1:02:31."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def in_time(seconds: float) -> str:
    """`0.06 s`, `45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def in_bytes(value: float) -> str:
    """`320 B`, `85 kB`, `1.2 MB`, `12 MB`, `3.4 GB`."""
    if value >= 0.95e9:
        return f"{value / 1e9:.1f} GB"
    if value >= 0.95e6:
        return f"{value / 1e6:.{1 if value < 9.95e6 else 0}f} MB"
    return f"{value / 1e3:.0f} kB" if value >= 950 else f"{value:.0f} B"


# ---- the program's own -------------------------------------------------------------------------------------

_shown: StageBar | StageLines | None = None


def show_stages(enabled: bool = True) -> StageProgress:
    """From here on report() shows: a bar if stderr is a terminal, else lines. → the same, to be handed on.
    enabled=False: nothing is shown (ranks above 0)."""
    global _shown
    if _shown is None or isinstance(_shown, StageLines):
        _shown = StageBar() if enabled and draws_bars() else StageLines(enabled=enabled)
    return _shown


def report(stage: str, done: int, total: int = 0) -> None:
    """What a step deep inside a verb has done."""
    if _shown is not None:
        _shown(stage, done, total)


def clear_bar() -> None:
    """Before something is printed."""
    if isinstance(_shown, StageBar):
        _shown.clear()


def waiting_for(what: str) -> None:
    """Say on a terminal what the silence is about: imports, a model that loads."""
    if is_terminal() and os.environ.get("RANK", "0") == "0":
        clear_bar()
        sys.stderr.write(f"{what} …\n")
        sys.stderr.flush()
