"""The days that wait, one after the other. The same call goes on at any time: after an interruption, and when
a new day is there."""

import fcntl
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from data_shards.schema import read_manifest
from trainer.errors import RunError
from trainer.experiments.daily.day import Day, Step
from trainer.experiments.daily.plan import Daily
from trainer.experiments.daily.report import write_report
from trainer.experiments.pool import Pool, Steps, interruptible
from trainer.registry.promote import CHAMPION, decided, promote
from trainer.registry.versions import fetch, number_of, registered_as
from trainer.runs.run_folder import RunFolder
from trainer.runs.weights import read_model_document
from trainer.runtime.files import writing
from trainer.runtime.progress import Notify


def run(plan: Daily, notify: Notify = lambda line: None) -> dict[str, Any]:
    """Do all days that wait, also those that come meanwhile → the content of daily.json. Raises RunError
    naming the step that failed and its log; KeyboardInterrupt when it is stopped."""
    with _alone(plan.out), interruptible(), Pool() as pool:
        for name in plan.waiting()[1]:
            notify(
                f"warning: {name} came after a later day was done, and is left out. Its clicks count if its "
                "files go into the folder of the next day"
            )
        while days := plan.waiting()[0]:
            rows = plan.rows()
            day = Day(plan, days[0], plan.before(rows))
            row = pool.submit(partial(_do, day, notify)).result()
            write_report(plan.out, [*rows, row])
            _forget(plan)
            notify(f"{day.name}: done in {row['seconds'] / 60:.1f} minutes")
    return {"days": plan.rows()}


def _do(day: Day, notify: Notify) -> dict[str, Any]:
    """→ the day's row of daily.json."""
    plan, given = day.plan, day.plan.settings
    started = time.monotonic()
    data_steps = day.data_steps()
    steps = Steps(len(data_steps) + 6, notify)

    def do(step: Step) -> None:
        title = f"{day.name} {step.title}"
        if step.is_done():
            steps.skip()
            notify(f"[{steps.number}/{steps.total}] {title}: done before")
            return
        with steps.step(title):
            day.do(step)

    for step in data_steps:
        do(step)
    do(day.train(_champion(day, notify)[1]))
    do(day.evaluate(day.new, "evaluate"))
    do(day.register())
    version = registered_as(day.new.path, given.name)
    if not decided(given.name, version, plan.uri):
        number, weights = _champion(day, notify)  # it may have moved while the new one was trained
        do(day.carry(number, weights))
        do(day.evaluate(day.carried(number), "evaluate champion", "--no-baselines"))
        with steps.step(f"{day.name} promote"):
            decision = promote(
                given.name,
                plan.uri,
                given.margin,
                candidates=given.candidates,
                gain=given.gain,
                against=day.carried(number).path,
            )
        for line in decision.lines():
            notify(f"  {line}")
    row = decided(given.name, version, plan.uri)
    if not row:
        raise RunError(
            f"version {version} of {given.name}, that of {day.name}, is its candidate no more: another one "
            f"was registered meanwhile. Register it again: gensr register {shlex.quote(str(day.new.path))} "
            f"{given.name}"
        )
    return {"day": day.name, "version": version, **row, "seconds": round(time.monotonic() - started)}


def _champion(day: Day, notify: Notify) -> tuple[int, Path]:
    """(version, run folder of its weights): OUT/champions/VERSION, a copy, so that what a run was begun with
    stays whatever becomes of the registry. Where there is no champion the first run becomes it."""
    plan, given = day.plan, day.plan.settings
    number = number_of(given.name, CHAMPION, plan.uri)
    if not number:
        evaluate = day.evaluate(RunFolder(given.run), "evaluate first")
        if not evaluate.is_done():
            notify(f"{given.run}: evaluating what becomes the first champion of {given.name}")
            day.do(evaluate)
        notify(f"{given.run}: becomes the first champion of {given.name}")
        day.do(Step("register first", ("register", given.run, given.name), lambda: False))
        number = promote(given.name, plan.uri, candidates=given.candidates).candidate
    weights = RunFolder(plan.out / "champions" / str(number))
    if not weights.model.is_dir():
        copy = RunFolder(weights.path.with_name(f"{number}.partial"))
        shutil.rmtree(copy.path, ignore_errors=True)
        with writing(weights.model):
            model = fetch(f"models:/{given.name}/{number}", plan.uri) / "artifacts" / "model"
            shutil.copytree(model, copy.model)
            os.replace(copy.path, weights.path)
    _check_kin(day, number, read_model_document(weights.model))
    return number, weights.path


def _check_kin(day: Day, number: int, document: Mapping[str, Any]) -> None:
    """Raises RunError for a champion whose weights mean something else on this day's folder."""
    given, model = day.plan.settings, day.plan.config.model.name
    if document["name"] != model:
        raise RunError(
            f"the champion of {given.name}, version {number}, is a {document['name']}, and {given.run} a "
            f"{model}. Name a run of the champion's settings (run: …)"
        )
    manifest = read_manifest(day.folder)
    if document["manifest_hash"] not in {manifest.hash, *(one["manifest"] for one in manifest.appended)}:
        raise RunError(
            f"the champion of {given.name}, version {number}, was trained on a folder that {day.folder} does "
            "not go on from: rows mean other items there. Name another model (name: …)"
        )


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Raises RunError while another gensr daily is at work there; never on a file system without locks."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "daily.lock").open("a", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{out}: another gensr daily is at work there, and does what waits") from None
        except OSError:
            pass
        yield


def _forget(plan: Daily) -> None:
    """Deletes prepared folders of days before the newest `keep`; users are looked up in the champion's."""
    given = plan.settings
    champion = number_of(given.name, CHAMPION, plan.uri)
    for row in plan.rows()[: -given.keep] if given.keep else []:
        if row["version"] != champion:
            shutil.rmtree(given.folder(row["day"]), ignore_errors=True)
