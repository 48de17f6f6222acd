"""What runs will take, calculated before they are made: from speeds.yaml, the sizes of a prepared folder, and
the cores or the GPU of a machine.

No clock is asked, so the same words give the same answer on a loaded machine. It is a plan, not a promise:
speeds are those of one data set, and early stopping is not foreseen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from data_shards.schema import REC, SRC, TASKS, Manifest
from data_shards.settings import parse_yaml
from trainer.config import Config
from trainer.configs import load_config, preset_names
from trainer.models.zoo import model_class

GPU_SPEED = 40.0  # cores of the measured kind that one GPU stands for; a rough guess for small models
MIN_EPOCHS = 0.02  # no plan trains less: below, a system has learned nothing
CORE_SHARE = 0.8  # of each core: two train a little less than twice as fast as one
ONE_PRODUCT = 100  # candidates that cost as much as score_catalogue() where a model ranks all items at once
# settings of data.* that the cost of an event depends on, beside those of the model
LENGTHS = ("history_max", "history_tokens", "item_tokens", "num_negatives")


@dataclass(frozen=True)
class Machine:
    """What one run gets."""

    cores: int
    gpus: int

    @property
    def speed(self) -> float:
        """In cores of speeds.yaml."""
        return self.gpus * GPU_SPEED if self.gpus else max(1.0, CORE_SHARE * self.cores)

    @property
    def title(self) -> str:
        number, what = (self.gpus, "GPU") if self.gpus else (self.cores, "CPU core")
        return f"{number} {what}" if number == 1 else f"{number} {what}s"


def this_machine(threads: int = 0, jobs: int = 1) -> Machine:
    """A run is one process: its share of the cores, or one GPU. threads: run.threads, 0 = as many as its
    share has. jobs: runs at once."""
    from trainer.runtime.device import has_gpu
    from trainer.runtime.launch import num_cores

    share = max(1, num_cores() // jobs)
    return Machine(min(threads or share, share), int(has_gpu()))


def wall_s(parts: Sequence[tuple[float, float]], jobs: int) -> float:
    """Seconds until `jobs` at once have made all parts: (seconds of all its runs, those of its longest chain
    of runs that wait for one another). Never too little (Graham 1969): while the last chain is being made,
    the other jobs may have nothing to do."""
    work_s = sum(seconds for seconds, _ in parts)
    return (work_s + (jobs - 1) * max((chain for _, chain in parts), default=0.0)) / jobs


# ---- sizes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Counts of a prepared folder. Events are pairs: of recommendation, of search."""

    train: tuple[int, int]
    valid: tuple[int, int]
    test: tuple[int, int]
    items: int
    num_negatives: int = 99
    num_hard_negatives: int = 0

    def events(self, split: str, tasks: Sequence[int]) -> int:
        """Of those tasks: a system of one task trains and is evaluated on its own events only."""
        counts = {"train": self.train, "valid": self.valid, "test": self.test}[split]
        return sum(counts[task] for task in tasks)

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> "Size":
        counts = {
            split: (manifest.raw["counts"][split][TASKS[REC]], manifest.raw["counts"][split][TASKS[SRC]])
            for split in ("train", "valid", "test")
        }
        return cls(
            **counts,
            items=manifest.num_items,
            num_negatives=manifest.num_negatives,
            num_hard_negatives=manifest.num_hard_negatives,
        )

    @classmethod
    def of_halves(cls, train: int, test: int, items: int) -> "Size":
        """Where only sums are known: half of the events are searches, and both test splits are as large."""
        ranked = (test - test // 2, test // 2)
        return cls((train - train // 2, train // 2), ranked, ranked, items)


# ---- speeds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Units of speeds.yaml."""

    events_per_s: float
    candidates_per_s: float
    catalogue_events_per_s: float

    def __mul__(self, factor: float) -> "Speed":
        return Speed(
            self.events_per_s * factor, self.candidates_per_s * factor, self.catalogue_events_per_s * factor
        )


@cache
def read_speeds() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("speeds.yaml").read_text(encoding="utf-8")
    speeds: dict[str, Any] = parse_yaml(text)
    return speeds


def core_speed(model: str, num_items: int) -> Speed:
    """Of one core, as measured. num_items: that a model may have to score for a ranking of all."""
    speeds, kind = read_speeds(), model_class(model)
    own = speeds["models"].get(model, speeds["default"]) if kind.trained else speeds["counted"]
    events = float(own.get("events_per_s", 0.0))  # of counted ones none are asked for
    candidates = float(own.get("candidates_per_s", events * speeds["candidates_a_training_event"]))
    catalogue = float(own.get("catalogue_events_per_s", candidates / _ranked(kind, num_items)))
    return Speed(events, candidates, catalogue)


def _ranked(kind: Any, num_items: int) -> int:
    """How many candidates' worth a model scores to rank the whole catalogue for one event."""
    from trainer.models.contract import Ranker
    from trainer.serving.recommend import NUM_CANDIDATES

    if kind.views is not Ranker.views:
        return min(num_items, NUM_CANDIDATES)
    return num_items if kind.score_catalogue is Ranker.score_catalogue else min(num_items, ONE_PRODUCT)


def speed_of(config: Config, num_items: int, machine: Machine, preset: str | None = None) -> Speed:
    """Of the configuration's model on `machine`. A language model that reads other prompts than the measured
    one is as much slower or faster as its operations an event say, where they are counted (on a core, CoLLM
    with the compact prompt and 2.9 times fewer: 3.0). A smaller one that was not measured is faster by their
    root: what is no matrix product does not shrink with them. No GPU does more of them than GPUs do. preset:
    documents the sizes where data.dir is not set. Raises ConfigError for an unknown backbone."""
    one = core_speed(config.model.name, num_items)
    own = read_speeds()["models"].get(config.model.name, {})
    measured_preset = own.get("preset", config.model.name)
    backbone = getattr(config.model, "backbone", None)
    if backbone is None or measured_preset not in preset_names():
        return one * machine.speed
    if backbone in own.get("backbones", {}) and not machine.gpus:
        return one * (machine.speed * own["backbones"][backbone])
    measured = load_config(measured_preset)
    is_measured = config.model == measured.model and all(
        getattr(config.data, name) == getattr(measured.data, name) for name in LENGTHS
    )
    if is_measured and not machine.gpus:
        return one * machine.speed
    flops = _flops(config, preset)
    if not machine.gpus:
        ratio = _flops(measured, measured_preset) / flops
        if not _counts_tokens(config) or backbone != getattr(measured.model, "backbone", None):
            ratio = min(ratio, ratio**0.5)
        return one * (machine.speed * ratio)
    from trainer.training.costs import ASSUMED_FLOPS

    most = next(iter(ASSUMED_FLOPS.values())) * machine.gpus / flops  # events a second
    return one * min(machine.speed, most / one.events_per_s)


def _counts_tokens(config: Config) -> bool:
    """Otherwise _flops() knows parameters alone, among them tables of which an event reads little."""
    from trainer.models.contract import Ranker

    return model_class(config.model.name).cost is not Ranker.cost


def _flops(config: Config, preset: str | None) -> float:
    from trainer.training.plan import data_size, model_size

    return float(model_size(config, data_size(config, preset)).cost.flops)


# ---- a system's runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SystemCost:
    """Seconds of one run of a system."""

    trained: bool
    epochs: float  # that its settings ask for
    epoch_s: float  # every training event once, and the validations in between
    validations_s: float  # those that a run has however short it is: beside T of a budget
    evaluation_s: Mapping[str, float]  # sampled, hard, full → ranking the test split
    start_s: float  # of a process: one trains, one more for each kind of candidates
    stages: int = 1  # runs that train one model (Ranker.stages), each as many epochs

    def training_s(self, epochs: float) -> float:
        """What grows with the epochs."""
        return self.stages * epochs * self.epoch_s

    def run_s(self, epochs: float, candidates: Sequence[str] = ()) -> float:
        """Training, and an evaluation on each kind of candidates."""
        evaluations = sum(self.start_s + self.evaluation_s[kind] for kind in candidates)
        return self.stages * (self.start_s + self.validations_s) + self.training_s(epochs) + evaluations


def cost_of(
    config: Config, size: Size, machine: Machine, full_events: int = 0, preset: str | None = None
) -> SystemCost:
    """full_events: of the whole-catalogue ranking, 0 = all of the test split. preset: see speed_of()."""
    from trainer.training.schedule import VALIDATIONS_PER_RUN

    kind, run = model_class(config.model.name), config.run
    speed = speed_of(config, size.items, machine, preset)
    train, valid, test = (size.events(split, kind.tasks) for split in ("train", "valid", "test"))
    start_s = float(read_speeds()["start_s" if machine.gpus else "fork_s"])
    evaluation_s = {
        "sampled": test * (1 + size.num_negatives) / speed.candidates_per_s,
        "hard": test * (1 + size.num_hard_negatives) / speed.candidates_per_s,
        "full": min(full_events or test, test) / speed.catalogue_events_per_s,
    }
    if not kind.trained:
        return SystemCost(False, 0.0, 0.0, 0.0, evaluation_s, start_s)
    validation_s = min(run.valid_events or valid, valid) * (1 + size.num_negatives) / speed.candidates_per_s
    steps = train / config.optim.global_batch_size  # of an epoch
    epochs = run.max_steps / steps if run.max_steps and steps else run.max_epochs
    epoch_s = train / speed.events_per_s
    if run.validate_every_steps:
        epoch_s += steps / run.validate_every_steps * validation_s
    validations = 1 if run.validate_every_steps else VALIDATIONS_PER_RUN
    validations_s = validations * validation_s
    return SystemCost(True, epochs, epoch_s, validations_s, evaluation_s, start_s, len(kind.stages()))
