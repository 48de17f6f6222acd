"""What was asked for, checked as a whole, and each system's settings: TABLE/settings/MODEL.yaml.

A second call with other settings would mix two experiments in one table, so it is refused. More models, more
seeds or another kind of candidates only add cells. OUT and FOLDER may move: the manifest's hash says which
data it is. With a budget, a later call keeps the epochs of the first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_shards.schema import Manifest
from data_shards.settings import changes, flat_as_json, read_yaml, to_dict, to_yaml
from trainer.config import Config
from trainer.configs import config_from_dict, load_config, preset_of
from trainer.data.eval_stream import check_hard
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError
from trainer.evaluation.summary import CANDIDATES
from trainer.experiments.costs import Machine, Size, cost_of, this_machine
from trainer.experiments.pool import environments
from trainer.experiments.table.budget import Runs, Times, plan_times, within
from trainer.models.zoo import GENSR, model_class, model_names
from trainer.runs.run_folder import read_json
from trainer.runtime.files import SECRET_MODE, write_json, write_text
from trainer.tracking.store import sqlite_path, sqlite_uri

OWNED = ("data.dir", "run.dir", "run.seed", "model.name")  # settings that the table decides
RUN_LENGTHS = ("run.max_epochs", "run.max_steps")  # and with a budget these


@dataclass(frozen=True)
class Request:
    """The arguments of the command. models empty = all; epochs and max_steps 0 = as each preset says; budget
    in minutes, 0 = none."""

    folder: str
    out: Path
    models: tuple[str, ...] = ()
    seeds: int = 3
    trials: int = 0
    epochs: float = 0.0
    max_steps: int = 0
    budget: float = 0.0
    candidates: tuple[str, ...] = ("sampled", "full")
    events: int = 2000  # of the whole-catalogue ranking, 0 = all
    presets: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()  # for every system
    own_overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of one system; overrides win
    jobs: int = 1  # runs at once on this machine

    @property
    def names(self) -> tuple[str, ...]:
        return self.models or tuple(model_names())

    def seeds_of(self, model: str) -> range:
        """Counting has no random numbers: every seed would give the same model."""
        return range(self.seeds if model_class(model).trained else 1)

    def trials_of(self, model: str) -> int:
        return self.trials if model_class(model).trained else 0

    def runs_of(self, model: str) -> Path:
        return self.out / "runs" / model

    def tuning_file(self, model: str) -> Path:
        """What came of its trials."""
        return self.out / "tuning" / f"{model}.json"

    @property
    def plan_file(self) -> Path:
        return self.out / "plan.json"

    def settings_file(self, model: str) -> Path:
        return self.out / "settings" / f"{model}.yaml"


def overrides_of_systems(
    models: Sequence[str], presets: Sequence[str], recipe: str
) -> tuple[dict[str, str], dict[str, Sequence[str]]]:
    """(presets, overrides) of single systems, by their names: from words MODEL=PRESET, and for the systems
    that these leave out from a recipe of `gensr paper`; "" for none. Raises ConfigError for another word, or
    an unknown recipe."""
    if wrong := [word for word in presets if "=" not in word]:
        raise ConfigError(f"--preset is written MODEL=PRESET, got {', '.join(wrong)}")
    chosen = dict(word.partition("=")[::2] for word in presets)
    if not recipe:
        return chosen, {}
    from trainer.experiments.paper.recipes import recipe_of  # its package imports this one

    known = recipe_of(recipe)
    if not models or GENSR in models:
        chosen = {GENSR: known["preset"], **chosen}
    return chosen, {name: words for name, words in known["own_settings"].items() if name not in chosen}


@dataclass(frozen=True)
class Plan:
    """A request that can be carried out."""

    request: Request
    folder: PreparedFolder
    configs: Mapping[str, Config]  # model → its settings, without run.dir
    times: Times | None  # with a budget


def make_plan(request: Request, machine: Machine | None = None) -> Plan:
    """Writes TABLE/plan.json and TABLE/settings/. machine: that a budget speaks of; None: this one. Raises
    ConfigError for what cannot be, or differs from what TABLE was begun with; DataError when FOLDER is not a
    prepared folder, or lacks the hard candidates."""
    plan = _read(request, machine)
    for name, config in plan.configs.items():
        # a tracking URI may hold a password
        write_text(request.settings_file(name), to_yaml(config), SECRET_MODE)
    begun = _begun(plan.folder.manifest, request)
    if plan.times is not None:
        facts, known = plan.times.facts(), read_json(request.plan_file)
        first = known.get("budget", {})
        facts["systems"] = {**first.get("systems", {}), **facts["systems"]}
        if first:
            facts |= {"machine": first["machine"], "jobs": first.get("jobs", 1)}
        begun["budget"] = facts
    write_json(request.plan_file, begun)
    return plan


def dry_run(request: Request, machine: Machine | None = None) -> Times:
    """What make_plan() would plan; nothing is written. Raises as it does."""
    plan = _read(request, machine)
    return plan.times or _times(request, plan.folder.manifest, plan.configs, machine, {})


def _read(request: Request, machine: Machine | None) -> Plan:
    """The plan, checked against what TABLE was begun with."""
    _check(request)
    of_data = [word for word in request.overrides if word.startswith("data.")]
    folder = PreparedFolder.open(load_config(None, [f"data.dir={request.folder}", *of_data]).data)
    if "hard" in request.candidates:
        check_hard(folder)
    configs = {name: _config(request, name, folder.manifest) for name in request.names}
    known, begun = read_json(request.plan_file), _begun(folder.manifest, request)
    changed = [
        f"{key} was {known[key]}, is {begun[key]}" for key in begun if known and known[key] != begun[key]
    ]
    budget = known.get("budget", {})
    if known and bool(budget) != bool(request.budget):
        changed.append(
            f"--budget was {budget.get('minutes', 'not given')}, is {request.budget or 'not given'}"
        )
    times = None
    if request.budget and not changed:
        times = _times(request, folder.manifest, configs, machine, budget)
        configs = {name: within(config, times.of(name)) for name, config in configs.items()}
    if not changed:
        for name, config in configs.items():
            changed += _differences(request, name, config)
    if changed:
        raise ConfigError(
            f"{request.out} was begun with other settings: {'; '.join(changed)}. Give the same ones, or "
            "choose another TABLE"
        )
    return Plan(request, folder, configs, times)


def _begun(manifest: Manifest, request: Request) -> dict[str, Any]:
    return {"manifest_hash": manifest.hash, "trials": request.trials, "events": request.events}


def _times(
    request: Request,
    manifest: Manifest,
    configs: Mapping[str, Config],
    machine: Machine | None,
    known: Mapping[str, Any],
) -> Times:
    """known: what plan.json holds of the first call, whose T and epochs stay, and with as many jobs its
    machine. With other jobs the hours are those of this call, and what fitted at first is not refused."""
    size = Size.of_manifest(manifest)

    def times(jobs: int, machine: Machine, minutes: float) -> Times:
        runs = {
            name: Runs(
                seeds=len(request.seeds_of(name)),
                trials=request.trials_of(name),
                candidates=request.candidates,
                cost=cost_of(config, size, machine, request.events),
            )
            for name, config in configs.items()
        }
        return plan_times(runs, machine, minutes, known, jobs)

    here = machine or this_machine(max(config.run.threads for config in configs.values()), request.jobs)
    if not known:
        return times(request.jobs, here, request.budget)
    first, first_jobs = Machine(**known["machine"]), known.get("jobs", 1)  # a version without jobs had one
    if first_jobs == request.jobs:
        return times(first_jobs, first, request.budget)
    now = replace(times(request.jobs, here, math.inf), minutes=request.budget)
    if now.seconds > 60 * request.budget:
        times(first_jobs, first, request.budget)  # raises where it was too little at first, too
    return now


def _check(request: Request) -> None:
    problems = []
    if unknown := [kind for kind in request.candidates if kind not in CANDIDATES]:
        problems.append(f"unknown candidates {', '.join(unknown)}; choose from {', '.join(CANDIDATES)}")
    if not request.candidates:
        problems.append(f"--candidates: name some of {', '.join(CANDIDATES)}")
    if sum(map(bool, (request.epochs, request.max_steps, request.budget))) > 1:
        problems.append("--epochs, --max-steps and --budget: give one of them")
    lengths = [word for word in request.overrides if word.partition("=")[0] in RUN_LENGTHS]
    if request.budget and lengths:
        problems.append(f"--budget sets the epochs itself: leave out {', '.join(lengths)}")
    if len(set(request.names)) < len(request.names):
        problems.append("--models lists a model twice")
    if strangers := [name for name in request.presets if name not in request.names]:
        problems.append(f"--preset: {', '.join(strangers)} is not among the models")
    of_stages = {word.partition("=")[0] for name in request.names for word in _stage_overrides(name)}
    owned = [word for word in request.overrides if word.partition("=")[0] in {*OWNED, *of_stages}]
    problems += [f"{word}: the table sets {word.partition('=')[0]} itself" for word in owned]
    if problems:
        raise ConfigError("; ".join(problems))
    environments(request.jobs)  # raises ConfigError where the machine is too small


def _stage_overrides(model: str) -> list[str]:
    """Raises ConfigError that lists the names."""
    return [word for stage in model_class(model).stages() for word in stage]


def _config(request: Request, name: str, manifest: Manifest) -> Config:
    """A preset's history_max is that of the paper's data: a folder with shorter histories is read whole."""
    preset, chosen = preset_of(name, request.presets.get(name))
    config = load_config(preset, chosen)
    if config.model.name != name:
        raise ConfigError(f"--preset {name}={preset}: that preset is one of {config.model.name}")
    overrides = [*chosen, f"data.dir={request.folder}"]
    if not config.tracking.uri:
        overrides.append(f"tracking.uri={_own_store(request)}")
    if request.epochs:
        overrides += [f"run.max_epochs={request.epochs}", "run.max_steps=0"]
    if request.max_steps:
        overrides.append(f"run.max_steps={request.max_steps}")
    overrides.append(f"data.history_max={min(config.data.history_max, manifest.history_max)}")
    return load_config(preset, [*overrides, *request.own_overrides.get(name, ()), *request.overrides])


def _own_store(request: Request) -> str:
    return sqlite_uri((request.out / "mlflow.db").resolve())


def _differences(request: Request, name: str, config: Config) -> Sequence[str]:
    path = request.settings_file(name)
    if not path.is_file():
        return []
    # Older files lack newer settings; treat a missing key as its default.
    trees = (to_dict(one) for one in (config_from_dict(read_yaml(path)), config))
    before, now = map(flat_as_json, trees)
    apart = {"data.dir"}  # its manifest is compared
    store = sqlite_path(str(before["tracking.uri"]))
    if now["tracking.uri"] == _own_store(request) and store is not None and store.name == "mlflow.db":
        apart.add("tracking.uri")  # beside OUT, wherever that was
    # a tracking URI may hold a password
    return [
        f"{name}'s {change}" if change.key != "tracking.uri" else f"{name}'s {change.key}"
        for change in changes(before, now, ignore=apart)
    ]
