"""RUN/status.json: {"status": running | stopped | finished | failed | crashed, "progress": {…}}.

Scripts decide by it whether to start a run again, because launchers turn every exit code but 0 into 1.
failed: the user must mend something. crashed, and running without a process: try again.
"""

import contextlib
import json
import logging
from dataclasses import asdict, fields
from pathlib import Path

from trainer.errors import EnvironmentProblem
from trainer.runs.checkpoint import Progress
from trainer.runs.run_folder import RunFolder
from trainer.runtime.files import write_text

log = logging.getLogger(__name__)


def begin_status(folder: Path, progress: Progress) -> None:
    """This attempt is running, whatever the one before came to."""
    _put_status(folder, "running", progress)


def write_status(folder: Path, status: str, progress: Progress, enabled: bool = True) -> None:
    """Within an attempt, failed has the last word. The rank that has failed knows why and writes it; its
    peers see no more than that it is gone, and would say crashed."""
    has_failed = RunFolder(folder).read_status().get("status") == "failed"
    if enabled and not (has_failed and status in ("running", "crashed")):
        _put_status(folder, status, progress)


def _put_status(folder: Path, status: str, progress: Progress) -> None:
    """A disk that does not take it costs a warning: what ends a run is told by the error that ended it. A
    full one still takes the new status in the blocks of the old: a job script must not start again what a
    user has to mend."""
    path = RunFolder(folder).status
    text = json.dumps({"status": status, "progress": asdict(progress)}, indent=2) + "\n"
    try:
        write_text(path, text)
    except EnvironmentProblem as error:
        log.warning("%s", error)
        with contextlib.suppress(OSError), path.open("r+b") as file:
            file.write(text.encode().ljust(path.stat().st_size, b"\n"))


def read_progress(folder: str | Path) -> Progress:
    known = {field.name for field in fields(Progress)}
    found = RunFolder(folder).read_progress()
    return Progress(**{key: value for key, value in found.items() if key in known})
