"""What a training step costs: bytes of memory, floating-point operations, bytes between GPUs. Pure
arithmetic; training/plan.py prints it.

Estimates. Where a constant comes from stands beside it; what was measured and what is calculated is said in
docs/RESULTS.md.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

from trainer.config import Config
from trainer.models.backbones.known import T5_TOKENS
from trainer.models.contract import Cost

GB = 1e9
H200_FLOPS = 790e12  # bf16 matrix products, as measured elsewhere
ASSUMED_FLOPS = {"H200 (40 % of 790 TFLOP/s)": 0.4 * H200_FLOPS, "A100 (40 % of 312 TFLOP/s)": 125e12}
CPU_EFFICIENCY = 0.3  # of this machine's measured matmul rate
# Bytes a second that a collective moves on each GPU (NCCL's bus bandwidth), assumed at two thirds of the
# link: NVLink of H100 and H200 inside a node (450 GB/s a direction), one 400 Gb/s adapter a GPU between
# nodes, eight of which share a node's traffic.
GPUS_A_NODE = 8
BYTES_PER_S = {"inside a node": 300e9, "between nodes": 8 * 33e9}
# share of a GPU that the calculated memory may take: fragmentation, NCCL and the CUDA context take the rest
MICRO_BATCH_MEMORY = 0.85


@dataclass(frozen=True)
class DataSize:
    """Counts of a prepared folder that memory and time depend on."""

    train_events: int
    valid_events: int
    items: int
    queries: int
    users: int = 0
    words: int = 0
    categories: int = 0
    cf_tables: int = 5  # the full table and the folds of cf.holdout=crossfit
    num_negatives: int = 99
    vocab_size: int = T5_TOKENS
    source: str = ""


@dataclass(frozen=True)
class ModelSize:
    """Counts of the model that memory and time depend on."""

    total: int
    trainable: int
    cost: Cost
    needs: frozenset[str] = frozenset()
    largest_table: tuple[int, int] = (0, 0)  # of items or users: rows, width
    by_rows: tuple[tuple[int, int], ...] = ()  # rows and width of the tables of optim.sparse_rows

    @property
    def counts_activations(self) -> bool:
        """False for a model that gives no cost(): its parameters alone are counted."""
        return self.cost.activation_bytes > 0

    @property
    def num_by_rows(self) -> int:
        """Parameters that only optim.sparse_rows trains."""
        return sum(rows * width for rows, width in self.by_rows)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    tables: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.tables


def memory(
    config: Config,
    model: ModelSize,
    data: DataSize,
    zero_stage: int | None,
    world_size: int,
    offload: bool = False,
) -> Memory:
    """Of one GPU. Weights are float32 (bf16 is autocast), so without DeepSpeed 4 + 4 + 8 = 16 bytes a trained
    parameter; ZeRO adds a float32 copy of its partition (4) to AdamW's two moments (8), and divides optimizer
    (1), gradients (2) and weights (3) by the ranks. Autocast's bf16 copies of the linear maps live until the
    backward pass has used them, whole on every rank; with LoRA these maps are bf16 themselves. A table of
    optim.sparse_rows has no gradient to speak of, and lies with both moments on every rank: 4 + 8 bytes."""
    stage, cost, rows = zero_stage or 0, model.cost, model.num_by_rows
    total, trainable = model.total - rows, model.trainable - rows
    weights = (4.0 * total - cost.saved_bytes) / (world_size if stage == 3 else 1)
    gradients = 4.0 * trainable / (world_size if stage >= 2 else 1)
    optimizer = (8.0 if stage == 0 else 12.0) * trainable / (world_size if stage >= 1 else 1)
    if offload:
        optimizer, weights = 0.0, (0.0 if stage == 3 else weights)
    activations = cost.activation_bytes * config.optim.micro_batch_size
    return Memory(
        weights + cost.cast_bytes + 4.0 * rows,
        gradients,
        optimizer + 8.0 * rows,
        activations,
        table_bytes(config, model, data),
    )


def table_bytes(config: Config, model: ModelSize, data: DataSize) -> float:
    """Of the look-up tables that the model needs, on each device."""
    cf = data.items * 64 * 4 * data.cf_tables if "cf" in model.needs else 0
    text = data.items * config.data.item_tokens * 4 if "item_text" in model.needs else 0
    return float(cf + text + data.queries * 16 * 4)


def measured_flops(seconds: float = 0.3, device: str = "cpu", dtype: Any = None) -> float:
    """Matrix products of this machine's CPU or GPU, FLOP/s; float32 unless `dtype` says otherwise."""
    import torch

    from trainer.runtime.device import wait_for

    size = 512 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    a @ a
    wait_for(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(10):  # a wait after each of a GPU's products of a millisecond would slow it
            a @ a
        wait_for(device)
        count += 10
    return 2 * size**3 * count / (time.perf_counter() - start)


# ---- several GPUs ------------------------------------------------------------------------------------------


def bytes_sent(
    config: Config, model: ModelSize, zero_stage: int | None, world_size: int, grad_accum_steps: int = 1
) -> float:
    """Bytes that each GPU sends in one optimizer step. Ring algorithms: a reduction or a gathering of X bytes
    sends X·(n−1)/n, an all-reduce twice that.

    No ZeRO: gradients are all-reduced. ZeRO-1 and 2: so they are (2: after every micro-batch; DeepSpeed
    all-reduces there, too), and updated weights are gathered. ZeRO-3: weights are gathered in the forward and
    in the backward pass of every micro-batch, gradients reduced. Under bf16 DeepSpeed reduces gradients in
    bf16, ZeRO-1 and 2 gather weights in float32; DDP reduces in float32. benchmarks/communication.py counts
    the bytes of real steps beside these. Of tables of optim.sparse_rows every rank's rows are gathered, at
    most (row, gradient) of all that it reads.
    """
    stage, ring = zero_stage or 0, (world_size - 1) / world_size
    total, trainable = model.total - model.num_by_rows, model.trainable - model.num_by_rows
    of_rows = (world_size - 1) * sum(
        min(rows, rows_read(config, world_size)) * 4.0 * (1 + width) for rows, width in model.by_rows
    )
    if stage == 0:
        return of_rows + 2 * ring * 4.0 * trainable
    each = 2.0 if config.run.precision == "bf16" else 4.0
    if stage == 3:
        return of_rows + ring * grad_accum_steps * each * (2 * total + trainable)
    reductions = grad_accum_steps if stage == 2 else 1
    return of_rows + ring * (2 * each * reductions + 4.0) * trainable


def rows_read(config: Config, world_size: int) -> int:
    """Of a table of items, by each rank in a step, at most: the histories and candidates of its events. (A
    loss may draw more: SASRec's bce has one item a step of the history.)"""
    data, optim = config.data, config.optim
    return optim.global_batch_size // world_size * (data.history_max + 1 + data.num_negatives)


def efficiency(
    config: Config, model: ModelSize, zero_stage: int | None, world_size: int, grad_accum_steps: int = 1
) -> tuple[float, float]:
    """Speed of each of `world_size` H200s as a share of one alone: (nothing of the communication hidden
    behind computing, all that can be)."""
    flops = model.cost.flops * config.optim.micro_batch_size * grad_accum_steps
    computing_s = flops / next(iter(ASSUMED_FLOPS.values()))
    link = BYTES_PER_S["inside a node" if world_size <= GPUS_A_NODE else "between nodes"]
    talking_s = bytes_sent(config, model, zero_stage, world_size, grad_accum_steps) / link
    return computing_s / (computing_s + talking_s), computing_s / max(computing_s, talking_s)


def largest_micro_batch(
    config: Config,
    model: ModelSize,
    data: DataSize,
    zero_stage: int | None,
    world_size: int,
    memory_bytes: float,
) -> int:
    """The largest optim.micro_batch_size, among those that divide a rank's share of the global batch, that is
    calculated to fit; 0 when none does."""
    share = config.optim.global_batch_size // world_size
    for size in sorted((n for n in range(1, share + 1) if share % n == 0), reverse=True):
        tried = replace(config, optim=replace(config.optim, micro_batch_size=size))
        if memory(tried, model, data, zero_stage, world_size).total <= MICRO_BATCH_MEMORY * memory_bytes:
            return size
    return 0
