"""A search for settings: trials that optuna draws from a space, kept in a journal.

Random, or by TPE (Bergstra et al. 2011). The sampler's seed is a function of the trial's number, so an
interrupted search goes on as if it had not been interrupted.
"""

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_shards.settings import changes, overrides_of
from trainer.errors import ConfigError, GensrError

if TYPE_CHECKING:
    from optuna.study import Study

SEED = 0
Sampler = Literal["tpe", "random"]
Space = dict[str, Any]  # key → list of choices, or {low, high, log}
RunTrial = Callable[[int, tuple[str, ...]], float]
"""(number, KEY=VALUE settings) → the objective; raises a GensrError when the trial failed."""


@dataclass(frozen=True)
class Begun:
    """A trial of an earlier call."""

    number: int
    overrides: tuple[str, ...]
    failed: bool


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
            overrides = tuple(overrides_of({key: settings[key] for key in space}))
            waiting.append((number, start(partial(run_trial, number, overrides))))
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
        Begun(
            t.number,
            tuple(overrides_of({key: t.params[key] for key in space})),
            failed=t.state == TrialState.FAIL,
        )
        for t in _open_search(journal, space, sampler, seed).trials
        if set(t.params) == set(space)
    ]


def _open_search(journal: Path, space: Space, sampler: Sampler, seed: int) -> "Study":
    """Trials of two searches in one journal would count as one search's, or no sampler could read them."""
    study = open_study(journal)
    asked = json.loads(json.dumps({"space": space, "search": sampler, "seed": seed}))
    known = study.user_attrs.get("asked", asked)
    changed = [str(change) for change in changes(known, asked)]
    if not changed and (drawn := _drawn_from_others(study, space)):  # a journal from before "asked" was noted
        changed = [f"space was {drawn}, is {asked['space']}"]
    if changed:
        raise ConfigError(
            f"{journal} was begun with another search: {'; '.join(changed)}. Give the same one, choose "
            "another folder, or delete the file to begin again"
        )
    study.set_user_attr("asked", asked)
    return study


def _drawn_from_others(study: "Study", space: Space) -> str:
    """The distributions of the first trial that optuna could not read with those of `space`; "" for none."""
    now = _distributions(space)
    for trial in study.get_trials(deepcopy=False):
        if {**now, **trial.distributions} != now:  # one that was stopped while it was drawn lacks some
            return ", ".join(f"{key}: {each}" for key, each in trial.distributions.items())
    return ""


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
