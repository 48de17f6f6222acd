"""Decoder-only backbones: the answer stands behind the prompt's last token. What the candidates of an event share is read once."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.model.backbone import Backbone, Prompt


class DecoderBackbone(Backbone):
    """What decoders with rotary positions share. Positions count real tokens only, so padding inside a prompt shifts nothing."""

    shared_first: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    @property
    def stacks(self) -> tuple[nn.Module, nn.Module | None]:
        return self.base.get_decoder(), None

    def answer_logits(self, prompt: Prompt, answers: Tensor) -> Tensor:
        recompute = self.training and self.base.get_decoder().gradient_checkpointing  # which transformers cannot combine with a cache
        hidden_MD = self._whole(prompt) if recompute else self._shared_once(prompt)
        return self.answer_rows(hidden_MD, answers).unflatten(0, prompt.own_BCSD.shape[:2])

    def _whole(self, prompt: Prompt) -> Tensor:
        """The last position of every prompt [M, D], each prompt read from its start."""
        vectors_MSD, mask_MS = prompt.whole(shared_first=True)
        positions_MS = (mask_MS.cumsum(1) - 1).clamp(min=0)
        out = self.base.get_decoder()(inputs_embeds=vectors_MSD, attention_mask=mask_MS, position_ids=positions_MS, use_cache=False)
        last: Tensor = out.last_hidden_state[:, -1]
        return last

    def _shared_once(self, prompt: Prompt) -> Tensor:
        """The same: the shared part's keys and values are computed once an event, then repeated for its candidates."""
        decoder, mask_BP = self.base.get_decoder(), prompt.shared_mask_BP
        _, num_candidates, length, _ = prompt.own_BCSD.shape
        cache = DynamicCache(config=self.base.config)
        positions_BP = (mask_BP.cumsum(1) - 1).clamp(min=0)
        decoder(inputs_embeds=prompt.shared_BPD, attention_mask=mask_BP, position_ids=positions_BP, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(num_candidates)
        mask_MP = mask_BP.repeat_interleave(num_candidates, 0)
        mask_MS = torch.cat([mask_MP, mask_MP.new_ones(len(mask_MP), length)], 1)
        positions_MS = mask_MP.sum(1, keepdim=True) + torch.arange(length, device=mask_MP.device)
        out = decoder(
            inputs_embeds=prompt.own_BCSD.flatten(0, 1), attention_mask=mask_MS, position_ids=positions_MS, past_key_values=cache, use_cache=True
        )
        last: Tensor = out.last_hidden_state[:, -1]
        return last


class LlamaBackbone(DecoderBackbone):
    """Llama 2 and 3, SmolLM and SmolLM2, TinyLlama: whatever calls itself llama."""

    model_types: ClassVar[tuple[str, ...]] = ("llama",)


class QwenBackbone(DecoderBackbone):
    """Qwen2, Qwen2.5 and Qwen3 (dense)."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2", "qwen3")
