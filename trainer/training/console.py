"""What a run says: a banner, one line every few steps (a live bar on a terminal), train.log and
metrics.jsonl. Only rank 0 speaks."""

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from data_shards.secrets import mask_secrets
from trainer.errors import EnvironmentProblem
from trainer.runs.run_folder import RunFolder
from trainer.runtime.files import atomic, writing
from trainer.runtime.progress import clock


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
        self._progress: Progress | None = None
        self._started_s = time.monotonic()
        self._first_step = resume_step or 0
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
        if not self.enabled:
            return
        for line in map(mask_secrets, lines):
            if self._progress is not None:
                self._progress.console.print(line, markup=False)
            else:
                self._terminal.print(line, markup=False)
            self._write(line)

    def banner(self, rows: Sequence[tuple[str, str]]) -> None:
        """The block before training: one `name  value` line each."""
        width = max(len(name) for name, _ in rows)
        self.say(*(f"{name:<{width}}  {value}" for name, value in rows), "")

    def start_bar(self) -> None:
        """From here on `step()` moves a live bar, if this is a terminal."""
        self._started_s = time.monotonic()
        if self.enabled and self._terminal.is_terminal and not os.environ.get("GENSR_NO_BAR"):
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[line]}"),
            )
            self._progress = Progress(*columns, console=self._terminal, transient=True)
            self._progress.start()
            self._progress.add_task("training", total=self.num_steps, completed=self._first_step, line="")

    def step(self, step: int, record: Mapping[str, float]) -> None:
        """A training record: metrics.jsonl and one line. `record` has loss, lr, events_per_s, memory_gb."""
        if not self.enabled:
            return
        self.record({"kind": "train", "step": step, **record})
        line = step_line(step, self.num_steps, record, self.eta_s(step))
        self._write(line)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, line=line)
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
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def step_line(step: int, num_steps: int, record: Mapping[str, float], eta_s: float) -> str:
    """`step 1,200/5,000  24 %  loss 0.4321  lr 8.1e-04  1,234 ev/s  1.2 GB  eta 0:12:31`."""
    return (
        f"step {step:,}/{num_steps:,}  {100 * step / num_steps:3.0f} %  loss {record['loss']:.4f}  lr "
        f"{record['lr']:.1e}  "
        f"{record['events_per_s']:,.0f} ev/s  {record['memory_gb']:.1f} GB  eta {clock(eta_s)}"
    )


def keep_records(path: Path, last_step: int) -> None:
    """Drop the records after `last_step`, and half a line that a killed process may have left."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    with atomic(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
