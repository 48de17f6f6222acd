"""One micro-batch: what training does, and what the benchmarks time."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trainer.batch import Batch
from trainer.runtime.distributed import uses_deepspeed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trainer.training.sparse_rows import SparseRows
    from trainer.training.window import BadBatches

Lap = Callable[[str], None]


def no_lap(part: str) -> None:
    """For callers that do not time the parts."""


def micro_step(
    accelerator: "Accelerator",
    model: nn.Module,
    optimizer: Any,
    batch: Batch,
    grad_clip: float,
    bad_batches: "BadBatches | None" = None,
    lap: Lap = no_lap,
    rows: "SparseRows | None" = None,
) -> tuple[dict[str, Tensor], list[int]]:
    """Forward, backward and, with the last micro-batch of a step, clipping and the update → (detached scalars
    of the loss, event ids that are left out because a loss is not finite). batch: on the device, prepared.
    lap is told the end of each part: forward, backward, optimiser. rows: tables of optim.sparse_rows."""
    with accelerator.accumulate(model):
        loss, parts = model(batch)
        left_out: list[int] = []
        if bad_batches is not None:
            loss, left_out = bad_batches.left_out(loss, batch)
        lap("forward")
        accelerator.backward(loss)
        lap("backward")
        if accelerator.sync_gradients and not uses_deepspeed(accelerator):  # DeepSpeed clips by itself
            if rows is None:
                accelerator.clip_grad_norm_(model.parameters(), grad_clip)
            else:
                rows.clip(model.parameters(), grad_clip)
        optimizer.step()
        if rows is not None and accelerator.sync_gradients:
            rows.step()
        optimizer.zero_grad()
        lap("optimiser")
    return parts, left_out
