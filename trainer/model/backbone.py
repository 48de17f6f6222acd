"""The language model behind one small interface: embed tokens, answer a prompt given as vectors.

A backbone is a hub name, a local folder, or `scratch:SIZE`. Adding a family is one class with the three methods below.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError

# d_model, d_ff, d_kv, heads, encoder layers, decoder layers. From-scratch T5s; flan_t5_base has the shape of google/flan-t5-base.
SCRATCH_SIZES: dict[str, dict[str, int]] = {
    "nano": dict(d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=1, num_decoder_layers=1),
    "mini": dict(d_model=128, d_ff=256, d_kv=32, num_heads=4, num_layers=2, num_decoder_layers=1),
    "small": dict(d_model=256, d_ff=512, d_kv=32, num_heads=8, num_layers=3, num_decoder_layers=2),
    "flan_t5_base": dict(d_model=768, d_ff=2048, d_kv=64, num_heads=12, num_layers=12, num_decoder_layers=12),
}
SCRATCH_EMBEDDING_SCALE = 0.2  # T5's own initialisation (std 1) drowns the slots when nothing is pretrained; measured on Scientific
LORA_TARGETS = {"t5": ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]}


class Seq2SeqBackbone(nn.Module):
    """T5-like encoder-decoder: the prompt goes through the encoder, one decoder step gives the answer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def base(self) -> Any:
        """The transformers model, also inside a LoRA wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def width(self) -> int:
        """D, the width of token vectors."""
        return int(self.base.config.d_model)

    def embedding_weight(self) -> Tensor:
        """[V, D] input-token embeddings, the space of E_s."""
        return self.base.get_input_embeddings().weight

    def answer_logits(self, prompt_MSD: Tensor, mask_MS: Tensor, answers: Tensor) -> Tensor:
        """Logits of the answer tokens after the prompt: [M, S, D], [M, S], [A] → [M, A] float32. One decoder position, A rows of lm_head."""
        base = self.base
        encoded = base.encoder(inputs_embeds=prompt_MSD, attention_mask=mask_MS).last_hidden_state
        start = torch.full((prompt_MSD.shape[0], 1), base.config.decoder_start_token_id, device=prompt_MSD.device, dtype=torch.long)
        hidden = base.decoder(input_ids=start, encoder_hidden_states=encoded, encoder_attention_mask=mask_MS, use_cache=False).last_hidden_state
        hidden_MD = hidden[:, 0]
        if base.config.scale_decoder_outputs:
            hidden_MD = hidden_MD * base.config.d_model**-0.5
        rows = base.lm_head.weight[answers]
        with torch.autocast(hidden_MD.device.type, enabled=False):  # which would make bf16 of this product, and ties of near scores
            return hidden_MD.float() @ rows.float().T


def build_backbone(
    name: str,
    *,
    vocab_size: int,
    dropout: float,
    lora: Any = None,
    activation_checkpointing: bool = False,
    config_only: Path | None = None,
    own_head: bool = False,
) -> Seq2SeqBackbone:
    """A backbone by name. `config_only`: rebuild the architecture saved there, without weights (they are loaded afterwards); `own_head` says that
    its lm_head is a table of its own, as in flan-t5, which transformers forgets when it builds a T5 from a configuration.

    Raises ConfigError for an unknown size, a missing folder, or a family that is not supported.
    """
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

    if config_only is not None:
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(config_only, local_files_only=True))
        if own_head:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    elif name.startswith("scratch:"):
        size = name.removeprefix("scratch:")
        if size not in SCRATCH_SIZES:
            raise ConfigError(f"model.backbone: no size {size!r}. From scratch: {', '.join(f'scratch:{s}' for s in SCRATCH_SIZES)}")
        config = T5Config(
            vocab_size=vocab_size,
            dropout_rate=dropout,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=True,
            decoder_start_token_id=0,
            **SCRATCH_SIZES[size],
        )
        model = T5ForConditionalGeneration(config)
        with torch.no_grad():
            model.shared.weight.mul_(SCRATCH_EMBEDDING_SCALE)
    else:
        model = _pretrained(name)
    if model.config.decoder_start_token_id is None:
        model.config.decoder_start_token_id = model.config.pad_token_id or 0
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora is not None and lora.rank > 0:
        model = _with_lora(model, lora)
    return Seq2SeqBackbone(model)


def _pretrained(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if not config.is_encoder_decoder:
            raise ConfigError(f"model.backbone={name}: {config.model_type} is no encoder-decoder; seq2seq backbones of the T5 family are supported")
        return AutoModelForSeq2SeqLM.from_pretrained(name, config=config, use_safetensors=None, dtype=torch.float32)
    except OSError as error:
        raise ConfigError(
            f"model.backbone={name} cannot be loaded: {str(error).splitlines()[0]} "
            "Give a local folder (config.json, model.safetensors), or scratch:SIZE to train from nothing."
        ) from error


def _with_lora(model: Any, lora: Any) -> Any:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    wanted = LORA_TARGETS["t5"] if lora.target_modules == "auto" else [t.strip() for t in lora.target_modules.split(",")]
    targets = [t for t in wanted if t in names]
    if not targets:
        raise ConfigError(f"model.lora.target_modules={lora.target_modules}: the backbone has no such modules. It has: {', '.join(sorted(names))}")
    return get_peft_model(model, PeftLoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets))
