"""What `gensr paper` will run: the recipe, the budget, the table's request, and a cell for every variant of
GenSR. A second call with another plan for the same folder is refused."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from data_shards.settings import flatten, overrides_of, to_dict
from trainer.config import Config
from trainer.configs import documented_sizes, load_config, preset_of
from trainer.errors import ConfigError
from trainer.experiments.cells import Cell
from trainer.experiments.costs import MIN_EPOCHS, Machine, Size, SystemCost, cost_of, this_machine, wall_s
from trainer.experiments.paper.budget import LEVELS, WHOLE, Budget
from trainer.experiments.paper.finished import FinishedTable, lines_within
from trainer.experiments.paper.recipes import read_recipes, recipe_of
from trainer.experiments.pool import environments
from trainer.experiments.table.budget import epochs_within
from trainer.experiments.table.plan import Request
from trainer.models.zoo import GENSR, model_class, model_names
from trainer.runs.run_folder import read_json
from trainer.runtime.files import write_json

VARIANT_CANDIDATES = ("sampled",)
MOST_EPOCHS = 10.0  # of an estimate: where a preset has hundreds, it stops early


@dataclass(frozen=True)
class PaperRequest:
    """The arguments of the command. budget: minutes, "paper", or "" for what the recipe says. data: a
    prepared folder that is there. overrides: of every system."""

    name: str
    out: Path
    raw: Path | None = None
    data: Path | None = None
    budget: str = ""
    overrides: tuple[str, ...] = ()
    finished: FinishedTable | None = None  # of --table
    jobs: int = 1

    @property
    def recipe(self) -> dict[str, Any]:
        return recipe_of(self.name)

    @property
    def raw_dir(self) -> Path:
        return self.raw or self.out / "raw"

    @property
    def data_dir(self) -> Path:
        return self.data or (self.finished.data_dir if self.finished else self.out / "data")

    @property
    def preset(self) -> str:
        """GenSR's: a preset's name, or the settings of a table that is there."""
        return str(self.finished.settings if self.finished else self.recipe["preset"])

    @property
    def analyses(self) -> Path:
        return self.out / "analyses"


@dataclass(frozen=True)
class Variant:
    """GenSR with other settings."""

    analysis: str  # ablations, ours, transfer, sensitivity
    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class PaperPlan:
    request: PaperRequest
    budget: Budget
    variants: tuple[Variant, ...]
    epochs: Mapping[str, float] = field(default_factory=dict)  # of systems, where the budget cuts them

    @property
    def systems(self) -> tuple[str, ...]:
        if self.request.finished:
            return self.request.finished.request.models
        lines = read_recipes()["systems"][: self.budget.lines]
        return tuple(name for line in lines for name in line if name in model_names())

    @property
    def table(self) -> Request:
        if self.request.finished:
            return self.request.finished.request
        budget, own = self.budget, self.request.recipe["own_settings"]
        return Request(
            folder=str(self.request.data_dir),
            out=self.request.out / "table",
            models=self.systems,
            seeds=budget.seeds,
            trials=budget.trials,
            epochs=0.0 if self.epochs else budget.epochs,
            candidates=budget.candidates,
            events=budget.events,
            presets={GENSR: self.request.recipe["preset"]},
            overrides=self.request.overrides,
            own_overrides={name: (*own.get(name, ()), *self._length(name)) for name in {*own, *self.epochs}},
            jobs=self.request.jobs,
        )

    def _length(self, model: str) -> tuple[str, ...]:
        if model not in self.epochs:
            return ()
        return f"run.max_epochs={self.epochs[model]:g}", "run.max_steps=0"

    @property
    def trust(self) -> list[str]:
        """What the budget, and that of a table that is there, cost in trust."""
        return [*self.budget.trust, *(self.request.finished.trust() if self.request.finished else ())]

    def gensr_runs(self, num_seeds: int) -> list[Path]:
        """The table's own runs of GenSR, which every variant is compared with."""
        return [self.table.runs_of(GENSR) / f"seed-{seed}" for seed in range(num_seeds)]

    def cells(self, *analyses: str) -> list[Cell]:
        """Of the variants of these analyses, seed by seed, so that an interrupted plan has whole seeds."""
        tuned = read_json(self.table.tuning_file(GENSR)).get("settings", {})
        chosen = [variant for variant in self.variants if not analyses or variant.analysis in analyses]
        return [
            Cell(
                model=GENSR,
                name=f"{variant.name}-seed-{seed}",
                run_dir=self.request.out / "variants" / variant.name / f"seed-{seed}",
                settings_file=self.table.settings_file(GENSR),
                overrides=(
                    f"tracking.run_name={variant.name}-seed-{seed}",
                    f"run.seed={seed}",
                    *overrides_of(tuned),
                    *variant.overrides,
                ),
                log=self.request.out / "logs" / f"{variant.name}-seed-{seed}.log",
            )
            for seed in range(self.budget.variant_seeds)
            for variant in chosen
        ]


