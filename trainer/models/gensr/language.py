"""The language model of a GenSR: a new one by name, or the one whose weights a saved model holds."""

from trainer.models.backbones.adapters import keep_frozen_in_bf16
from trainer.models.backbones.backbone import Backbone
from trainer.models.backbones.language import adapters_only, language_model
from trainer.models.contract import World
from trainer.models.gensr.settings import GenSRSettings


def backbone_of(settings: GenSRSettings, world: World) -> Backbone:
    """language_model() as the settings have it: frozen weights in bf16, layers compiled."""
    lora = settings.lora
    backbone = language_model(settings, world, lora)
    if world.saved is not None or world.tokenizer is None:
        return backbone
    if lora.rank and world.precision == "bf16" and not lora.four_bit:
        keep_frozen_in_bf16(backbone)
    if settings.compile:
        backbone.compile_layers()
    return backbone


def keeps_adapters_only(settings: GenSRSettings) -> bool:
    """Whether RUN/model leaves the frozen backbone out."""
    return adapters_only(settings.backbone, settings.lora)
