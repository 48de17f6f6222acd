"""Settings of a model that holds a language model. Read without torch."""

from data_shards import settings as s
from trainer.config import Fraction, ModelSettings, NonNegative, Positive


@s.settings
class BackboneSettings(ModelSettings):
    backbone: str = "scratch:mini"
    """hub name, local folder, or scratch:SIZE (trainer/models/backbones/families.py)"""
    dropout: Fraction = 0.1
    """dropout of a backbone from scratch"""
    activation_checkpointing: bool = False
    """recompute the backbone's activations in the backward pass: less memory, about a third more time"""


@s.settings
class LoraConfig:
    rank: NonNegative = 0
    """0 trains the whole backbone"""
    alpha: Positive = 16
    """LoRA scale is alpha / rank"""
    dropout: Fraction = 0.05
    """dropout on the adapter's input"""
    target_modules: str = "auto"
    """comma-separated module names, or auto: sound defaults for the backbone's family"""
    rslora: bool = False
    """scale by alpha / √rank instead of alpha / rank (rsLoRA)"""
    dora: bool = False
    """learn direction and magnitude apart (DoRA): a little better at small ranks, slower"""
    four_bit: bool = False
    """frozen weights in 4 bits (QLoRA); needs bitsandbytes and a CUDA device, and a ZeRO stage below 3"""
    also_train: str = ""
    """parts of the backbone trained whole beside the adapters, comma-separated: embeddings, head, or module
    names"""


@s.settings
class AdapterSettings(BackboneSettings):
    lora: LoraConfig = LoraConfig()
