"""What a training step costs: bytes of memory, floating-point operations, bytes between GPUs. Pure
arithmetic; training/plan.py prints it.

Estimates. Where a constant comes from stands beside it; what was measured and what is calculated is said in
docs/RESULTS.md.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

from trainer.config import Config

GB = 1e9
T5_TOKENS = 32128
# An encoder's prompt: mean of Scientific's training batches, half searches, padding included (flan-t5's
# tokenizer). With a long query 110 and 40.
PROMPT_TOKENS = {"paper": 85, "compact": 20}
# A decoder's: read for every candidate, and once an event (task and query).
OWN_TOKENS, SHARED_TOKENS = {"paper": 54, "compact": 19}, {"paper": 56, "compact": 21}
# Bytes of activations under bf16 autocast for each token × (parameters read a token / width), which is
# proportional to what the linear maps of all layers give. flan-t5-base's shape: 4.3 are kept for the backward
# pass when attention is fused (counted by benchmarks/roofline.py), 7 is what a CPU takes with all that lives
# beside them (`gensr bench micro-batch`); in float32 twice as much.
ACTIVATION_BYTES = 7.0
FLOAT32_ACTIVATIONS = 2.0
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
    words: int = 0
    cf_tables: int = 5  # the full table and the folds of cf.holdout=crossfit
    num_negatives: int = 99
    vocab_size: int = T5_TOKENS
    source: str = ""


@dataclass(frozen=True)
class ModelSize:
    """Counts of the model that memory and time depend on."""

    total: int
    trainable: int
    width: int
    layers: int
    encoder: int  # parameters read once per prompt token
    decoder: int  # parameters read once per prompt
    cross: int = 0  # of the decoder's: W_k and W_v of the cross-attention
    shared_first: bool = False  # the backbone reads what an event's candidates share once an event


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
    backward pass has used them, whole on every rank; with LoRA these maps are bf16 themselves."""
    stage, linear = zero_stage or 0, model.encoder + model.decoder
    with_bf16, frozen = config.run.precision == "bf16", config.model.lora.rank > 0
    weights = (4.0 * model.total - (2.0 * linear if with_bf16 and frozen else 0.0)) / (
        world_size if stage == 3 else 1
    )
    gradients = 4.0 * model.trainable / (world_size if stage >= 2 else 1)
    optimizer = (8.0 if stage == 0 else 12.0) * model.trainable / (world_size if stage >= 1 else 1)
    if offload:
        optimizer, weights = 0.0, (0.0 if stage == 3 else weights)
    copies = 2.0 * linear if with_bf16 and not frozen else 0.0
    tokens = tokens_per_event(config, model) * config.optim.micro_batch_size
    activations = (
        ACTIVATION_BYTES * tokens * model.encoder / model.width * (1.0 if with_bf16 else FLOAT32_ACTIVATIONS)
    )
    if config.model.activation_checkpointing:
        activations *= 2 / model.layers + 0.05  # one layer's, and each layer's input
        copies *= 2 / model.layers
    rows = data.items * (64 * 4 * data.cf_tables + config.data.item_tokens * 4) + data.queries * 16 * 4
    return Memory(weights + copies, gradients, optimizer, activations, float(rows))


def tokens_per_event(config: Config, model: ModelSize) -> int:
    """Prompt tokens that the backbone reads for one training event, its 1 + negatives candidates together."""
    wording, num_candidates = config.model.prompt, 1 + config.data.num_negatives
    if not model.shared_first:
        return PROMPT_TOKENS[wording] * num_candidates
    return OWN_TOKENS[wording] * num_candidates + SHARED_TOKENS[wording]


def flops_per_event(config: Config, model: ModelSize, tokens: float | None = None) -> float:
    """Of one training event, all its candidates; `tokens` is what the backbone reads for it, if that was
    measured.

    Per parameter and token 2 forward, 2 backward for activations and 2 for weights that are trained. The
    decoder of an encoder-decoder sees one position; W_k and W_v of its cross-attention see the prompt when
    adapters keep them from being folded."""
    num_candidates, adapters = 1 + config.data.num_negatives, config.model.lora.rank > 0
    read = (tokens or tokens_per_event(config, model)) * (
        model.encoder + (model.cross if adapters else 0)
    ) + num_candidates * model.decoder
    return (4.0 if adapters else 6.0) * read


def measured_flops(seconds: float = 0.3, device: str = "cpu", dtype: Any = None) -> float:
    """Matrix products per second of this machine's CPU or GPU, FLOP/s; float32 unless `dtype` says otherwise."""
    import torch

    from trainer.runtime.device import wait_for

    size = 512 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    a @ a
    wait_for(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ a
        wait_for(device)
        count += 1
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
    the bytes of real steps beside these.
    """
    stage, ring = zero_stage or 0, (world_size - 1) / world_size
    if stage == 0:
        return 2 * ring * 4.0 * model.trainable
    each = 2.0 if config.run.precision == "bf16" else 4.0
    if stage == 3:
        return ring * grad_accum_steps * each * (2 * model.total + model.trainable)
    reductions = grad_accum_steps if stage == 2 else 1
    return ring * (2 * each * reductions + 4.0) * model.trainable


def efficiency(
    config: Config, model: ModelSize, zero_stage: int | None, world_size: int, grad_accum_steps: int = 1
) -> tuple[float, float]:
    """Speed of each of `world_size` H200s as a share of one alone: (nothing of the communication hidden
    behind computing, all that can be)."""
    flops = flops_per_event(config, model) * config.optim.micro_batch_size * grad_accum_steps
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
