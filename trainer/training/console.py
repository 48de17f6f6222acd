"""What a run says: a banner, one line every few steps (a live bar on a terminal), train.log and
metrics.jsonl. Only rank 0 speaks."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from data_shards.secrets import mask_secrets
from trainer.errors import EnvironmentProblem
from trainer.runs.run_folder import RunFolder
from trainer.runtime.files import write_text, writing
from trainer.runtime.progress import Bar, clear_bar, clock, draws_bars, fitted, wrapped

DOING_WIDTH = len("validating")


class RunConsole:
    """Terminal, RUN/train.log and RUN/metrics.jsonl of one run. With `enabled=False` (ranks above 0) every
    method does nothing.

    Usable in a `with` block, which closes the files and the live bar.
    """

    def __init__(
        self, run_dir: str | Path, num_steps: int, enabled: bool = True, resume_step: int | None = None
    ) -> None:
        """resume_step: None starts the files anew; else records of later steps, which will be made again, are
        dropped."""
        self.enabled, self.num_steps = enabled, num_steps
        self._bar: Bar | None = None
        self._record: dict[str, float] = {}  # the last one, for the bar
        self._started_s = time.monotonic()
        self._first_step = self._step = resume_step or 0
        if not enabled:
            return
        folder = Path(run_dir)
        self._terminal = Console(stderr=True, highlight=False, soft_wrap=True)
        metrics = RunFolder(folder).metrics
        if resume_step is not None and metrics.exists():
            keep_records(metrics, resume_step)
        self._folder, mode = folder, "w" if resume_step is None else "a"
        with writing(folder):
            self._log = RunFolder(folder).log.open(mode, encoding="utf-8", buffering=1)
            self._metrics = metrics.open(mode, encoding="utf-8", buffering=1)

    def __enter__(self) -> "RunConsole":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        self._stop_bar()
        if error is not None:
            with contextlib.suppress(EnvironmentProblem):  # the disk may be what ended the run
                self._write(f"stopped by {type(error).__name__}: {mask_secrets(str(error))}")
        for file in (self._log, self._metrics):
            with contextlib.suppress(OSError):  # what a full disk did not take is tried once more
                file.close()

    def say(self, *lines: str) -> None:
        """Lines for terminal and log."""
        for line in map(mask_secrets, lines):
            self._tell(line, [line])

    def _tell(self, line: str, shown: Sequence[str]) -> None:
        """A line for the log, and how it looks on the terminal."""
        if self.enabled:
            clear_bar()
            for part in shown or [""]:
                self._terminal.print(part, markup=False)
            self._write(line)

    def banner(self, rows: Sequence[tuple[str, str]]) -> None:
        """The block before training: one `name  value` line each."""
        width = max(len(name) for name, _ in rows)
        for name, value in [*rows, ("", "")]:
            line = mask_secrets(f"{name:<{width}}  {value}").rstrip()
            self._tell(line, self._wrapped(line, width + 2))

    def _wrapped(self, line: str, indent: int) -> list[str]:
        """The line in parts that fit a terminal, broken between words."""
        if not (self.enabled and self._terminal.is_terminal):
            return [line]
        return wrapped(line, self._terminal.width, indent)

    def start_bar(self) -> None:
        """From here on `step()` moves a live bar, if the terminal can show one."""
        self._started_s = time.monotonic()
        if self.enabled and draws_bars():
            clear_bar()
            self._bar = Bar(self._terminal, DOING_WIDTH, "training")
            self._bar.show("training", self._first_step, self.num_steps, "first step …")

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        """What the bar says it waits for: training, validating (`done` of `total` batches), saving."""
        if self._bar is not None:
            self._bar.show(what, line=f"batch {done:,}/{total:,}" if total else self._numbers(self._bar))

    def advance(self, step: int) -> None:
        """Move the bar; the numbers beside it are those of the last record."""
        self._step = step
        if self._bar is not None:
            self._bar.show(done=step, line=self._numbers(self._bar))

    def _numbers(self, bar: Bar) -> str:
        return bar_line(self._step, self.num_steps, self._record, self.eta_s(self._step), bar.room)

    def step(self, step: int, record: Mapping[str, float]) -> None:
        """A training record: metrics.jsonl and one line. `record` has loss, lr, events_per_s, memory_gb."""
        if not self.enabled:
            return
        self.record({"kind": "train", "step": step, **record})
        line = step_line(step, self.num_steps, record, self.eta_s(step))
        self._write(line)
        self._record = dict(record)
        if self._bar is not None:
            self.advance(step)
        else:
            self._terminal.print(line, markup=False)

    def eta_s(self, step: int) -> float:
        done = max(1, step - self._first_step)
        return (time.monotonic() - self._started_s) / done * (self.num_steps - step)

    def record(self, document: Mapping[str, Any]) -> None:
        """One JSON line in metrics.jsonl."""
        if self.enabled:
            with writing(RunFolder(self._folder).metrics):
                self._metrics.write(json.dumps(document) + "\n")

    def _write(self, line: str) -> None:
        with writing(RunFolder(self._folder).log):
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def step_line(step: int, num_steps: int, record: Mapping[str, float], eta_s: float) -> str:
    """`step 1,200/5,000  24 %  loss 0.4321  lr 8.1e-04  1,234 ev/s  1.2 GB  eta 0:12:31`."""
    return (
        f"step {step:,}/{num_steps:,}  {100 * step / num_steps:3.0f} %  loss {record['loss']:.4f}  lr "
        f"{record['lr']:.1e}  "
        f"{record['events_per_s']:,.0f} ev/s  {record['memory_gb']:.1f} GB  eta {clock(eta_s)}"
    )


def bar_line(step: int, num_steps: int, record: Mapping[str, float], eta_s: float, room: int) -> str:
    """`1,200/5,000  0:12:31 left  loss 0.4321  lr 8.1e-04  1,234 ev/s  1.2 GB`, less what does not fit into
    `room` characters: lr goes first, then memory, speed, loss and time. record: empty before the first
    one."""
    fields = [f"{step:,}/{num_steps:,}", f"{clock(eta_s)} left"]
    if record:
        fields += [
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.1e}",
            f"{record['events_per_s']:,.0f} ev/s",
            f"{record['memory_gb']:.1f} GB",
        ]
    return fitted(fields, (3, 5, 4, 2, 1), room)


def keep_records(path: Path, last_step: int) -> None:
    """Drop the records after `last_step`, and half a line that a killed process may have left."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    write_text(path, "".join(f"{line}\n" for line in kept))
