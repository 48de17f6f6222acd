"""Tuning: the same number of trials for every trained system, from a declared space (spaces.yaml).

Trial 0 has the published settings, later ones are drawn by TPE (experiments/search.py). The objective is the
best value of run.select_metric on validation; the test split is never looked at.
"""

from importlib import resources
from pathlib import Path
from typing import Any

from data_shards.settings import flatten, parse_yaml, to_dict
from trainer.config import Config
from trainer.errors import RunError
from trainer.experiments.search import RunTrial, Space, open_study, search
from trainer.runs.run_folder import read_json
from trainer.runtime.files import write_json


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
    write_json(path, document)
    return dict(best.params)
