"""What prompts cost a training event. Estimates: where a constant comes from stands beside it; what was
measured and what is calculated is said in docs/RESULTS.md."""

import re
from dataclasses import dataclass
from typing import Any

from trainer.models.contract import Cost, numel

# Bytes of activations under bf16 autocast for each token × (parameters read a token / width), which is
# proportional to what the linear maps of all layers give. flan-t5-base's shape: 4.3 are kept for the backward
# pass when attention is fused (counted by benchmarks/roofline.py), 7 is what a CPU takes with all that lives
# beside them (`gensr bench micro-batch`); in float32 twice as much.
ACTIVATION_BYTES = 7.0
FLOAT32_ACTIVATIONS = 2.0
CROSS_KEYS = re.compile(r"(EncDecAttention|cross_attn)\.(k|v|k_proj|v_proj)\.")


@dataclass(frozen=True)
class BackboneSize:
    """Counts of the backbone that memory and time depend on."""

    width: int
    layers: int
    encoder: int  # parameters read once per prompt token
    decoder: int  # parameters read once per prompt
    cross: int = 0  # of the decoder's: W_k and W_v of the cross-attention
    shared_first: bool = False  # it reads what an event's candidates share once an event


def backbone_size(backbone: Any) -> BackboneSize:
    """Of a backbone on any device, meta included."""
    every_token, once = backbone.stacks
    cross = (
        [numel(p) for name, p in once.named_parameters() if CROSS_KEYS.search(name)]
        if once is not None
        else []
    )
    return BackboneSize(
        width=backbone.width,
        layers=len(every_token.block if hasattr(every_token, "block") else every_token.layers),
        encoder=_read_once_a_token(every_token),
        decoder=_read_once_a_token(once) if once is not None else 0,
        cross=sum(cross),
        shared_first=backbone.shared_first,
    )


def prompts_cost(model: Any, tokens: int) -> Cost:
    """Of an AdapterRanker. tokens: what the backbone reads for one training event, all its candidates."""
    world, settings, size = model.world, model.settings, backbone_size(model.backbone)
    num_candidates, with_bf16 = 1 + world.data.num_negatives, world.precision == "bf16"
    activations = (
        ACTIVATION_BYTES * tokens * size.encoder / size.width * (1.0 if with_bf16 else FLOAT32_ACTIVATIONS)
    )
    adapters, half = settings.lora.rank > 0, 2.0 * (size.encoder + size.decoder) if with_bf16 else 0.0
    copies = 0.0 if adapters else half
    if settings.activation_checkpointing:
        activations *= 2 / size.layers + 0.05  # one layer's, and each layer's input
        copies *= 2 / size.layers
    flops = flops_per_event(settings, size, num_candidates, tokens)
    return Cost(flops, activations, copies, half if adapters else 0.0)


def flops_per_event(settings: Any, size: BackboneSize, num_candidates: int, tokens: float) -> float:
    """Of one training event, all its candidates; `tokens` is what the backbone reads for it.

    Per parameter and token 2 forward, 2 backward for activations and 2 for weights that are trained. The
    decoder of an encoder-decoder sees one position; W_k and W_v of its cross-attention see the prompt when
    adapters keep them from being folded."""
    adapters = settings.lora.rank > 0
    read = tokens * (size.encoder + (size.cross if adapters else 0)) + num_candidates * size.decoder
    return (4.0 if adapters else 6.0) * read


def _read_once_a_token(stack: Any) -> int:
    return sum(numel(p) for name, p in stack.named_parameters() if "embed_tokens" not in name)
