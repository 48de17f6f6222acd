"""Tuning: the same number of trials for every trained system, from a declared space (spaces.yaml).

Trial 0 has the published settings. Later ones are those of optuna's TPE (Bergstra et al. 2011), whose seed is
a function of the trial's number, so an interrupted search goes on as if it had not been. The objective is the
best value of run.select_metric on validation; the test split is never looked at.
"""

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_shards.settings import flatten, parse_yaml, to_dict
from trainer.config import Config
from trainer.errors import ConfigError, GensrError, RunError
from trainer.runs.run_folder import read_json
from trainer.runtime.files import atomic

if TYPE_CHECKING:
    from optuna.study import Study

SEED = 0
Sampler = Literal["tpe", "random"]
Space = dict[str, Any]  # key → list of choices, or {low, high, log}
RunTrial = Callable[[int, tuple[str, ...]], float]
"""(number, settings as words) → the objective; raises a GensrError when the trial failed."""


@dataclass(frozen=True)
class Begun:
    """A trial of an earlier call."""

    number: int
    words: tuple[str, ...]
    failed: bool


def space_of(config: Config) -> Space:
    """The declared space of the configuration's model: the default's keys that the model has, then its own.
    The configuration's own values belong to it."""
    text = resources.files(__package__).joinpath("spaces.yaml").read_text(encoding="utf-8")
    declared = parse_yaml(text)
    values = flatten(to_dict(config))
    merged = {**declared["default"], **declared["models"].get(config.model.name, {})}
    return {key: _with_value(domain, values[key]) for key, domain in merged.items() if key in values}


def _with_value(domain: Any, value: Any) -> Any:
    if isinstance(domain, list):
        return domain if value in domain else sorted([*domain, value])
    return {**domain, "low": min(domain["low"], value), "high": max(domain["high"], value)}


def words_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={json.dumps(value)}" for key, value in settings.items())


def tune(path: Path, config: Config, num_trials: int, run_trial: RunTrial) -> dict[str, Any]:
    """The best trial's settings, also written to `path` (MODEL.json), beside the journal from which an
    interrupted search goes on. Raises RunError when every trial failed."""
    if found := read_json(path):
        return dict(found["settings"])
    space = space_of(config)
    published = {key: flatten(to_dict(config))[key] for key in space}
    journal = path.with_suffix(".journal")
    errors = search(journal, space, num_trials, run_trial, first=published)
    study = open_study(journal)
    values = {trial.number: trial.value for trial in study.trials}
    good = {number: value for number, value in values.items() if value is not None}
    if not good:  # most likely a mistake that the user mends: the same command tries all of them again
        journal.unlink()
        raise RunError(
            f"all {num_trials} trials failed; the last: {errors[-1] if errors else 'see the logs'}"
        )
    best = study.trials[max(good, key=lambda number: good[number])]
    document = {
        "trials": num_trials,
        "failed": len(values) - len(good),
        "best_trial": best.number,
        "metric": config.run.select_metric,
        "value": best.value,
        "settings": best.params,
        "space": space,
        "values": values,
    }
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return dict(best.params)


def search(
    journal: Path,
    space: Space,
    num_trials: int,
    run_trial: RunTrial,
    first: Mapping[str, Any] | None = None,
    sampler: Sampler = "tpe",
    seed: int = SEED,
    jobs: int = 1,
    start: Callable[[Callable[[], float]], Callable[[], float]] = lambda trial: trial,
) -> list[str]:
    """Runs what is missing of the trials → errors of those that failed. first: settings of trial 0.

    jobs: trials at once; `start` begins one and returns what waits for its value. Trial n is drawn when all
    up to n - jobs have ended, and knows these alone, whatever else has ended: so it is always the same.
    Raises ConfigError when the journal is one of another space, sampler or seed.
    """
    from optuna.samplers import RandomSampler, TPESampler
    from optuna.trial import TrialState

    study = _open_search(journal, space, sampler, seed)
    if not study.trials and first is not None:
        study.enqueue_trial(dict(first))
    unfinished = [t.number for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]
    errors: list[str] = []
    begun = (TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING)
    waiting: deque[tuple[int, Callable[[], float]]] = deque()
    while True:
        while len(waiting) < jobs:
            if unfinished:
                number = unfinished.pop(0)
            else:
                number = len(study.get_trials(deepcopy=False, states=begun))
                if number >= num_trials:
                    break
                make = TPESampler if sampler == "tpe" else RandomSampler
                study.sampler = make(seed=seed + number)
                number = study.ask(_distributions(space)).number
            settings = study.trials[number].params
            if set(settings) != set(space):  # interrupted while it was drawn
                study.tell(number, state=TrialState.FAIL)
                continue
            words = words_of({key: settings[key] for key in space})
            waiting.append((number, start(partial(run_trial, number, words))))
        if not waiting:
            return errors
        number, value = waiting.popleft()
        try:
            study.tell(number, value())
        except GensrError as error:
            errors.append(str(error))
            study.tell(number, state=TrialState.FAIL)


def begun(journal: Path, space: Space, sampler: Sampler, seed: int) -> list[Begun]:
    """What search() has drawn so far. Raises ConfigError as it does."""
    from optuna.trial import TrialState

    if not journal.is_file():
        return []
    return [
        Begun(t.number, words_of({key: t.params[key] for key in space}), t.state == TrialState.FAIL)
        for t in _open_search(journal, space, sampler, seed).trials
        if set(t.params) == set(space)
    ]


def _open_search(journal: Path, space: Space, sampler: Sampler, seed: int) -> "Study":
    """Trials of two searches in one journal would count as one search's, or no sampler could read them."""
    study = open_study(journal)
    asked = json.loads(json.dumps({"space": space, "search": sampler, "seed": seed}))
    known = study.user_attrs.get("asked", asked)
    if changed := [f"{key} was {known[key]}, is {asked[key]}" for key in asked if known[key] != asked[key]]:
        raise ConfigError(
            f"{journal} was begun with another search: {'; '.join(changed)}. Give the same one, choose "
            "another folder, or delete the file to begin again"
        )
    study.set_user_attr("asked", asked)
    return study


def open_study(journal: Path) -> "Study":
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    return optuna.create_study(
        storage=storage, study_name=journal.stem, direction="maximize", load_if_exists=True
    )


def _distributions(space: Space) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def of(domain: Any) -> Any:
        if isinstance(domain, list):
            return CategoricalDistribution(domain)
        low, high = domain["low"], domain["high"]
        kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
        return kind(low, high, log=bool(domain.get("log")))

    return {key: of(domain) for key, domain in space.items()}