def make_plan(request: PaperRequest, size: Size | None = None) -> PaperPlan:
    """size: of the prepared folder; None: what the preset documents. Raises ConfigError for a budget that is
    neither minutes nor "paper", and for an unknown name."""
    recipe = request.recipe
    asked = request.budget or str(recipe.get("minutes", "paper"))
    if request.finished and request.overrides:
        raise ConfigError(
            f"--table: the systems of {request.finished.out} are trained, with settings of their own; leave "
            f"out {', '.join(request.overrides)}"
        )
    if asked == "paper":
        return _plan(request, WHOLE)
    try:
        minutes = float(asked)
    except ValueError:
        minutes = -1.0
    if not minutes > 0:
        raise ConfigError(f"--budget must be minutes or paper, got {asked}")
    size = size or documented_size(recipe["preset"])
    return _with_epochs(_fitting(request, size, 60 * minutes), size)


def _fitting(request: PaperRequest, size: Size, seconds: float) -> PaperPlan:
    plan = None
    for level in LEVELS:
        plan = _plan(request, level)
        if seconds_of(plan, size) <= seconds:
            return plan
    assert plan is not None
    return _shrunk(plan, size, seconds)


def _with_epochs(plan: PaperPlan, size: Size) -> PaperPlan:
    """The epochs as words of each system: a later call must not calculate them again."""
    if not plan.budget.epochs or plan.request.finished:
        return plan
    machine = machine_of(plan)
    epochs = {name: epochs_of(plan, name, size, machine) for name in plan.systems}
    return replace(plan, epochs={name: number for name, number in epochs.items() if number})


def _shrunk(plan: PaperPlan, size: Size, seconds: float) -> PaperPlan:
    """The poorest level with fewer epochs; then without the grid, then without variants."""
    while seconds_of(plan, size) > seconds:
        budget = plan.budget
        if budget.epochs > MIN_EPOCHS:
            budget = replace(budget, epochs=max(MIN_EPOCHS, budget.epochs / 2))
        elif budget.grid != "none":
            budget = replace(budget, grid="none")
        elif budget.groups:
            budget = replace(budget, groups=budget.groups[:-1])
        else:
            break
        plan = _plan(plan.request, budget)
    return plan


def _plan(request: PaperRequest, budget: Budget) -> PaperPlan:
    recipes = read_recipes()
    if request.finished:
        budget = _of_table(budget, request.finished)
    own = _own_settings(request)
    variants = [
        Variant(group, name, _other(words, own))
        for group in budget.groups
        for name, words in recipes["variants"][group].items()
    ]
    if budget.grid != "none":
        variants += _grid_variants(recipes["grid"], own, budget.grid == "full")
    # a run that two analyses share is made once
    kept = {variant.overrides: variant for variant in reversed(variants)}
    chosen = (v for v in variants if _changes(v, own) and kept[v.overrides] is v)
    return PaperPlan(request, budget, tuple(chosen))


def _grid_variants(grid: Mapping[str, list[Any]], own: Mapping[str, Any], is_full: bool) -> Iterator[Variant]:
    """Of all points of the grid, or of those alone that change one setting."""
    for point in itertools.product(*grid.values()):
        changed = {k: v for k, v in zip(grid, point, strict=True) if float(own[k]) != float(v)}
        if changed and (is_full or len(changed) == 1):
            name = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in changed.items())
            yield Variant("sensitivity", name, tuple(f"{key}={value}" for key, value in changed.items()))


