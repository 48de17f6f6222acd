"""What processes tell each other: values, rows with gradients, whole weights; and the end of their group."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from trainer.errors import GensrError, RunError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def uses_deepspeed(accelerator: "Accelerator") -> bool:
    return str(accelerator.distributed_type.value) == "DEEPSPEED"


def without_ddp(model: torch.nn.Module) -> torch.nn.Module:
    """The module of a model that DeepSpeed has not wrapped. (Accelerate's unwrap_model() imports DeepSpeed to
    tell, which takes a second.)"""
    inner: torch.nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def full_state_dict(
    accelerator: "Accelerator", wrapped: torch.nn.Module, module: torch.nn.Module
) -> dict[str, Tensor]:
    """All weights of `module`, whole, on rank 0 at least. To be called on all ranks: ZeRO-3 gathers the
    partitions."""
    state: dict[str, Tensor] | None = (
        accelerator.get_state_dict(wrapped) if uses_deepspeed(accelerator) else module.state_dict()
    )
    return state or {}


def on_main(accelerator: "Accelerator", function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and return its value on every rank. An error a user can act on is raised on
    every rank."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (GensrError, OSError) as error:
            outcome[1] = error if isinstance(error, GensrError) else RunError(str(error))
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    value: T = outcome[0]
    return value


def gather_objects(accelerator: "Accelerator", value: T) -> list[T]:
    """One value of each rank, in the order of ranks, on every rank. Small Python objects only."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def process_group(accelerator: "Accelerator") -> Iterator[None]:
    """Leave the process group when the block ends without an error (after one, the launcher ends the other
    ranks)."""
    yield
    if torch.distributed.is_initialized():
        accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()


class _GatherRows(torch.autograd.Function):
    """all_gather whose backward sums the gradients that every rank has for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.first, ctx.size = torch.distributed.get_rank() * rows.shape[0], rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(total)
        return total[ctx.first : ctx.first + ctx.size]


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of this rank [n, …] → (rows of all ranks [R·n, …], index of this rank's first row). Every rank
    gives the same n.

    Differentiable. With ranks' gradients averaged, as DDP and ZeRO do, the gradient of the mean of the ranks'
    losses is that of the union batch.
    """
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered, torch.distributed.get_rank() * rows.shape[0]
