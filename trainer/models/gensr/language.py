"""The language model of a GenSR: a new one by name, or the one whose weights a saved model holds."""

from pathlib import Path

from trainer.errors import DataError
from trainer.models.backbones.adapters import keep_frozen_in_bf16
from trainer.models.backbones.backbone import Backbone
from trainer.models.backbones.families import build_backbone
from trainer.models.backbones.known import architecture, is_tied
from trainer.models.contract import World
from trainer.models.gensr.settings import GenSRSettings


def backbone_of(settings: GenSRSettings, world: World) -> Backbone:
    """A new model: weights and tokenizer belong together, or DataError. World.saved: its architecture alone,
    the weights are loaded afterwards (with LoRA on a pretrained backbone, its frozen weights by name)."""
    lora = settings.lora if settings.lora.rank else None
    if world.tokenizer is None:  # sizes only: no weights, no network
        with architecture(settings.backbone) as config_only:
            return build_backbone(
                settings.backbone,
                vocab_size=world.vocab_size,
                dropout=0.0,
                lora=lora,
                config_only=config_only,
                own_head=not is_tied(settings.backbone),
            )
    if world.saved is not None:
        adapters_only = keeps_adapters_only(settings)
        return build_backbone(
            settings.backbone,
            vocab_size=world.vocab_size,
            dropout=settings.dropout,
            lora=lora,
            config_only=None if adapters_only else world.saved / "backbone",
            own_head=_has_own_head(world.saved),
        )
    backbone = build_backbone(
        settings.backbone,
        vocab_size=world.vocab_size,
        dropout=settings.dropout,
        lora=lora,
        activation_checkpointing=settings.activation_checkpointing,
    )
    if world.vocab_size > backbone.vocab_size:
        raise DataError(
            f"{world.data.dir}: its tokenizer has {world.vocab_size} tokens, backbone {settings.backbone} "
            "embeds "
            f"{backbone.vocab_size}. "
            f"Prepare the folder with the backbone's own tokenizer: tokenizer={settings.backbone}"
        )
    if lora is not None and world.precision == "bf16" and not lora.four_bit:
        keep_frozen_in_bf16(backbone)
    if settings.compile:
        backbone.compile_layers()
    return backbone


def keeps_adapters_only(settings: GenSRSettings) -> bool:
    """Whether RUN/model leaves the frozen backbone out: with LoRA, unless the backbone was made from scratch
    and exists nowhere else."""
    return settings.lora.rank > 0 and not settings.backbone.startswith("scratch:")


def _has_own_head(saved: Path) -> bool:
    """Whether the output table is one of its own, as in flan-t5: transformers forgets it when it builds a T5
    from a configuration."""
    from safetensors import safe_open

    with safe_open(str(saved / "model.safetensors"), framework="pt") as file:
        return any(name.endswith("lm_head.weight") for name in file.keys())  # noqa: SIM118 (no mapping)