def _of_table(budget: Budget, finished: FinishedTable) -> Budget:
    """What a table has decided; every seed of a variant is compared with the table's GenSR of that seed."""
    table = finished.request
    return replace(
        budget,
        seeds=table.seeds,
        variant_seeds=min(budget.variant_seeds, table.seeds),
        lines=lines_within(read_recipes()["systems"], table.models),
        epochs=0.0,
        trials=table.trials,
        candidates=table.candidates,
    )


def _changes(variant: Variant, own: Mapping[str, Any]) -> bool:
    """Whether a variant is another model than the preset's own."""
    pairs = [word.split("=", 1) for word in variant.overrides]
    return any(str(own.get(key)).lower() != value.lower() for key, value in pairs)


@cache
def _own_settings(request: PaperRequest) -> dict[str, Any]:
    """GenSR's."""
    return flatten(to_dict(load_config(request.preset, request.overrides)))


def _other(words: Sequence[str], own: Mapping[str, Any]) -> tuple[str, ...]:
    """model.prompt=paper where the preset has the compact prompt, else the other way round."""
    if list(words) == [f"model.prompt={own.get('model.prompt')}"]:
        return (f"model.prompt={'compact' if own['model.prompt'] == 'paper' else 'paper'}",)
    if list(words) == [f"model.variant={own.get('model.variant')}"]:
        return ("model.variant=extended",)
    return tuple(words)


def keep(plan: PaperPlan) -> PaperPlan:
    """Writes DIR/paper.json at the first call; later ones go on with what stands there, so that an
    interrupted evaluation stays one. Raises ConfigError when the arguments differ."""
    path = plan.request.out / "paper.json"
    asked = {
        "name": plan.request.name,
        "budget": plan.request.budget,
        "settings": list(plan.request.overrides),
    }
    if plan.request.finished:
        asked["table"] = str(plan.request.finished.out)
    begun = read_json(path)
    if begun:
        if begun["asked"] != asked:
            raise ConfigError(
                f"{plan.request.out} was begun with {begun['asked']}, not {asked}. Give the same arguments, "
                "or choose another --out"
            )
        stored = dict(begun["budget"])
        budget = Budget(
            **{**stored, "groups": tuple(stored["groups"]), "candidates": tuple(stored["candidates"])}
        )
        return replace(_plan(plan.request, budget), epochs=begun.get("epochs", {}))
    write_json(path, {"asked": asked, "budget": asdict(plan.budget), "epochs": plan.epochs})
    return plan


# ---- estimates ---------------------------------------------------------------------------------------------


def documented_size(preset: str) -> Size:
    """From the preset's `# sizes:` line."""
    counts = documented_sizes(preset)
    if not counts:
        raise ConfigError(f"the preset {preset} documents no sizes")
    return Size.of_halves(counts["train_events"], counts["valid_events"], counts["items"])


def parts_of(plan: PaperPlan, size: Size, machine: Machine | None = None) -> list[tuple[str, int, float]]:
    """(what, number of runs, seconds of all of them one after the other)."""
    machine, budget = machine or machine_of(plan), plan.budget
    rows = []
    for name in () if plan.request.finished else plan.systems:
        cost = _cost(plan.request, name, size, machine, budget.events)
        number = len(plan.table.seeds_of(name)) + plan.table.trials_of(name)
        epochs = epochs_of(plan, name, size, machine) or min(cost.epochs, MOST_EPOCHS)
        rows.append((name, number, number * cost.run_s(epochs, budget.candidates)))
    cost = _cost(plan.request, GENSR, size, machine, budget.events)
    one = cost.run_s(budget.epochs or min(cost.epochs, MOST_EPOCHS), VARIANT_CANDIDATES)
    for analysis in dict.fromkeys(variant.analysis for variant in plan.variants):
        number = len(plan.cells(analysis))
        rows.append((f"GenSR, {analysis}", number, number * one))
    return rows


def epochs_of(plan: PaperPlan, name: str, size: Size, machine: Machine) -> float:
    """0 = as the preset says. The budget's epochs are GenSR's; the others train as long as it does, in
    seconds, and never more than their presets ask for: equal epochs would leave fast systems untrained."""
    if not plan.budget.epochs or not model_class(name).trained:
        return 0.0
    if name in plan.epochs:
        return plan.epochs[name]
    gensr = _cost(plan.request, GENSR, size, machine, plan.budget.events)
    own = _cost(plan.request, name, size, machine, plan.budget.events)
    return epochs_within(own, gensr.training_s(min(plan.budget.epochs, gensr.epochs)))


