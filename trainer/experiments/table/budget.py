"""`gensr table --budget MINUTES` → how long each system trains, before anything runs.

The rule is the same for all: no run trains longer than T seconds, with T the largest for which everything
fits: trials, seeds, and what each run takes however short it is (start, last validation, evaluation). A
system whose settings ask for less keeps them. T becomes run.max_epochs by the speeds of ../costs.py, so no
clock decides what is trained. TABLE/plan.json keeps T and the epochs, and later calls with more seeds or
systems keep to them.

With --jobs N the same minutes hold N times as much work; of it the longest chain of one system (its trials
and a seed) is kept free, since at the end some jobs have nothing to do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.experiments.costs import MIN_EPOCHS, Machine, SystemCost, wall_s

DIGITS = 3  # of epochs, rounded down


@dataclass(frozen=True)
class System:
    """What is planned for one system of the table."""

    model: str
    runs: int  # trials and seeds
    trained: bool
    epochs: float
    preset_epochs: float  # that its settings ask for
    seconds: float  # of all its runs, one after the other
    chain_s: float = 0.0  # of those that wait for one another: its trials, then a seed

    @property
    def is_cut(self) -> bool:
        return self.epochs < self.preset_epochs

    @property
    def note(self) -> str:
        """What a table says of a system that the budget has cut."""
        if not self.is_cut:
            return ""
        return f"trained for {self.epochs:g} of the preset's {self.preset_epochs:g} epochs, by --budget"


@dataclass(frozen=True)
class Times:
    """A table's wall time. minutes: of --budget, 0 = none. longest_s: T; None where nothing is cut. machine:
    what one run gets. jobs: runs at once."""

    minutes: float
    longest_s: float | None
    machine: Machine
    systems: tuple[System, ...]
    jobs: int = 1

    @property
    def seconds(self) -> float:
        return wall_s([(system.seconds, system.chain_s) for system in self.systems], self.jobs)

    def of(self, model: str) -> System:
        return next(system for system in self.systems if system.model == model)

    def facts(self) -> dict[str, Any]:
        """What plan.json, table.json and --json hold."""
        return {
            "minutes": self.minutes,
            "longest_s": self.longest_s,
            "seconds": self.seconds,
            "machine": asdict(self.machine),
            "jobs": self.jobs,
            "systems": {system.model: self._facts(system) for system in self.systems},
        }

    def _facts(self, system: System) -> dict[str, Any]:
        # without a budget the epochs are what was asked for, by --max-steps perhaps: no preset says so
        names = ("runs", "epochs", *(["preset_epochs"] if self.minutes else []), "seconds")
        return {name: getattr(system, name) for name in names}

    def lines(self) -> list[str]:
        head = f"{sum(system.runs for system in self.systems)} runs, about {_time(self.seconds)} on "
        head += self.machine.title
        if self.jobs > 1:
            head += f" each, {self.jobs} at once"
        if self.minutes:
            head = f"budget {self.minutes:g} minutes: {head}"
        if self.longest_s is not None:
            head += f"; no run trains longer than {self.longest_s / 60:.1f} minutes"
        width = max([16, *(len(system.model) for system in self.systems)])
        rows = [("system", "runs", "epochs", "of preset", "time")]
        rows += [
            (
                system.model,
                str(system.runs),
                _epochs(system.epochs, system),
                _epochs(system.preset_epochs, system),
                _time(system.seconds),
            )
            for system in self.systems
        ]
        return [
            head,
            *(
                f"  {name:<{width}}{runs:>6}{epochs:>9}"
                # without a budget nothing is cut: the epochs are what was asked for
                + (f"{of_preset:>11}" if self.minutes else "")
                + f"{time:>14}"
                for name, runs, epochs, of_preset, time in rows
            ),
            "  times are estimates from trainer/experiments/speeds.yaml; stopping early takes less",
            *(["  the time of a system is that of its runs one after the other"] if self.jobs > 1 else []),
        ]


def _epochs(number: float, system: System) -> str:
    return f"{number:.{DIGITS}g}" if system.trained else "counted"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def within(config: Config, system: System) -> Config:
    """The settings with the epochs that the budget leaves."""
    if not system.is_cut:
        return config
    return replace(config, run=replace(config.run, max_epochs=system.epochs, max_steps=0))


# ---- T -----------------------------------------------------------------------------------------------------


def longest_training_s(full: Sequence[tuple[int, float]], available_s: float) -> float | None:
    """The largest T with Σ runs · min(seconds, T) ≤ available_s; None where all fits. full: (number of runs,
    training seconds of each as its preset says)."""
    waiting = sorted(full, key=lambda one: one[1])
    runs = sum(number for number, _ in waiting)
    for number, seconds in waiting:
        if runs * seconds > available_s:
            return available_s / runs
        runs, available_s = runs - number, available_s - number * seconds
    return None


def epochs_within(cost: SystemCost, longest_s: float | None) -> float:
    """The epochs whose training takes at most longest_s, rounded down; those of the preset where they fit.
    Never below MIN_EPOCHS: a system that is added later may need more than the first call's T for these."""
    if longest_s is None or cost.training_s(cost.epochs) <= longest_s:
        return cost.epochs
    if longest_s <= cost.training_s(MIN_EPOCHS):
        return min(MIN_EPOCHS, cost.epochs)
    return _rounded_down(longest_s / cost.training_s(1.0))


