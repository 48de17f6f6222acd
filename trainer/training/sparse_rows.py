"""optim.sparse_rows: large tables of items and users, of which a step sends and updates only the rows that it
has read.

As a parameter, a table of 6.9 M items × 64 has a gradient of 1.77 GB: DDP and ZeRO send all of it and AdamW
walks all of it, although a step reads some thousand rows. Here the table is no parameter:

    forward   ItemTable looks rows up and keeps (ids, rows)
    backward  leaves the gradients of these rows
    gather()  adds up each row's, exchanges (row, gradient) between ranks and takes their mean
    clip()    counts them in the norm of all gradients
    step()    torch's SparseAdam: moments and weights of these rows alone

Every rank holds the whole table and both its moments, whatever the ZeRO stage, and computes the same update.
How this differs from AdamW on the whole table: docs/clusters.md.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.config import OptimConfig
from trainer.errors import ConfigError, RunError
from trainer.models.layers.embedding import ItemTable, tables_by_rows
from trainer.runtime.distributed import uses_deepspeed

if TYPE_CHECKING:
    from accelerate import Accelerator

MOMENTS = ("exp_avg", "exp_avg_sq")
EPS = 1e-6  # as in torch's clip_grad_norm_


def large_tables(model: nn.Module, at_least: int) -> list[ItemTable]:
    """Trained tables of at least so many rows, 0 = none. DDP and ZeRO need something to train: where a model
    is tables alone, the smallest stays out. Raises ConfigError where no table is that large."""
    tables = [module for module in model.modules() if isinstance(module, ItemTable)]
    chosen = [table for table in tables if at_least and len(table.weight) >= at_least]
    own = {id(table.weight) for table in chosen}
    if chosen and all(id(p) in own for p in model.parameters() if p.requires_grad):
        chosen.remove(min(chosen, key=lambda table: table.weight.numel()))
    if at_least and not chosen:
        raise ConfigError(
            f"optim.sparse_rows={at_least}: the model has no table of that many items or users beside other "
            "weights. Set it to 0"
        )
    return chosen


def take_apart(model: nn.Module, at_least: int) -> None:
    """Before the optimizer is made. Raises ConfigError where no table is that large."""
    for table in large_tables(model, at_least):
        table.by_rows()


class SparseRows:
    """The tables and their optimizer. Every rank calls every method at the same point of a step."""

    @classmethod
    def of(
        cls, accelerator: "Accelerator", module: nn.Module, model: Any, config: OptimConfig
    ) -> "SparseRows | None":
        """Of a model after take_apart() and accelerate.prepare(); None when nothing was taken apart."""
        tables = tables_by_rows(module)
        if not tables:
            return None
        rows = cls(tables, config, accelerator.num_processes)
        if uses_deepspeed(accelerator):
            rows.count_in(model, config.grad_clip)
        return rows

    def __init__(self, tables: dict[str, ItemTable], config: OptimConfig, num_ranks: int = 1) -> None:
        self.tables, self.num_ranks, self.weight_decay = tables, num_ranks, config.weight_decay
        self.weight = {name: nn.Parameter(table.rows) for name, table in tables.items()}  # the same memory
        self.optimizer = torch.optim.SparseAdam(
            list(self.weight.values()), lr=config.lr, betas=(0.9, config.beta2)
        )
        self._norm: Tensor | None = None  # of all gradients, rows and others, once this step has been clipped

    # ---- a step --------------------------------------------------------------------------------------------

    def gather(self) -> Tensor:
        """After the last backward pass of a step: each table's gradient, the mean over ranks, at the rows
        that any of them has read → their norm."""
        norms = []
        for name, table in self.tables.items():
            gradient = _mean_over_ranks(_gradient(table), self.num_ranks)
            self.weight[name].grad = gradient
            norms.append(gradient.values().norm())
        return torch.stack(norms).norm()

    def clip(self, others: Iterable[nn.Parameter], max_norm: float) -> None:
        """gather(), then scale all gradients together. others: the parameters of the model, whose gradients
        are already the mean over ranks."""
        dense = [parameter for parameter in others if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in dense if p.grad is not None])
        total = self._clip_rows(norm, max_norm)
        torch.nn.utils.clip_grads_with_norm_(dense, max_norm, total)

    def count_in(self, engine: Any, max_norm: float) -> None:
        """Tell DeepSpeed, which clips by itself, of these gradients. ZeRO 1–3 ask the function that scales a
        group of gradients by their norm, without ZeRO the engine asks clip_fp32_gradients()."""
        zero = engine.optimizer
        if not hasattr(zero, "unscale_and_clip_grads"):
            engine.clip_fp32_gradients = lambda: self.clip(engine.module.parameters(), max_norm)
            return
        scale_group = zero.unscale_and_clip_grads
        zero.unscale_and_clip_grads = lambda group, norm: scale_group(group, self._clip_rows(norm, max_norm))

    def _clip_rows(self, norm_of_others: Tensor, max_norm: float) -> Tensor:
        """→ the norm of all gradients. ZeRO calls it once for each of its groups."""
        if self._norm is None:
            norm = self.gather()
            others = torch.as_tensor(norm_of_others, dtype=norm.dtype, device=norm.device)
            self._norm = torch.stack([norm, others]).norm()
            scale = (max_norm / (self._norm + EPS)).clamp(max=1.0)
            for weight in self.weight.values():
                assert weight.grad is not None
                weight.grad.values().mul_(scale)
        return self._norm

    @torch.no_grad()
    def step(self) -> None:
        """Update the rows. Nothing is done where DeepSpeed has left the step out, for gradients that are not
        finite."""
        if self._norm is not None:
            keep = 1 - self.optimizer.param_groups[0]["lr"] * self.weight_decay
            for weight in self.weight.values():
                assert weight.grad is not None
                rows = weight.grad.indices()[0]
                weight.index_copy_(0, rows, weight[rows] * keep)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._norm = None
        for table in self.tables.values():
            table.taken = []

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """Whole tables by the names of their weights, as RUN/model holds them."""
        return {name: weight.detach() for name, weight in self.weight.items()}

    def state(self) -> dict[str, Tensor]:
        """weights(), NAME.exp_avg, NAME.exp_avg_sq and NAME.step: the same on every rank."""
        found = self.weights()
        for name, weight in self.weight.items():
            of_weight = self.optimizer.state[weight]
            found |= {f"{name}.{moment}": of_weight[moment] for moment in MOMENTS}
            found[f"{name}.step"] = torch.tensor(of_weight["step"])
        return found

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """state() from a checkpoint's file, whichever layout it was written by. Raises RunError when it is
        not there."""
        if not path.is_file():
            raise RunError(f"{path} is missing: the checkpoint was written without optim.sparse_rows")
        found = load_file(path)
        for name, weight in self.weight.items():
            weight.copy_(found[name])
            self.optimizer.state[weight] = {
                "step": int(found[f"{name}.step"]),
                **{moment: found[f"{name}.{moment}"].to(weight.device) for moment in MOMENTS},
            }


def _gradient(table: ItemTable) -> Tensor:
    """Of this rank's micro-batches, sparse [rows, width], each row once. Padding has none."""
    pairs = [(ids, rows.grad) for ids, rows in table.taken or [] if rows.grad is not None]
    width, device = table.rows.shape[1], table.rows.device
    none = torch.zeros((0, width), device=device)
    ids = torch.cat([none[:, 0].long(), *(ids.reshape(-1) for ids, _ in pairs)])
    values = torch.cat([none, *(gradient.reshape(-1, width) for _, gradient in pairs)])
    real = ids != 0
    return _sparse(ids[real], values[real], table.rows.shape)


def _mean_over_ranks(gradient: Tensor, num_ranks: int) -> Tensor:
    """Every rank gets the same, bit for bit: all add up the same numbers in the same order."""
    if num_ranks == 1:
        return gradient
    ids, values = gradient.indices()[0], gradient.values()
    counts = [torch.zeros(1, dtype=torch.int64, device=ids.device) for _ in range(num_ranks)]
    torch.distributed.all_gather(counts, torch.tensor([len(ids)], device=ids.device))
    sizes = [int(count) for count in counts]
    room = max(1, *sizes)  # all_gather wants the same size of all
    all_ids, all_values = (
        [part[:size] for part, size in zip(_gathered(tensor, room, num_ranks), sizes, strict=True)]
        for tensor in (ids.int(), values)
    )
    return _sparse(torch.cat(all_ids).long(), torch.cat(all_values) / num_ranks, gradient.shape)


def _gathered(tensor: Tensor, room: int, num_ranks: int) -> list[Tensor]:
    """Of every rank, with anything behind its own rows up to `room`."""
    padded = tensor.new_zeros((room, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(num_ranks)]
    torch.distributed.all_gather(parts, padded)
    return parts


def _sparse(ids: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(ids[None], values, shape, check_invariants=False).coalesce()
