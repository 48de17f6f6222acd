"""One cell of the table: a run folder that `gensr train` and `gensr evaluate` make, each in a process of its
own, so that a crash of one leaves the others alone. What they print goes to TABLE/logs/."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import GensrError
from trainer.evaluation.summary import evaluation_name
from trainer.experiments.forked import run_program, run_verb
from trainer.experiments.pool import run_child
from trainer.runs.run_folder import RunFolder
from trainer.runtime.files import writing

STOPPED = 75  # of gensr train: a signal stopped it, and it has saved
SPLIT = "test"


class CellFailed(GensrError):
    """A process of a cell ended badly; the text is the first line of its error."""


@dataclass(frozen=True)
class Cell:
    """One run: a model's seed or trial."""

    model: str
    name: str  # seed-0, trial-3
    run_dir: Path
    settings_file: Path
    words: tuple[str, ...]  # settings on top of the file
    log: Path
    before: "Cell | None" = None  # the run that this one begins with (Ranker.stages)

    @property
    def title(self) -> str:
        return f"{self.model} {self.name}"

    @property
    def training_words(self) -> list[str]:
        """What `gensr train` is given behind the file."""
        begun = [f"run.init_from={self.before.run_dir}"] if self.before else []
        return [f"run.dir={self.run_dir}", *self.words, *begun]

    @property
    def runs(self) -> "list[Cell]":
        """The runs that make its model, in their order; the last one is its own."""
        return [*(self.before.runs if self.before else ()), self]


def is_evaluated(cell: Cell, candidates: str) -> bool:
    return RunFolder(cell.run_dir).is_evaluated(evaluation_name(SPLIT, candidates))


def is_done(cell: Cell, candidates: Sequence[str]) -> bool:
    """candidates: what it must be evaluated on; nothing for a trial."""
    return RunFolder(cell.run_dir).has_ended_well and all(is_evaluated(cell, kind) for kind in candidates)


def train_cell(cell: Cell) -> None:
    """Train, or go on where it was interrupted. Raises CellFailed, and KeyboardInterrupt when stopped."""
    for run in cell.runs:
        if not RunFolder(run.run_dir).has_ended_well:
            command = ["train", str(run.settings_file), *run.training_words, "--resume", "auto"]
            run_words(command, run.log)


def evaluate_cell(cell: Cell, candidates: Sequence[str], events: int) -> None:
    for kind in candidates:
        if not is_evaluated(cell, kind):
            sample = ["--events", str(events)] if kind == "full" else []
            command = ["evaluate", str(cell.run_dir), "--split", SPLIT, "--candidates", kind, *sample]
            run_words([*command, "--no-baselines"], cell.log, mode="a")


def run_words(words: Sequence[str], log: Path, launch: Sequence[str] = (), mode: str = "w") -> None:
    """`gensr WORDS`, or `LAUNCH -m gensr WORDS`, in a child whose output goes to the log. Raises CellFailed,
    and KeyboardInterrupt when it was stopped."""
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.open(mode).close()
    launched = [*launch, "-m", "gensr", *words]
    code = run_child(log, run_program, *launched) if launch else run_child(log, run_verb, *words)
    if code == STOPPED:
        raise KeyboardInterrupt
    if code:
        raise CellFailed(f"gensr {words[0]}: {error_line(log, code)}")


def error_line(log: Path, code: int) -> str:
    """The first line of the error that ended a process: what `gensr:` says, else a traceback's last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    if said := [line for line in lines if line.startswith("gensr: ")]:
        return said[-1].removeprefix("gensr: ")
    if code < 0:
        return f"ended by signal {-code}"
    return next((line for line in reversed(lines) if line), f"exit code {code}")