def _rounded_down(number: float) -> float:
    step = 10.0 ** (math.floor(math.log10(number)) - DIGITS + 1)
    return float(f"{math.floor(number / step) * step:.{DIGITS}g}")


@dataclass(frozen=True)
class Runs:
    """How often one system is run, and what a run costs."""

    seeds: int
    trials: int
    candidates: tuple[str, ...]
    cost: SystemCost

    @property
    def number(self) -> int:
        return self.seeds + self.trials

    def seconds(self, epochs: float) -> float:
        """Of all of them: a trial is trained, a seed is evaluated, too."""
        return self.trials * self.cost.run_s(epochs) + self.seeds * self.cost.run_s(epochs, self.candidates)

    @property
    def chain(self) -> "Runs":
        """Those that wait for one another: all trials, then a seed waits for nothing but them."""
        return replace(self, seeds=min(1, self.seeds))

    def system(self, model: str, epochs: float) -> System:
        cost, chain_s = self.cost, self.chain.seconds(epochs)
        return System(model, self.number, cost.trained, epochs, cost.epochs, self.seconds(epochs), chain_s)


def plan_times(
    runs: Mapping[str, Runs],
    machine: Machine,
    minutes: float = 0.0,
    known: Mapping[str, Any] | None = None,
    jobs: int = 1,
) -> Times:
    """Each system's epochs. known: Times.facts() of the first call with this TABLE, whose T and epochs stay.
    Raises ConfigError for a budget that is too small, naming the smallest that works."""
    known = known or {}
    if known:
        longest_s = known["longest_s"]
    else:
        longest_s = _longest_s(runs, 60 * minutes, jobs) if minutes else None
    before = known.get("systems", {})
    systems = tuple(
        one.system(name, before[name]["epochs"] if name in before else epochs_within(one.cost, longest_s))
        for name, one in runs.items()
    )
    times = Times(minutes, longest_s, machine, systems, jobs)
    if known and times.seconds > 60 * minutes:
        raise ConfigError(
            f"--budget {minutes:g}: with the epochs of the first call, which stay, all of it takes about "
            f"{math.ceil(times.seconds / 60)} minutes. Give --budget {math.ceil(times.seconds / 60)}, fewer "
            "seeds or models, or choose another TABLE"
        )
    return times


def _longest_s(runs: Mapping[str, Runs], budget_s: float, jobs: int) -> float | None:
    """T, by wall_s(): whichever system has the longest chain, all runs and `jobs` - 1 times its chain fit
    into `jobs` times the budget."""
    costs = [one.cost for one in runs.values() if one.cost.trained]
    least_s = max((cost.training_s(min(cost.epochs, MIN_EPOCHS)) for cost in costs), default=0.0)
    needed_s = wall_s(
        [(_within_s(one, least_s), _within_s(one.chain, least_s)) for one in runs.values()], jobs
    )
    if budget_s < needed_s:
        smallest = math.ceil(needed_s / 60)
        around = {name: one.seconds(0.0) for name, one in runs.items()}
        around_s = wall_s([(one.seconds(0.0), one.chain.seconds(0.0)) for one in runs.values()], jobs)
        dearest = sorted(around, key=lambda name: -around[name])[:2]
        raise ConfigError(
            f"--budget {budget_s / 60:g} is too small: starting, validating and evaluating all runs takes "
            f"about {around_s / 60:.0f} minutes (most: {' and '.join(dearest)}), and no system should train "
            f"for less than {MIN_EPOCHS} epochs. The smallest that works is --budget {smallest}. Fewer "
            "seeds, models, candidates or --events need less"
        )
    found = []
    for last in runs.values():
        counted = [(one, 1) for one in runs.values()] + [(last.chain, jobs - 1)] * (jobs > 1)
        around_s = sum(times * one.seconds(0.0) for one, times in counted)
        full = [(times * one.number, one.cost.training_s(one.cost.epochs)) for one, times in counted]
        found.append(longest_training_s(full, jobs * budget_s - around_s))
    return min((seconds for seconds in found if seconds is not None), default=None)


def _within_s(runs: Runs, longest_s: float) -> float:
    """Of all of them, where none trains for more than longest_s."""
    return runs.seconds(0.0) + runs.number * min(runs.cost.training_s(runs.cost.epochs), longest_s)
