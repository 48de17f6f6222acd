"""A day of the log as steps, each a verb in a process of its own, which resumes where it was interrupted:

    prepare --append ─▶ cf.onto ─┬▶ train, begun with the champion ─▶ evaluate ─▶ register
                                 └▶ the champion on the new folder, no step ─▶ evaluate

What is done is read from what the verbs have left.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.data.cf_table import cf_path
from trainer.errors import GensrError, RunError
from trainer.evaluation.summary import evaluation_name
from trainer.experiments.daily.plan import Daily, words_of
from trainer.experiments.table.cells import run_words
from trainer.registry.versions import registered_as
from trainer.runs.run_folder import RunFolder

NO_STEP = ("run.max_epochs=0", "run.max_steps=0")


@dataclass(frozen=True)
class Step:
    """A verb: what follows `gensr`, and whether it has been done."""

    title: str
    words: tuple[str, ...]
    is_done: Callable[[], bool]
    launched: bool = False  # on the processes of `launch`


@dataclass(frozen=True)
class Day:
    """One day. before: the prepared folder that it goes on from."""

    plan: Daily
    name: str
    before: Path

    @property
    def folder(self) -> Path:
        return self.plan.settings.folder(self.name)

    @property
    def new(self) -> RunFolder:
        """The run of this day."""
        return RunFolder(self.plan.out / "runs" / self.name)

    def carried(self, champion: int) -> RunFolder:
        """The champion's weights on this day's folder, without a step."""
        return RunFolder(self.plan.out / "runs" / f"{self.name}-version-{champion}")

    # ---- steps ---------------------------------------------------------------------------------------------

    def data_steps(self) -> list[Step]:
        given, raw = self.plan.settings, Path(self.plan.settings.logs) / self.name
        words = ("prepare", self.plan.source, str(raw), str(self.folder), "--append", str(self.before))
        prepare = (*words, *words_of(given.prepare))
        steps = [Step("prepare", prepare, (self.folder / "manifest.json").is_file)]
        if self.plan.cf is not None:
            settings = words_of({**self.plan.cf, "cf.onto": str(self.before)})
            steps.append(Step("cf", ("cf", str(self.folder), *settings), cf_path(self.folder).is_file))
        return steps

    def train(self, champion: Path) -> Step:
        """champion: run folder of its weights. A run that has begun keeps those that it began with."""
        if self.new.config.is_file():
            champion = Path(self.new.read_config().run.init_from)
        return Step("train", self._training(self.new, champion), lambda: self.new.has_ended_well, True)

    def carry(self, champion: int, weights: Path) -> Step:
        run = self.carried(champion)
        return Step("champion", self._training(run, weights, *NO_STEP), lambda: run.has_ended_well)

    def _training(self, run: RunFolder, weights: Path, *more: str) -> tuple[str, ...]:
        given = self.plan.settings
        places = (f"data.dir={self.folder}", f"run.dir={run.path}", f"run.init_from={weights}")
        words = (*words_of({"tracking.uri": self.plan.uri, **given.settings}), *more)
        return ("train", str(RunFolder(given.run).config), *places, *words, "--resume", "auto")

    def evaluate(self, run: RunFolder, title: str, *options: str) -> Step:
        kind = self.plan.settings.candidates
        name = evaluation_name("test", kind)
        sample = ("--events", str(self.plan.settings.events)) if kind == "full" else ()
        words = ("evaluate", str(run.path), "--candidates", kind, *sample, *options)
        return Step(title, words, lambda: run.evaluation(name).is_file() and run.ranks(name).is_file(), True)

    def register(self) -> Step:
        words = ("register", str(self.new.path), self.plan.settings.name)
        return Step("register", words, lambda: registered_as(self.new.path, self.plan.settings.name) > 0)

    # ---- doing them ----------------------------------------------------------------------------------------

    def do(self, step: Step) -> None:
        """Raises RunError naming the log, and KeyboardInterrupt when it was stopped."""
        launch = shlex.split(self.plan.settings.launch) if step.launched else []
        log = self.plan.out / "logs" / f"{self.name}-{step.title.replace(' ', '-')}.log"
        try:
            run_words(step.words, log, launch)
        except GensrError as error:
            raise RunError(f"{self.name}: {error}. All that it said: {log}") from error

    def command(self, step: Step) -> str:
        """To copy."""
        launch = self.plan.settings.launch if step.launched else ""
        return f"{launch} -m gensr {shlex.join(step.words)}" if launch else shlex.join(["gensr", *step.words])