@cache
def _config_of(request: PaperRequest, name: str) -> tuple[Config, str | None]:
    """A system's settings, and its preset."""
    preset, chosen = preset_of(name, request.preset if name == GENSR else None)
    own = request.recipe["own_settings"].get(name, ())
    return load_config(preset, [*chosen, *own, *request.overrides]), preset


@cache
def _cost(request: PaperRequest, name: str, size: Size, machine: Machine, events: int) -> SystemCost:
    config, preset = _config_of(request, name)
    return cost_of(config, size, machine, events, preset)


def machine_of(plan: PaperPlan) -> Machine:
    """What one run gets here: run.threads and --jobs say how many of the cores."""
    names = (GENSR,) if plan.request.finished else plan.systems
    threads = max(_config_of(plan.request, name)[0].run.threads for name in names)
    return this_machine(threads, plan.request.jobs)


def seconds_of(plan: PaperPlan, size: Size, machine: Machine | None = None) -> float:
    """Wall time: the table, then the variants, with plan.request.jobs runs at once. The trials of a system
    wait for one another."""
    table: list[tuple[float, float]] = []
    variants: list[tuple[float, float]] = []
    for name, number, seconds in parts_of(plan, size, machine):
        chain = 1 + plan.table.trials_of(name) if name in plan.systems else 1
        part = (seconds, chain * seconds / max(1, number))
        (table if name in plan.systems else variants).append(part)
    return wall_s(table, plan.request.jobs) + wall_s(variants, plan.request.jobs)


def dry_run(request: PaperRequest) -> dict[str, Any]:
    """{"lines": for people, "runs", "seconds", "jobs", "disk_gb", "budget", "trust", "parts"}; nothing is
    written."""
    environments(request.jobs)  # raises ConfigError where the machine is too small
    size = size_of_data(request)
    plan = make_plan(request, size)
    size = size or documented_size(request.recipe["preset"])
    machine, jobs = machine_of(plan), request.jobs
    parts = parts_of(plan, size, machine)
    runs, seconds = sum(number for _, number, _ in parts), seconds_of(plan, size, machine)
    gigabytes = runs * _bytes_of_a_run(request) / 1e9
    at_once = f" each, {jobs} at once" if jobs > 1 else ""
    lines = [
        f"gensr paper {request.name}: budget {plan.budget.name}, {runs} runs, about "
        f"{seconds / 3600:.1f} hours on {machine.title}{at_once}, about {gigabytes:.1f} GB of run folders",
        f"  data  {request.data_dir}: {sum(size.train):,} training events",
        f"  {'what':<28}{'runs':>6}{'hours':>9}",
        *(f"  {name:<28}{number:>6}{found / 3600:>9.2f}" for name, number, found in parts),
        "  hours are estimates from trainer/experiments/speeds.yaml",
        *(["  hours of a line are those of its runs one after the other"] if jobs > 1 else []),
        *(f"  trust: {line}" for line in plan.trust),
    ]
    return {
        "lines": lines,
        "runs": runs,
        "seconds": seconds,
        "jobs": jobs,
        "disk_gb": gigabytes,
        "budget": asdict(plan.budget),
        "trust": plan.trust,
        "parts": [{"what": name, "runs": number, "seconds": found} for name, number, found in parts],
    }


def size_of_data(request: PaperRequest) -> Size | None:
    """Of the prepared folder, where it is there."""
    if not (request.data_dir / "manifest.json").is_file():
        return None
    from trainer.data.folder import PreparedFolder

    manifest = PreparedFolder.at(request.data_dir).manifest
    return Size.of_manifest(manifest)


@cache
def _bytes_of_a_run(request: PaperRequest) -> int:
    """Weights and two checkpoints with AdamW's state of GenSR: most others are smaller."""
    from trainer.training.plan import data_size, model_size

    config = load_config(request.preset, request.overrides)
    size = model_size(config, data_size(config, request.preset))
    return 4 * size.total + 2 * 12 * size.trainable
