"""A verb of gensr in a child process, for what makes many runs."""

from collections.abc import Sequence
from pathlib import Path

from trainer.errors import GensrError
from trainer.experiments.forked import run_program, run_verb
from trainer.experiments.pool import run_child
from trainer.runtime.files import writing

STOPPED = 75  # of gensr train: a signal stopped it, and it has saved


class VerbFailed(GensrError):
    """The process of a verb ended badly; the text is the first line of its error."""


def run_gensr(arguments: Sequence[str], log: Path, launch: Sequence[str] = (), mode: str = "w") -> None:
    """`gensr ARGUMENTS`, or `LAUNCH -m gensr ARGUMENTS`, in a child whose output goes to the log. Raises
    VerbFailed, and KeyboardInterrupt when it was stopped."""
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.open(mode).close()
    launched = [*launch, "-m", "gensr", *arguments]
    code = run_child(log, run_program, *launched) if launch else run_child(log, run_verb, *arguments)
    if code == STOPPED:
        raise KeyboardInterrupt
    if code:
        raise VerbFailed(f"gensr {arguments[0]}: {error_line(log, code)}")


def error_line(log: Path, code: int) -> str:
    """The first line of the error that ended a process: what `gensr:` says, else a traceback's last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    if said := [line for line in lines if line.startswith("gensr: ")]:
        return said[-1].removeprefix("gensr: ")
    if code < 0:
        return f"ended by signal {-code}"
    return next((line for line in reversed(lines) if line), f"exit code {code}")
