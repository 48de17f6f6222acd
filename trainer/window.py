"""Losses between two log lines. They stay on the device until they are reported: no step waits for it."""

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.distributed import gather_objects
from trainer.errors import RunError

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_IDS_SHOWN = 16


class Window:
    """Collects every micro-batch's scalars since the last report, and which events they came from."""

    def __init__(self, accelerator: "Accelerator", grad_accum_steps: int) -> None:
        self._accelerator, self._grad_accum_steps = accelerator, grad_accum_steps
        self._parts: list[dict[str, Tensor]] = []
        self._event_ids: list[Tensor] = []
        self._started_s = time.monotonic()

    @property
    def num_steps(self) -> int:
        return len(self._parts) // self._grad_accum_steps

    def add(self, parts: dict[str, Tensor], event_ids: Tensor) -> None:
        """Scalars of one micro-batch ("loss" among them), and its events in case they must be named."""
        self._parts.append(parts)
        self._event_ids.append(event_ids)

    def restart_clock(self) -> None:
        """Do not count the time since the last report: validation and checkpoints are no training."""
        self._started_s = time.monotonic()

    def report(self, last_step: int) -> tuple[dict[str, float], int, float]:
        """→ (means over micro-batches and ranks, steps, seconds), and begin anew; on all ranks, after step `last_step`.

        A part that is NaN somewhere (a task without events) is averaged over the rest. Raises RunError on every rank when a loss is not finite,
        naming the step and its events.
        """
        names = sorted(self._parts[0])
        values = torch.stack([torch.stack([parts[name].float() for name in names]) for parts in self._parts])  # [micro-batches, names]
        wrong = ~torch.isfinite(values[:, names.index("loss")])
        own = torch.cat([values.nanmean(0), wrong.any().float()[None]])
        ranks: Tensor = self._accelerator.gather(own[None])  # [ranks, names + 1]
        if bool(ranks[:, -1].any()):  # the only wait for the device
            self._refuse(wrong.tolist(), last_step)
        means = {name: value for name, value in zip(names, ranks[:, :-1].nanmean(0).tolist(), strict=True) if value == value}
        num_steps, seconds = self.num_steps, time.monotonic() - self._started_s
        self._parts, self._event_ids = [], []
        self.restart_clock()
        return means, num_steps, seconds

    def _refuse(self, wrong: list[bool], last_step: int) -> None:
        """Name the first bad micro-batch of each rank that has one."""
        first_step = last_step - self.num_steps + 1
        mine = (first_step + wrong.index(True) // self._grad_accum_steps, self._event_ids[wrong.index(True)].tolist()) if any(wrong) else (0, [])
        places = []
        for rank, (step, ids) in enumerate(gather_objects(self._accelerator, mine)):
            if ids:
                shown = ", ".join(map(str, ids[:MAX_IDS_SHOWN])) + (", …" if len(ids) > MAX_IDS_SHOWN else "")
                places.append(f"step {step}, rank {rank}, event ids {shown}")
        raise RunError(
            f"the loss is not finite: {'; '.join(places)}. Nothing was saved since; earlier checkpoints are intact. "
            "Try a smaller optim.lr or run.precision=fp32."
        )
