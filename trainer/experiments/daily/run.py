"""The days that wait, one after the other. The same call goes on at any time: after an interruption, and when
a new day is there."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from data_shards.locks import lock
from data_shards.schema import TASKS, read_manifest
from trainer.data.folder import PreparedFolder
from trainer.errors import RunError
from trainer.experiments.daily.day import Champion, Day, Step
from trainer.experiments.daily.plan import Daily, size_of
from trainer.experiments.daily.report import write_report
from trainer.experiments.pool import Pool, Steps, interruptible
from trainer.models.zoo import model_class
from trainer.registry.promote import CHAMPION, decided, in_use, promote
from trainer.registry.store import fetch, number_of
from trainer.runs.run_folder import RunFolder
from trainer.runs.weights import learnable_tasks, read_model_document
from trainer.runtime.files import writing
from trainer.runtime.progress import Notify, silent

NOT_LOST = "Its clicks count if its files go into the folder of the next day"
BY_HAND = {"decision": "promoted", "champion": "", "figures": {}}


def run(plan: Daily, notify: Notify = silent) -> dict[str, Any]:
    """Do all days that wait, also those that come meanwhile → the content of daily.json. Raises RunError
    naming the step that failed and its log; KeyboardInterrupt when it is stopped."""
    with _alone(plan.out), interruptible(), Pool() as pool:
        for name in plan.waiting()[1]:
            notify(f"warning: {name} came after a later day was done, and is left out. {NOT_LOST}")
        for row in plan.rows():
            if (raw := plan.raw(row["day"])).is_dir() and size_of(raw) != row["bytes"]:
                notify(
                    f"warning: {raw} has changed since its day was done, which is not read again. {NOT_LOST}"
                )
        while days := plan.waiting()[0]:
            started = time.monotonic()
            rows = plan.rows()
            day = Day(plan, days[0], plan.before(rows))
            row = pool.submit(partial(_do, day, notify)).result()
            write_report(plan.out, [*rows, row])
            _forget(plan)
            notify(f"{day.name}: done, {(time.monotonic() - started) / 60:.1f} minutes")
    return {"days": plan.rows()}


def _do(day: Day, notify: Notify) -> dict[str, Any]:
    """→ the day's row of daily.json."""
    plan, given = day.plan, day.plan.settings
    num_bytes = size_of(plan.raw(day.name))  # what comes while it is read counts as a change
    champion = _champion(day, notify)
    data_steps = day.data_steps()
    steps = Steps(len(data_steps) + 7, notify)

    def do(step: Step) -> None:
        title = f"{day.name} {step.title}"
        if step.is_done():
            steps.skip()
            notify(f"[{steps.number}/{steps.total}] {title}: done before")
            return
        with steps.step(title):
            day.do(step)

    for step in (day.check(champion), *data_steps):
        do(step)
    _check_events(day)
    do(day.train(champion))
    do(day.evaluate(day.new, "evaluate"))
    do(day.register())
    version = day.version(day.new)
    row = decided(given.name, version, plan.uri)
    if not row:
        champion = _champion(day, notify)  # it may have moved while the new one was trained
        if champion.version == version:
            reason = "somebody made it the champion before it was compared"
            return {"day": day.name, "bytes": num_bytes, "version": version, **BY_HAND, "reason": reason}
        carried = day.carried(champion.weights)
        do(day.carry(champion))
        do(day.evaluate(carried, "evaluate champion", "--no-baselines"))
        with steps.step(f"{day.name} promote"):
            decision = promote(
                given.name,
                plan.uri,
                given.margin,
                candidates=given.candidates,
                gain=given.gain,
                against=carried.path,
                version=version,
            )
        for line in decision.lines():
            notify(f"  {line}")
        row = decided(given.name, version, plan.uri)
    return {"day": day.name, "bytes": num_bytes, "version": version, **row}


