"""A backbone by name: a hub name, a local folder, or `scratch:SIZE`. A new family is one class (seq2seq.py,
decoder.py), listed here, and a test."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.models.backbones.adapters import add_adapters, four_bit_config
from trainer.models.backbones.backbone import Backbone
from trainer.models.backbones.decoder import LlamaBackbone, QwenBackbone
from trainer.models.backbones.seq2seq import T5Backbone, T5GemmaBackbone

FAMILIES: tuple[type[Backbone], ...] = (T5Backbone, T5GemmaBackbone, LlamaBackbone, QwenBackbone)

_NANO = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
_NANO_DECODER = {
    **_NANO,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}
# Shapes for training from scratch; the vocabulary is the prepared folder's, or a larger one that stands here.
# flan_t5_base has the shape of google/flan-t5-base (with tied tables).
SCRATCH_SIZES: dict[str, dict[str, Any]] = {
    "nano": dict(
        model_type="t5", d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=1, num_decoder_layers=1
    ),
    "mini": dict(
        model_type="t5", d_model=128, d_ff=256, d_kv=32, num_heads=4, num_layers=2, num_decoder_layers=1
    ),
    "small": dict(
        model_type="t5", d_model=256, d_ff=512, d_kv=32, num_heads=8, num_layers=3, num_decoder_layers=2
    ),
    "flan_t5_base": dict(
        model_type="t5",
        d_model=768,
        d_ff=2048,
        d_kv=64,
        num_heads=12,
        num_layers=12,
        num_decoder_layers=12,
        vocab_size=32128,
    ),
    "llama_nano": dict(model_type="llama", **_NANO_DECODER),
    "qwen2_nano": dict(
        model_type="qwen2", **{key: value for key, value in _NANO_DECODER.items() if key != "head_dim"}
    ),
    "qwen3_nano": dict(model_type="qwen3", **_NANO_DECODER),
    "t5gemma_nano": dict(model_type="t5gemma", encoder=_NANO, decoder=_NANO),
}
# T5's own initialisation (std 1) drowns the slots when nothing is pretrained; measured on Scientific. The
# same std for every family.
SCRATCH_EMBEDDING_STD = 0.2


def build_backbone(
    name: str,
    *,
    vocab_size: int,
    dropout: float,
    lora: Any = None,
    activation_checkpointing: bool = False,
    config_only: Path | None = None,
    own_head: bool = False,
) -> Backbone:
    """A backbone by name. `config_only`: rebuild the architecture saved there, without weights (they are
    loaded afterwards); `own_head` says that its lm_head is a table of its own, as in flan-t5, which
    transformers forgets when it builds a T5 from a configuration.

    Raises ConfigError for an unknown size, a missing folder, or a family that is not supported.
    """
    from transformers import AutoConfig

    if config_only is not None:
        config = AutoConfig.from_pretrained(config_only, local_files_only=True)
        model = _from_config(config)
        if own_head:
            head = model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone())
    elif name.startswith("scratch:"):
        model = _from_scratch(name.removeprefix("scratch:"), vocab_size, dropout)
    else:
        model = _pretrained(name, lora)
    family = family_of(name, model.config)
    if model.config.is_encoder_decoder and getattr(model.config, "decoder_start_token_id", None) is None:
        first = (
            model.config.bos_token_id if model.config.model_type == "t5gemma" else model.config.pad_token_id
        )
        model.config.decoder_start_token_id = first or 0
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora is not None and lora.rank > 0:
        model = add_adapters(model, lora, family.lora_targets)
    return family(model)


def family_of(name: str, config: Any) -> type[Backbone]:
    """Raises ConfigError that lists the supported families."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    supported = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
    raise ConfigError(f"model.backbone={name}: its family is {config.model_type}. Supported: {supported}")


def _from_config(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    family_of("", config)
    return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(
        config, **_attention(config)
    )


def _attention(config: Any) -> dict[str, str]:
    """Gemma's capped attention scores are beyond sdpa."""
    return {"attn_implementation": "eager"} if config.model_type == "t5gemma" else {}


def _from_scratch(size: str, vocab_size: int, dropout: float) -> Any:
    from transformers import AutoConfig

    if size not in SCRATCH_SIZES:
        raise ConfigError(
            f"model.backbone: no size {size!r}. From scratch: "
            f"{', '.join(f'scratch:{s}' for s in SCRATCH_SIZES)}"
        )
    settings = dict(SCRATCH_SIZES[size])
    settings["vocab_size"] = vocab_size = max(vocab_size, settings.get("vocab_size", 0))
    if settings["model_type"] == "t5":
        settings |= dict(
            dropout_rate=dropout,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=True,
            decoder_start_token_id=0,
        )
    elif settings["model_type"] == "t5gemma":
        settings |= dict(
            dropout_rate=dropout,
            **{p: {"vocab_size": vocab_size, **settings[p]} for p in ("encoder", "decoder")},
        )
    else:
        settings |= dict(attention_dropout=dropout)
    model = _from_config(AutoConfig.for_model(**settings))
    with torch.no_grad():
        if settings["model_type"] == "t5":
            model.shared.weight.mul_(SCRATCH_EMBEDDING_STD)
        else:
            model.get_input_embeddings().weight.normal_(std=SCRATCH_EMBEDDING_STD)
    return model


def _pretrained(name: str, lora: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    four_bit = four_bit_config(lora)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        family_of(name, config)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto.from_pretrained(
            name, config=config, dtype=torch.float32, **four_bit, **_attention(config)
        )
    except OSError as error:
        raise ConfigError(
            f"model.backbone={name} cannot be loaded: {str(error).splitlines()[0]} "
            "Give a local folder (config.json, model.safetensors), or scratch:SIZE to train from scratch."
        ) from error
