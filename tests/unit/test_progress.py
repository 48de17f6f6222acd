"""Bars and lines of long steps, in pseudo-terminals of 80 and 120 columns."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from trainer.runtime import progress
from trainer.runtime.progress import StageBar, StageLines, fitted, in_bytes, in_time, stage_numbers
from trainer.training.console import RunConsole, bar_line

RECORD = {"loss": 0.43214, "lr": 8.1e-4, "events_per_s": 1234.4, "memory_gb": 1.2}
BANNER = [
    ("data", "a folder [96 events]"),
    ("batch", "64 events a step = 32 micro-batch × 1 process × 2 accumulation steps; 5 candidates an event"),
    ("run", "/a/long/path/" + "x" * 130),
]


@pytest.fixture(params=[80, 120])
def columns(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def on_terminal(columns: int, write: Callable[[TextIO], None]) -> list[str]:
    """What `write` sends to a terminal, one entry each time the cursor returns, without escape sequences."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    seen: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux says so when the other side is closed
            while part := os.read(ours, 4096):
                seen.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w", encoding="utf-8") as terminal:
        write(terminal)
    reader.join(10)
    os.close(ours)
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(seen).decode()))


@pytest.fixture(autouse=True)
def terminal_of_a_person(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENSR_NO_BAR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))  # rich measures the terminal that pytest runs in


def test_a_training_run_fits_the_terminal(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(terminal: TextIO) -> None:
        monkeypatch.setattr(sys, "stderr", terminal)
        with RunConsole(tmp_path, 5000) as console:
            console.banner(BANNER)
            console.start_bar()
            console.step(1200, RECORD)
            console.advance(1201)
            time.sleep(0.15)  # the bar is drawn ten times a second
            console.doing("validating", 3, 16)
            time.sleep(0.15)
            console.doing("saving")
            time.sleep(0.15)

    lines = on_terminal(columns, train)
    long_word = next(line for line in lines if "xxx" in line)
    assert max(len(line) for line in lines if line is not long_word) <= columns
    assert long_word.endswith("x" * 130)  # a path is not broken: it can be copied
    moved = next(line for line in lines if "1,201/5,000" in line)
    assert (
        moved.startswith("training") and "left" in moved and "loss 0.4321" in moved and "1,234 ev/s" in moved
    )
    assert ("lr 8.1e-04" in moved) == (columns == 120)
    assert any(line.startswith("validating") and "batch 3/16" in line for line in lines)
    assert any(line.startswith("saving") and "1,201/5,000" in line for line in lines)
    log = (tmp_path / "train.log").read_text()
    assert "2 accumulation steps; 5 candidates an event\n" in log and "1,201" not in log


def test_a_stage_fits_the_terminal_and_is_cleared(columns: int) -> None:
    def prepare(terminal: TextIO) -> None:
        bar = StageBar(terminal)
        bar("sort", 1, 4_000_000)
        bar._started_s -= 10  # it lasts
        bar("sort", 1_200_000, 4_000_000)
        bar.clear()
        terminal.write("the answer\n")

    lines = on_terminal(columns, prepare)
    drawn = next(line for line in lines if "1,200,000/4,000,000" in line)
    assert len(drawn) <= columns and drawn.startswith("sort ") and re.search(r"0:00:2\d left", drawn)
    assert "the answer" in lines


def test_a_short_stage_shows_no_bar(columns: int) -> None:
    def prepare(terminal: TextIO) -> None:
        bar = StageBar(terminal)
        for done in range(5):
            bar("sort", done, 4)
        terminal.write("the answer\n")

    assert [line for line in on_terminal(columns, prepare) if line] == ["the answer"]


def test_fields_are_left_out_least_wanted_first() -> None:
    fields = ["aaaa", "bbbb", "cccc"]
    assert fitted(fields, (1, 2), 16) == "aaaa  bbbb  cccc"
    assert fitted(fields, (1, 2), 15) == "aaaa  cccc"
    assert fitted(fields, (1, 2), 5) == "aaaa"
    assert bar_line(3, 10, {}, 60, 80) == "3/10  0:01:00 left"
    assert bar_line(3, 10, RECORD, 60, 0) == "3/10"
    assert stage_numbers(30, 120, 10, 80) == "30/120  0:00:30 left  3/s"
    assert stage_numbers(30, 0, 10, 80) == "30  3/s"


def test_without_a_terminal_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_shown", None)
    progress.report("sort", 1, 4)  # no program has asked
    shown = progress.show_stages()
    assert isinstance(shown, StageLines)
    shown._spoke_s -= 10
    progress.report("sort", 2, 4)
    assert stream.getvalue() == "", "a stage that has just begun may be over soon"
    shown._started_s -= 1
    progress.report("sort", 2, 4)
    progress.waiting_for("loading")
    assert stream.getvalue().startswith("  sort         2/4   50 %")
    assert len(stream.getvalue().splitlines()) == 1


def test_a_dumb_terminal_shows_lines(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had neither: rich draws no bar there."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(progress, "_shown", None)

    def train(terminal: TextIO) -> None:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert isinstance(progress.show_stages(), StageLines)
        with RunConsole(tmp_path, 5000) as console:
            console.start_bar()
            console.step(1200, RECORD)

    assert any(line.startswith("step 1,200/5,000") for line in on_terminal(columns, train))


def test_sizes_and_times_have_a_unit_that_fits() -> None:
    sizes = (320, 8.5e4, 1.2e6, 12e6, 0.96e9, 3.4e9, 1.41e11)
    assert list(map(in_bytes, sizes)) == [
        *("320 B", "85 kB", "1.2 MB", "12 MB", "1.0 GB", "3.4 GB", "141.0 GB"),
    ]
    assert list(map(in_time, (0.058, 45, 720, 12_240))) == ["0.058 s", "45 s", "12 min", "3.4 h"]
