"""Decoder-only backbones: the answer stands behind the prompt's last token. What the candidates of an event
share is read once."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.models.backbones.backbone import GATED_TARGETS, Backbone, Prompt
from trainer.models.layers.norm import Norm


class DecoderBackbone(Backbone):
    """What decoders with rotary positions share. Positions count real tokens only, so padding inside a prompt
    shifts nothing."""

    shared_first: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]] = GATED_TARGETS

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # not the last norm: answers are computed from it in float32
        for layer in self.base.get_decoder().layers:
            layer.input_layernorm.__class__ = layer.post_attention_layernorm.__class__ = Norm

    @property
    def stacks(self) -> tuple[nn.Module, nn.Module | None]:
        return self.base.get_decoder(), None

    def answer_logits(self, prompt: Prompt, answers: Tensor) -> Tensor:
        hidden_MD = self._behind(prompt, 1)[:, 0]
        return self.answer_rows(hidden_MD, answers).unflatten(0, prompt.own_BCSD.shape[:2])

    def reader(self, prompt: Prompt) -> Callable[[Tensor], Tensor]:
        def read(tokens_BKL: Tensor) -> Tensor:
            num_continuations, length = tokens_BKL.shape[1:]
            text_BKSD = prompt.own_BCSD.expand(-1, num_continuations, -1, -1)
            own_BKSD = torch.cat([text_BKSD, self.embed(tokens_BKL).to(text_BKSD.dtype)], 2)
            continued = Prompt(own_BKSD, prompt.shared_BPD, prompt.shared_mask_BP)
            return self._behind(continued, length + 1).unflatten(0, tokens_BKL.shape[:2])

        return read

    def _behind(self, prompt: Prompt, length: int) -> Tensor:
        """The decoder's output at the last `length` positions of every prompt [M, length, D]."""
        prompt = self._begun(prompt)
        # transformers cannot combine gradient checkpointing with a cache
        recompute = self.training and self.base.get_decoder().gradient_checkpointing
        return self._whole(prompt, length) if recompute else self._shared_once(prompt, length)

    def _begun(self, prompt: Prompt) -> Prompt:
        """With the special tokens that texts begin with, before what the candidates share."""
        begin = self.get_buffer("text_begin")
        if not len(begin):
            return prompt
        shared_BPD, mask_BP = prompt.shared_BPD, prompt.shared_mask_BP
        first_BXD = self.embed(begin).to(shared_BPD.dtype).expand(len(shared_BPD), -1, -1)
        return replace(
            prompt,
            shared_BPD=torch.cat([first_BXD, shared_BPD], 1),
            shared_mask_BP=F.pad(mask_BP, (len(begin), 0), value=True) if mask_BP is not None else None,
        )

    def _whole(self, prompt: Prompt, length: int) -> Tensor:
        """The last positions of every prompt, each prompt read from its start."""
        vectors_MSD, mask_MS = prompt.whole(shared_first=True)
        if mask_MS is None:
            # without a cache and a mask transformers would ask the device whether several texts are packed
            # into one row
            mask_MS = torch.ones(vectors_MSD.shape[:2], dtype=torch.bool, device=vectors_MSD.device)
        return self._last_positions(vectors_MSD, mask_MS, length, use_cache=False)

    def _shared_once(self, prompt: Prompt, length: int) -> Tensor:
        """The same: the shared part's keys and values are computed once an event, then repeated for its
        candidates."""
        own_MSD, mask_BP, mask_MS = prompt.own_BCSD.flatten(0, 1), prompt.shared_mask_BP, None
        num_candidates = prompt.own_BCSD.shape[1]
        cache = DynamicCache(config=self.base.config)
        self._last_positions(prompt.shared_BPD, mask_BP, 1, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(num_candidates)
        if mask_BP is not None or prompt.own_mask_BCS is not None:
            mask_MS = prompt.whole_mask(shared_first=True)
        return self._last_positions(own_MSD, mask_MS, length, past_key_values=cache, use_cache=True)

    def _last_positions(
        self, vectors_MSD: Tensor, mask_MX: Tensor | None, length: int, **cache: Any
    ) -> Tensor:
        """The decoder's output at the last `length` of S new positions [M, length, D]; mask_MX: which of all
        X, the cached ones and the new, are real tokens."""
        masked: dict[str, Tensor] = {}
        if mask_MX is not None:
            num_new = vectors_MSD.shape[1]
            masked["position_ids"] = (mask_MX.cumsum(1) - 1).clamp(min=0)[:, -num_new:]
            masked["attention_mask"] = causal_mask(mask_MX, num_new)
        last: Tensor = self.base.get_decoder()(
            inputs_embeds=vectors_MSD, **masked, **cache
        ).last_hidden_state[:, -length:]
        return last


def causal_mask(mask_MX: Tensor, length: int) -> Tensor:
    """What each of the last `length` of X positions may look at, [M, 1, length, X] bool: itself and what is
    before it, if it is a real token.

    transformers takes four dimensions as they are; of two it asks the device whether they mask anything.
    """
    before_LX = mask_MX.new_ones(length, mask_MX.shape[1]).tril(mask_MX.shape[1] - length)
    return mask_MX[:, None, None] & before_LX


class LlamaBackbone(DecoderBackbone):
    """Llama 2 and 3, SmolLM and SmolLM2, TinyLlama: whatever calls itself llama."""

    model_types: ClassVar[tuple[str, ...]] = ("llama",)


class QwenBackbone(DecoderBackbone):
    """Qwen2, Qwen2.5 and Qwen3 (dense)."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2", "qwen3")
