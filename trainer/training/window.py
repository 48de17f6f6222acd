"""Losses between two log lines, and what happens to one that is not finite.

Losses stay on the device until they are reported: no step waits for it, unless run.on_nan=skip asks to look
at each before it is learned from.
"""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.errors import RunError
from trainer.runtime.distributed import gather_objects

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_IDS_SHOWN = 16
MAX_NAMES_SHOWN = 3


class Window:
    """Collects every micro-batch's scalars since the last report, and which events they came from."""

    def __init__(self, accelerator: "Accelerator", grad_accum_steps: int) -> None:
        self._accelerator, self._grad_accum_steps = accelerator, grad_accum_steps
        self._parts: list[dict[str, Tensor]] = []
        self._event_ids: list[Tensor] = []
        self._skipped: list[bool] = []
        self._started_s = time.monotonic()

    @property
    def num_steps(self) -> int:
        return len(self._parts) // self._grad_accum_steps

    def add(self, parts: dict[str, Tensor], event_ids: Tensor, skipped: bool = False) -> None:
        """Scalars of one micro-batch ("loss" among them), and its events in case they must be named. A
        skipped one counts in no mean."""
        self._parts.append(
            {name: torch.full_like(part, float("nan")) for name, part in parts.items()} if skipped else parts
        )
        self._event_ids.append(event_ids)
        self._skipped.append(skipped)

    def restart_clock(self) -> None:
        """Do not count the time since the last report: validation and checkpoints are no training."""
        self._started_s = time.monotonic()

    def report(self, last_step: int) -> tuple[dict[str, float], int, float]:
        """→ (means over micro-batches and ranks, steps, seconds), and begin anew; on all ranks, after step
        `last_step`.

        A part that is NaN somewhere (a task without events) is averaged over the rest; one that is NaN
        everywhere is not there. Raises RunError on every rank when a loss is not finite, naming the step and
        its events.
        """
        names = sorted(self._parts[0])
        # [micro-batches, names]
        values = torch.stack([torch.stack([parts[name].float() for name in names]) for parts in self._parts])
        wrong = ~torch.isfinite(values[:, names.index("loss")]) & ~torch.tensor(
            self._skipped, device=values.device
        )
        own = torch.cat([values.nanmean(0), wrong.any().float()[None]])
        ranks: Tensor = self._accelerator.gather(own[None])  # [ranks, names + 1]
        if bool(ranks[:, -1].any()):  # the only wait for the device
            self._refuse(wrong.tolist(), last_step)
        means = {
            name: value
            for name, value in zip(names, ranks[:, :-1].nanmean(0).tolist(), strict=True)
            if value == value
        }
        num_steps, seconds = self.num_steps, time.monotonic() - self._started_s
        self._parts, self._event_ids, self._skipped = [], [], []
        self.restart_clock()
        return means, num_steps, seconds

    def _refuse(self, wrong: list[bool], last_step: int) -> None:
        """Name the first bad micro-batch of each rank that has one."""
        first_step = last_step - self.num_steps + 1
        mine: tuple[int, list[int]] = (0, [])
        if any(wrong):
            place = wrong.index(True)
            mine = first_step + place // self._grad_accum_steps, self._event_ids[place].tolist()
        places = [
            f"step {step}, rank {rank}, event ids {shown(ids)}"
            for rank, (step, ids) in enumerate(gather_objects(self._accelerator, mine))
            if ids
        ]
        raise RunError(
            f"the loss is not finite: {'; '.join(places)}. Nothing was saved since; earlier checkpoints are "
            "intact. Try a smaller optim.lr or run.precision=fp32; run.on_nan=skip leaves such batches out."
        )


def check_weights(accelerator: "Accelerator", weights: Mapping[str, Tensor], step: int) -> None:
    """Before they are validated or saved, on all ranks: the loss of a step may be finite whose gradient is
    not, and only the next loss would show it. Raises RunError on every rank, naming some of them.

    Not of what ZeRO-3 has partitioned: DeepSpeed makes no step with such a gradient, and the last rank's part
    ends with memory that nobody has written."""
    whole = {name: weight for name, weight in weights.items() if not hasattr(weight, "ds_tensor")}
    if not whole:
        return
    bad = ~torch.stack([weight.detach().sum().float() for weight in whole.values()]).isfinite()
    if not bool(accelerator.gather(bad.any()[None]).any()):
        return
    mine = [name for name, is_bad in zip(whole, bad.tolist(), strict=True) if is_bad]
    names = sorted({name for each in gather_objects(accelerator, mine) for name in each})
    raise RunError(
        f"weights are not finite after step {step}: {', '.join(names[:MAX_NAMES_SHOWN])}"
        f"{', …' if len(names) > MAX_NAMES_SHOWN else ''}. A gradient was not, though the loss was. Nothing "
        "was saved since; earlier checkpoints are intact. Try a smaller optim.lr or run.precision=fp32."
    )


class BadBatches:
    """run.on_nan=skip: a micro-batch whose loss is not finite on some rank is left out on all of them, so
    that ranks stay in step."""

    def __init__(
        self,
        accelerator: "Accelerator",
        model: nn.Module,
        max_in_a_row: int,
        before: Callable[[], Batch] | None = None,
    ) -> None:
        """before: of a continued run, a batch that was trained on before its checkpoint."""
        self._accelerator, self._model, self._max_in_a_row = accelerator, model, max_in_a_row
        self._before = before
        self._last_good: Batch | None = None
        self._in_a_row = 0

    def left_out(self, loss: Tensor, batch: Batch) -> tuple[Tensor, list[int]]:
        """→ (the loss to learn from, event ids of all ranks that are left out: none for a good batch); on all
        ranks, before the backward pass.

        In place of a bad loss there is the last good batch's, times 0: every parameter gets a gradient, and
        it is zero. Raises RunError for one too many in a row, and where there is no good one.
        """
        bad = ~torch.isfinite(loss.detach())
        if not self._on_any_rank(bad):
            self._last_good, self._in_a_row = batch, 0
            return loss, []
        self._in_a_row += 1
        ids = [
            event
            for ids in gather_objects(self._accelerator, batch.event_id.tolist() if bool(bad) else [])
            for event in ids
        ]
        if self._last_good is None and self._before is not None:
            self._last_good = self._before()
        if self._last_good is None:
            raise _not_finite("the first batch", ids)
        if self._in_a_row > self._max_in_a_row:
            raise _not_finite(f"{self._in_a_row} batches in a row", ids)
        nothing: Tensor = self._model(self._last_good)[0] * 0.0
        if self._on_any_rank(~torch.isfinite(nothing.detach())):  # times 0 it would still be learned from
            raise _not_finite("a batch and the one before", ids)
        return nothing, ids

    def _on_any_rank(self, bad: Tensor) -> bool:
        return bool(self._accelerator.gather(bad.reshape(1)).any())


def _not_finite(batches: str, ids: list[int]) -> RunError:
    return RunError(
        f"the loss is not finite for {batches}, now with event ids {shown(ids)}. Earlier checkpoints are "
        "intact. Try a smaller optim.lr or run.precision=fp32; run.max_skipped_batches says how many are "
        "left out."
    )


def shown(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:MAX_IDS_SHOWN])) + (", …" if len(ids) > MAX_IDS_SHOWN else "")
