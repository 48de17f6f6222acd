"""Arithmetic of a run: steps, batches, learning rate, when to log, validate and save, and when validation
counts as progress.

Pure functions of the configuration and the number of events: nothing here has state, so nothing here needs to
be checkpointed.
"""

import math
from dataclasses import dataclass

from data_shards.schema import TASKS
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.evaluation.metrics import METRICS

VALIDATIONS_PER_RUN = 5  # run.validate_every_steps = 0
NUM_SIGMAS = 3.0  # a first validation counts as better than chance from here on


@dataclass(frozen=True)
class Schedule:
    """All the step counts of a run. A step is an optimizer step: global_batch_size events over all ranks."""

    num_steps: int
    steps_per_epoch: float
    warmup_steps: int
    log_every_steps: int
    validate_every_steps: int
    checkpoint_every_steps: int
    grad_accum_steps: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int

    @property
    def num_events(self) -> int:
        return self.num_steps * self.global_batch_size

    @property
    def num_epochs(self) -> float:
        return self.num_steps / self.steps_per_epoch

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate in step `step` (from 0): linear warm-up, then linear decay that
        reaches zero after the last step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return (self.num_steps - step) / (self.num_steps - self.warmup_steps)

    def is_log_step(self, done: int) -> bool:
        """`done` steps are finished."""
        return done % self.log_every_steps == 0 or done == self.num_steps

    def is_validation_step(self, done: int) -> bool:
        """Every validate_every_steps, and after the last step. Less than half an interval before the last
        there is none: two validations of nearly the same weights would say the same twice."""
        left = self.num_steps - done
        return left == 0 or (done % self.validate_every_steps == 0 and 2 * left >= self.validate_every_steps)

    def is_checkpoint_step(self, done: int) -> bool:
        return done % self.checkpoint_every_steps == 0 or done == self.num_steps


def grad_accum_steps(config: Config, world_size: int) -> int:
    """global_batch_size = micro_batch_size · world_size · grad_accum_steps. Raises ConfigError with values
    that would fit."""
    optim = config.optim
    per_pass = optim.micro_batch_size * world_size
    if optim.global_batch_size % per_pass:
        share, rest = divmod(optim.global_batch_size, world_size)
        if rest == 0:
            fix = f"choose optim.micro_batch_size among {', '.join(map(str, _divisors(share)))}"
        else:
            divisible = math.ceil(optim.global_batch_size / per_pass) * per_pass
            fix = f"choose an optim.global_batch_size divisible by {per_pass}, such as {divisible}"
        raise ConfigError(
            f"optim.global_batch_size={optim.global_batch_size} is no multiple of "
            f"optim.micro_batch_size={optim.micro_batch_size} × {world_size} processes: {fix}"
        )
    return optim.global_batch_size // per_pass


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def make_schedule(config: Config, num_train_events: int, world_size: int) -> Schedule:
    """The schedule of a run over `num_train_events` events an epoch. Raises ConfigError when the batch sizes
    do not fit the processes."""
    run, optim = config.run, config.optim
    if num_train_events < 1:
        raise ConfigError(
            "There is no training event to learn from (see data.weight_rec, data.weight_src and cf.holdout). "
            "Prepare more data."
        )
    steps_per_epoch = num_train_events / optim.global_batch_size
    num_steps = run.max_steps or max(1, round(run.max_epochs * steps_per_epoch))
    validate_every = run.validate_every_steps or max(1, math.ceil(num_steps / VALIDATIONS_PER_RUN))
    return Schedule(
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        # a run shorter than its warm-up would never reach the peak
        warmup_steps=min(optim.warmup_steps, num_steps // 2),
        log_every_steps=run.log_every_steps,
        validate_every_steps=validate_every,
        checkpoint_every_steps=run.checkpoint_every_steps or validate_every,
        grad_accum_steps=grad_accum_steps(config, world_size),
        global_batch_size=optim.global_batch_size,
        micro_batch_size=optim.micro_batch_size,
        world_size=world_size,
    )


def check_measured(metric: str) -> None:
    """Raises ConfigError for a metric that no validation measures."""
    part, _, name = metric.partition("/")
    if part not in (*TASKS, "mean") or name not in METRICS:
        raise ConfigError(
            f"run.select_metric={metric} is not measured. Give mean/, {'/ or '.join(TASKS)}/ and one of "
            f"{', '.join(METRICS)}"
        )


def chance(metric: str, num_candidates: int) -> tuple[float, float]:
    """Mean and standard deviation over events of a ranking metric when the rank is uniform in 1 …
    num_candidates.

    Among 1 + 99 candidates: recall@10 .100, ndcg@10 .045, mrr .052. Raises ConfigError for a metric that no
    validation measures.
    """
    check_measured(metric)
    name, _, k = metric.rpartition("/")[2].partition("@")
    cutoff = int(k) if k.isdigit() else num_candidates
    gains = {
        "recall": lambda rank: 1.0,
        "ndcg": lambda rank: 1 / math.log2(rank + 1),
        "mrr": lambda rank: 1 / rank,
    }
    values = [gains[name](rank) if rank <= cutoff else 0.0 for rank in range(1, num_candidates + 1)]
    mean = sum(values) / num_candidates
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / num_candidates)


def above_chance(metric: str, num_candidates: int, num_events: int) -> float:
    """Value from which a validation beats chance: mean + 3 standard errors over `num_events` events."""
    mean, deviation = chance(metric, num_candidates)
    return mean + NUM_SIGMAS * deviation / math.sqrt(max(1, num_events))
