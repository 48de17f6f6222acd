"""A large table of items trained whole and by rows (optim.sparse_rows): seconds a step and bytes that each
process sends, in one run, the two taking turns.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.sparse_rows \
        [--items 500_000] [--steps 6] [key=value …]

SASRec with loss=bce on drawn events (nothing is read from a folder), DDP over gloo. Bytes are those that a
ring algorithm sends, as in benchmarks/communication.py. Prints one JSON object; the ratios are medians of
dense / rows.
"""

import argparse
import json
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed

from trainer.batch import Batch
from trainer.config import Config
from trainer.configs import load_config
from trainer.models.zoo import model_class
from trainer.runs.provenance import git_commit, hardware_line
from trainer.runs.world import sizes_only
from trainer.training.costs import DataSize, bytes_sent
from trainer.training.optimizer import make_optimizer
from trainer.training.plan import size_of
from trainer.training.sparse_rows import SparseRows, take_apart
from trainer.training.step import micro_step

WARMUP = 1
BASE = [
    "model.loss=bce",
    "optim.global_batch_size=256",
    "optim.micro_batch_size=128",
    "data.history_max=20",
]
SENT = [0.0]


class System:
    """One of the two: a model, its optimizers, and what a step of it takes."""

    def __init__(self, items: int, words: list[str]) -> None:
        self.config = load_config("sasrec", [*BASE, *words])
        data = DataSize(train_events=1_000_000, valid_events=1, items=items, queries=1)
        set_seed(0)
        kind = model_class(self.config.model.name)
        module = kind(self.config.model, sizes_only(self.config, data, 64))
        sparse_rows = self.config.optim.sparse_rows
        self.size = size_of(module, sparse_rows)
        take_apart(module, sparse_rows)
        self.accelerator = Accelerator(cpu=True)
        self.model, self.optimizer = self.accelerator.prepare(
            module, make_optimizer(module, self.config.optim)
        )
        if dist.is_initialized():
            self.model.register_comm_hook(None, _counted_bucket)
        self.rows = SparseRows.of(self.accelerator, module, self.model, self.config.optim)
        self.seconds: list[float] = []
        self.bytes: list[float] = []

    def step(self, batch: Batch) -> None:
        SENT[0], started = 0.0, perf_counter()
        micro_step(
            self.accelerator,
            self.model,
            self.optimizer,
            batch,
            self.config.optim.grad_clip,
            rows=self.rows,
        )
        self.seconds.append(perf_counter() - started)
        self.bytes.append(SENT[0])

    def report(self, world_size: int) -> dict[str, float]:
        return {
            "seconds": median(self.seconds[WARMUP:]),
            "bytes_sent": median(self.bytes[WARMUP:]),
            "bytes_calculated": bytes_sent(self.config, self.size, None, world_size),
        }


def events(config: Config, items: int, seed: int) -> Batch:
    """Of this rank, with items drawn uniformly: no two are likely to be the same, the worst case."""
    size, length = config.optim.micro_batch_size, config.data.history_max
    draw = torch.Generator().manual_seed(seed)
    history = torch.randint(items, (size, length), generator=draw)
    candidates = torch.randint(items, (size, 1 + config.data.num_negatives), generator=draw)
    labels = torch.zeros(candidates.shape)
    labels[:, 0] = 1
    zeros = torch.zeros(size, dtype=torch.int64)
    return Batch(
        event_id=torch.arange(size),
        user=zeros,
        task=zeros,
        query=zeros - 1,
        fold=zeros - 1,
        history_items=history,
        history_tasks=torch.zeros_like(history),
        history_mask=torch.ones_like(history, dtype=torch.bool),
        history_queries=torch.full_like(history, -1),
        candidates=candidates,
        labels=labels,
    )


def count_all_gather() -> None:
    original: Callable[..., Any] = dist.all_gather

    def counted(parts: list[torch.Tensor], tensor: torch.Tensor, *more: Any, **named: Any) -> Any:
        SENT[0] += tensor.nbytes * (len(parts) - 1)
        return original(parts, tensor, *more, **named)

    dist.all_gather = counted  # type: ignore[assignment]


def _counted_bucket(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    size = dist.get_world_size()
    SENT[0] += 2 * bucket.buffer().nbytes * (size - 1) / size
    return allreduce_hook(group, bucket)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=500_000)
    parser.add_argument("--steps", type=int, default=6)
    arguments, words = parser.parse_known_args()
    count_all_gather()
    rank = Accelerator(cpu=True).process_index
    systems = {
        "dense": System(arguments.items, words),
        "rows": System(arguments.items, [*words, "optim.sparse_rows=1000"]),
    }
    size = dist.get_world_size() if dist.is_initialized() else 1
    for step in range(WARMUP + arguments.steps):
        batch = events(systems["dense"].config, arguments.items, 1 + step * size + rank)
        for system in systems.values():
            system.step(batch)
    if rank == 0:
        found = {name: system.report(size) for name, system in systems.items()}
        pairs = list(zip(*(system.seconds[WARMUP:] for system in systems.values()), strict=True))
        document = {
            **found,
            "faster": round(median(dense / rows for dense, rows in pairs), 2),
            "fewer_bytes": round(found["dense"]["bytes_sent"] / max(1.0, found["rows"]["bytes_sent"]), 1),
            "table": systems["rows"].size.largest_table,
            "processes": size,
            "steps": arguments.steps,
            "commit": git_commit(),
            "hardware": hardware_line(),
        }
        print(json.dumps(document))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
