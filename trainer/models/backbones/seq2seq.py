"""Encoder-decoders: the prompt goes through the encoder, one decoder position gives the answer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.backbones.backbone import GATED_TARGETS, Backbone, Prompt
from trainer.models.backbones.t5_layers import take_faster_layers


class Seq2SeqBackbone(Backbone):
    """What encoder-decoders share."""

    shared_first: ClassVar[bool] = False

    @property
    def stacks(self) -> tuple[nn.Module, nn.Module | None]:
        return self.base.get_encoder(), self.base.get_decoder()

    def answer_logits(self, prompt: Prompt, answers: Tensor) -> Tensor:
        return self._answer(*prompt.whole(shared_first=False), answers).unflatten(
            0, prompt.own_BCSD.shape[:2]
        )

    def answer_groups(self, prompts: Iterable[Prompt], answers: Tensor, in_one_pass: bool) -> list[Tensor]:
        if not in_one_pass or len(prompts := list(prompts)) == 1:
            return super().answer_groups(prompts, answers, in_one_pass)
        wholes = [prompt.whole(shared_first=False) for prompt in prompts]
        logits_MA = self._answer(*padded_to_longest(wholes), answers)
        parts = logits_MA.split([len(vectors_MSD) for vectors_MSD, _ in wholes])
        return [
            part.unflatten(0, prompt.own_BCSD.shape[:2]) for part, prompt in zip(parts, prompts, strict=True)
        ]

    def _answer(self, prompt_MSD: Tensor, mask_MS: Tensor | None, answers: Tensor) -> Tensor:
        """→ [M, A]"""
        start_M0 = torch.zeros((len(prompt_MSD), 0), dtype=torch.int64, device=prompt_MSD.device)
        hidden_M1D = self._decode(*self._encode(prompt_MSD, mask_MS), start_M0)
        return self.answer_rows(hidden_M1D[:, 0], answers)

    def reader(self, prompt: Prompt) -> Callable[[Tensor], Tensor]:
        encoded_BSD, mask = self._encode(*prompt.whole(shared_first=False))

        def read(tokens_BKL: Tensor) -> Tensor:
            number = tokens_BKL.shape[1]
            encoded_MSD = encoded_BSD.repeat_interleave(number, 0)
            of_all = mask.repeat_interleave(number, 0) if mask is not None else None
            hidden = self._decode(encoded_MSD, of_all, tokens_BKL.flatten(0, 1))
            return hidden.unflatten(0, tokens_BKL.shape[:2])

        return read

    def _encode(self, prompt_MSD: Tensor, mask_MS: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """→ the encoder's output [M, S, D] and the mask as layers take it."""
        prompt_MSD, mask_MS = self._framed(prompt_MSD, mask_MS)
        mask = self.layer_mask(mask_MS) if mask_MS is not None else None
        encoded: Tensor = self.base.get_encoder()(
            inputs_embeds=prompt_MSD, attention_mask=mask
        ).last_hidden_state
        return encoded, mask

    def _framed(self, prompt_MSD: Tensor, mask_MS: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Prompts [M, S, D] between the backbone's special tokens; padding stays behind everything."""
        begin, end = self.get_buffer("text_begin"), self.get_buffer("text_end")
        rows, num_end = len(prompt_MSD), len(end)
        if len(begin):
            prompt_MSD = torch.cat(
                [self.embed(begin).to(prompt_MSD.dtype).expand(rows, -1, -1), prompt_MSD], 1
            )
            mask_MS = F.pad(mask_MS, (len(begin), 0), value=True) if mask_MS is not None else None
        if not num_end:
            return prompt_MSD, mask_MS
        end_MXD = self.embed(end).to(prompt_MSD.dtype).expand(rows, -1, -1)  # X: the tokens at the end
        if mask_MS is None:
            return torch.cat([prompt_MSD, end_MXD], 1), None
        place_MX = mask_MS.sum(1, keepdim=True) + torch.arange(num_end, device=mask_MS.device)
        longer = F.pad(prompt_MSD, (0, 0, 0, num_end))
        framed = longer.scatter(1, place_MX[..., None].expand_as(end_MXD), end_MXD)
        return framed, F.pad(mask_MS, (num_end, 0), value=True)

    def _decode(self, encoded_MSD: Tensor, mask: Tensor | None, tokens_ML: Tensor) -> Tensor:
        """The decoder's output at its start token and at each of L tokens, [M, L + 1, D]."""
        start = self.base.config.decoder_start_token_id
        read = dict(encoder_hidden_states=encoded_MSD, encoder_attention_mask=mask, use_cache=False)
        tokens = F.pad(tokens_ML, (1, 0), value=start)
        hidden: Tensor = self.base.get_decoder()(**self.decoder_input(tokens), **read).last_hidden_state
        return hidden

    def layer_mask(self, mask_MS: Tensor) -> Tensor:
        return mask_MS

    def decoder_input(self, tokens_ML: Tensor) -> dict[str, Tensor]:
        return {"input_ids": tokens_ML}


def padded_to_longest(wholes: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Prompt.whole() of several groups, (vectors [M, S, D], mask [M, S]) each, as one, padded behind."""
    longest = max(vectors_MSD.shape[1] for vectors_MSD, _ in wholes)
    masks = [
        mask_MS if mask_MS is not None else torch.ones(v_MSD.shape[:2], dtype=torch.bool, device=v_MSD.device)
        for v_MSD, mask_MS in wholes
    ]
    vectors_MSD = torch.cat([F.pad(v_MSD, (0, 0, 0, longest - v_MSD.shape[1])) for v_MSD, _ in wholes])
    return vectors_MSD, torch.cat([F.pad(mask_MS, (0, longest - mask_MS.shape[1])) for mask_MS in masks])


class T5Backbone(Seq2SeqBackbone):
    """T5, T5 1.1, flan-t5, with the layers of t5_layers.py."""

    model_types: ClassVar[tuple[str, ...]] = ("t5",)
    lora_targets: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        take_faster_layers(self.base)

    def layer_mask(self, mask_MS: Tensor) -> Tensor:
        """Four dimensions: transformers takes such a mask as it is, without asking the device whether it
        masks anything."""
        return mask_MS[:, None, None]

    def decoder_input(self, tokens_ML: Tensor) -> dict[str, Tensor]:
        """Encoder and decoder read one table; embed() spares a gradient of its size."""
        return {"inputs_embeds": self.embed(tokens_ML)}

    def before_head(self, hidden: Tensor) -> Tensor:
        config = self.base.config
        return hidden * config.d_model**-0.5 if config.scale_decoder_outputs else hidden


class T5GemmaBackbone(Seq2SeqBackbone):
    """T5Gemma: Gemma layers, bidirectional in the encoder."""

    model_types: ClassVar[tuple[str, ...]] = ("t5gemma",)
    lora_targets: ClassVar[tuple[str, ...]] = GATED_TARGETS

    def answer_rows(self, hidden_MD: Tensor, answers: Tensor) -> Tensor:
        return self._capped(super().answer_rows(hidden_MD, answers))

    def token_logits(self, hidden: Tensor) -> Tensor:
        return self._capped(super().token_logits(hidden))

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.base.config.decoder.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)
