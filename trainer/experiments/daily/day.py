"""A day of the log as steps, each a verb in a process of its own, which resumes where it was interrupted:

    check ─▶ prepare --append ─▶ cf.onto ─┬▶ train, begun with the champion ─▶ evaluate ─▶ register
                                          └▶ the champion on the new folder, no step ─▶ evaluate

What is done is read from what the verbs have left.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.settings import overrides_of
from trainer.data.cf_table import cf_path
from trainer.errors import GensrError, RunError
from trainer.evaluation.summary import evaluation_name
from trainer.experiments.daily.plan import Daily
from trainer.experiments.verbs import run_gensr
from trainer.registry.store import ALIAS, number_of, registered_as
from trainer.runs.claim import holds_run
from trainer.runs.run_folder import RunFolder

NO_STEP = ("run.max_epochs=0", "run.max_steps=0")


@dataclass(frozen=True)
class Champion:
    """A version of the registered model. weights: a run folder of which model/ is all that need be there;
    document: its model.json."""

    version: int
    weights: Path
    document: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """A verb: what follows `gensr`, and whether it has been done."""

    title: str
    arguments: tuple[str, ...]
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

    @property
    def logs(self) -> Path:
        return self.plan.out / "logs" / self.name

    def carried(self, weights: Path) -> RunFolder:
        """The champion on this day's folder, without a step. weights: where the champion's are kept."""
        return RunFolder(self.plan.out / "runs" / f"{self.name}-{weights.name}")

    # ---- steps ---------------------------------------------------------------------------------------------

    def first_steps(self) -> list[Step]:
        """What makes RUN a version: it becomes the first champion."""
        first, name = RunFolder(self.plan.settings.run), self.plan.settings.name
        register = ("register", str(first.path), name)
        return [
            self.evaluate(first, "evaluate first"),
            Step("register first", register, lambda: self._is_candidate(first)),
        ]

    def _is_candidate(self, run: RunFolder) -> bool:
        name = self.plan.settings.name
        return 0 < self.version(run) == number_of(name, ALIAS, self.plan.uri)

    def version(self, run: RunFolder) -> int:
        """That a run has become; 0 where it has not."""
        return registered_as(run.path, self.plan.settings.name, self.plan.uri)

    def data_steps(self) -> list[Step]:
        given, raw = self.plan.settings, self.plan.raw(self.name)
        arguments = ("prepare", self.plan.source, str(raw), str(self.folder), "--append", str(self.before))
        prepare = (*arguments, *overrides_of(given.prepare))
        steps = [Step("prepare", prepare, (self.folder / "manifest.json").is_file)]
        if self.plan.cf is not None:
            settings = overrides_of({**self.plan.cf, "cf.onto": str(self.before)})
            steps.append(Step("cf", ("cf", str(self.folder), *settings), cf_path(self.folder).is_file))
        return steps

    def check(self, champion: Champion) -> Step:
        """All that can be checked of the training before there is a folder, on its processes."""
        arguments = self._training(self.new, champion.weights, data=self.before)
        return Step("check", (*arguments, "--dry-run"), lambda: holds_run(self.new.path), launched=True)

    def train(self, champion: Champion) -> Step:
        """A run that has begun keeps the weights that it began with."""
        weights = champion.weights
        if holds_run(self.new.path):
            weights = Path(self.new.read_config().run.init_from)
        arguments = (*self._training(self.new, weights), "--resume", "auto")
        return Step("train", arguments, lambda: self.new.has_ended_well, launched=True)

    def carry(self, champion: Champion) -> Step:
        """With the champion's settings of model and data, whatever those of the new runs are."""
        run, own = self.carried(champion.weights), champion.document
        settings = {"model": own["settings"], "data": own["data"], "run.precision": own["precision"]}
        arguments = self._training(run, champion.weights, *overrides_of(settings), *NO_STEP)
        return Step("champion", (*arguments, "--resume", "auto"), lambda: run.has_ended_well)

    def _training(
        self, run: RunFolder, weights: Path, *more: str, data: Path | None = None
    ) -> tuple[str, ...]:
        given = self.plan.settings
        places = (f"data.dir={data or self.folder}", f"run.dir={run.path}", f"run.init_from={weights}")
        return ("train", str(RunFolder(given.run).config), *places, *self.plan.training, *more)

    def evaluate(self, run: RunFolder, title: str, *options: str) -> Step:
        kind = self.plan.settings.candidates
        name = evaluation_name("test", kind)
        sample = ("--events", str(self.plan.settings.events)) if kind == "full" else ()
        arguments = ("evaluate", str(run.path), "--candidates", kind, *sample, *options)
        return Step(title, arguments, lambda: run.is_evaluated(name), True)

    def register(self) -> Step:
        arguments = ("register", str(self.new.path), self.plan.settings.name)
        return Step("register", arguments, lambda: self.version(self.new) > 0)

    # ---- doing them ----------------------------------------------------------------------------------------

    def do(self, step: Step) -> None:
        """Raises RunError naming the log, and KeyboardInterrupt when it was stopped."""
        launch = shlex.split(self.plan.settings.launch) if step.launched else []
        log = self.logs / f"{step.title.replace(' ', '-')}.log"
        try:
            run_gensr(step.arguments, log, launch)
        except GensrError as error:
            said = str(error).removesuffix(".")
            raise RunError(f"{self.name}: {said}. All that it said: {log}") from error

    def command(self, step: Step) -> str:
        """To copy."""
        launch = self.plan.settings.launch if step.launched else ""
        given = shlex.join(step.arguments)
        return f"{launch} -m gensr {given}" if launch else f"gensr {given}"