def _check_events(day: Day) -> None:
    """Raises RunError for a day that has too few test events to decide by, or no newer ones."""
    before, now = read_manifest(day.before), read_manifest(day.folder)
    if before.raw["split"]["rule"] == "time":
        then, there = (one.raw["split"]["boundaries"]["test_from"] for one in (before, now))
        if there["ms"] <= then["ms"]:
            raise RunError(
                f"{day.name} holds no click of a later day than {day.before}, whose test split begins at "
                f"{then['utc']}: there is nothing new to test on. Move it out of {day.plan.settings.logs}"
            )
    folder, fewest = PreparedFolder.at(day.folder), day.plan.settings.min_events
    tasks = folder.columns("test", ["task"])["task"]
    for task in learnable_tasks(model_class(day.plan.config.model.name), folder):
        if (number := int((tasks == task).sum())) < fewest:
            raise RunError(
                f"{day.name}: the test split of {day.folder} has {number:,} events of task {TASKS[task]}, "
                f"too few to decide by (min_events={fewest}). Clicks after midnight are a day of their own. "
                f"Look at it with gensr inspect, mend {day.plan.raw(day.name)} and remove the folder"
            )


def _champion(day: Day, notify: Notify) -> Champion:
    """The registry's champion, with a copy of its weights in OUT/champions, so that what a run began with
    stays whatever becomes of the registry. Where there is none RUN becomes it."""
    plan, given = day.plan, day.plan.settings
    number = number_of(given.name, CHAMPION, plan.uri)
    if not number:
        first = RunFolder(given.run)
        for step in day.first_steps():
            if not step.is_done():
                notify(
                    f"{given.run}, the first champion of {given.name}: {step.title.removesuffix(' first')}"
                )
                day.do(step)
        decision = promote(given.name, plan.uri, candidates=given.candidates, version=day.version(first))
        number = decision.candidate
    weights = RunFolder(plan.champion(number))
    if not weights.model.is_dir():
        with writing(weights.model):
            weights.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=weights.path.parent) as folder:
                whole = RunFolder(Path(folder) / "whole")
                whole.path.mkdir()
                model = f"models:/{given.name}/{number}/artifacts/model"
                os.replace(fetch(model, plan.uri, into=Path(folder)), whole.model)
                os.replace(whole.path, weights.path)
    champion = Champion(number, weights.path, read_model_document(weights.model))
    _check_kin(day, champion)
    return champion


def _check_kin(day: Day, champion: Champion) -> None:
    """Raises RunError for a champion whose weights mean something else on the folders of days to come."""
    given, model, document = day.plan.settings, day.plan.config.model.name, champion.document
    which = f"the champion of {given.name}, version {champion.version},"
    if document["name"] != model:
        raise RunError(
            f"{which} is a {document['name']}, and {given.run} a {model}. Name a run of the champion's "
            "settings (run: …)"
        )
    manifest = read_manifest(day.before)
    known = {manifest.hash, *(one["manifest"] for one in manifest.appended)}
    if (day.folder / "manifest.json").is_file():  # of a day that was stopped when its run was the champion
        known.add(read_manifest(day.folder).hash)
    if document["manifest_hash"] not in known:
        raise RunError(
            f"{which} was trained on a folder that {day.before} does not go on from: rows mean other items "
            "there. Name another model (name: …)"
        )


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Raises RunError while another gensr daily is at work there."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "daily.lock").open("a", encoding="utf-8")
    with file:
        if not lock(file):
            raise RunError(f"{out}: another gensr daily is at work there, and does what waits")
        yield


def _forget(plan: Daily) -> None:
    """Deletes what is large of the days before the newest `keep`, unless their version is in use: users are
    looked up in its prepared folder. Weights go only where the registry holds them, too; evaluations and
    records stay."""
    given = plan.settings
    used = in_use(given.name, plan.uri)
    for row in plan.rows()[: -given.keep] if given.keep else []:
        if row["version"] in used:
            continue
        day = Day(plan, row["day"], before=Path())
        runs = (day.new, day.carried(plan.champion(row["champion"])))
        gone = [given.folder(day.name), day.logs, *(run.checkpoints for run in runs)]
        if any(run.model.is_dir() for run in runs) and day.version(day.new):
            gone += [plan.champion(row["version"]), *(run.model for run in runs)]
            gone += [run.retrieval for run in runs]
        for folder in gone:
            shutil.rmtree(folder, ignore_errors=True)
