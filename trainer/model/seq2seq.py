"""Encoder-decoders: the prompt goes through the encoder, one decoder position gives the answer."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.models.t5.modeling_t5 import T5Attention

from trainer.model.backbone import Backbone, Prompt
from trainer.model.dropout import Dropout, dropout


class Seq2SeqBackbone(Backbone):
    """What encoder-decoders share."""

    shared_first: ClassVar[bool] = False

    @property
    def stacks(self) -> tuple[nn.Module, nn.Module | None]:
        return self.base.get_encoder(), self.base.get_decoder()

    def answer_logits(self, prompt: Prompt, answers: Tensor) -> Tensor:
        prompt_MSD, mask_MS = prompt.whole(shared_first=False)
        mask = self.layer_mask(mask_MS) if mask_MS is not None else None
        encoded_MSD = self.base.get_encoder()(inputs_embeds=prompt_MSD, attention_mask=mask).last_hidden_state
        start_M1 = torch.full((len(prompt_MSD), 1), self.base.config.decoder_start_token_id, device=prompt_MSD.device)
        read = dict(encoder_hidden_states=encoded_MSD, encoder_attention_mask=mask, use_cache=False)
        hidden_M1D = self.base.get_decoder()(**self.decoder_input(start_M1), **read).last_hidden_state
        return self.answer_rows(hidden_M1D[:, 0], answers).unflatten(0, prompt.own_BCSD.shape[:2])

    def layer_mask(self, mask_MS: Tensor) -> Tensor:
        return mask_MS

    def decoder_input(self, tokens_M1: Tensor) -> dict[str, Tensor]:
        return {"input_ids": tokens_M1}


class T5Backbone(Seq2SeqBackbone):
    """T5, T5 1.1, flan-t5. Some of its parts are replaced by ones that give the same with less work (weights and names stay)."""

    model_types: ClassVar[tuple[str, ...]] = ("t5",)
    lora_targets: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        for stack, replacement in ((self.base.get_encoder(), EncoderSelfAttention), (self.base.get_decoder(), AbsorbedCrossAttention)):
            for module in stack.modules():
                if type(module) is T5Attention and not module.is_causal:
                    module.__class__ = replacement
                elif type(module) is nn.Dropout:
                    module.__class__ = Dropout
                elif isinstance(getattr(module, "act", None), NewGELUActivation):
                    module.act = nn.GELU(approximate="tanh")  # the same formula as one kernel, not eight

    def layer_mask(self, mask_MS: Tensor) -> Tensor:
        """Four dimensions: transformers takes such a mask as it is, without asking the device whether it masks anything."""
        return mask_MS[:, None, None]

    def decoder_input(self, tokens_M1: Tensor) -> dict[str, Tensor]:
        """Encoder and decoder read one table; embed() spares a gradient of its size."""
        return {"inputs_embeds": self.embed(tokens_M1)}

    def answer_rows(self, hidden_MD: Tensor, answers: Tensor) -> Tensor:
        config = self.base.config
        return super().answer_rows(hidden_MD * config.d_model**-0.5 if config.scale_decoder_outputs else hidden_MD, answers)


class EncoderSelfAttention(T5Attention):
    """Position bias and mask become one additive mask in the first layer, which the others reuse; transformers' own builds it in every layer."""

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, position_bias: Tensor | None = None, **kwargs: Any) -> tuple[Any, ...]:
        heads = (self.n_heads, self.key_value_proj_dim)
        query, key, value = (linear(hidden_states).unflatten(2, heads).transpose(1, 2) for linear in (self.q, self.k, self.v))
        if position_bias is None:
            length = hidden_states.shape[1]
            position_bias = self.compute_bias(length, length, device=hidden_states.device).to(query.dtype)
            if mask is not None:
                position_bias = position_bias.masked_fill(~mask, torch.finfo(query.dtype).min)
            position_bias = position_bias.contiguous()
        if self.training and self.dropout and query.device.type == "cpu":  # no kernel there has dropout
            weights = torch.add(position_bias, query @ key.transpose(2, 3), alpha=self.scaling).softmax(-1)
            mixed = dropout(weights, self.dropout, True) @ value
        else:
            p = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=position_bias, dropout_p=p, scale=self.scaling)
        return self.o(mixed.transpose(1, 2).flatten(2)), position_bias, None


class AbsorbedCrossAttention(T5Attention):
    """Attention of one query position, with W_k folded into the query and W_v into the mixture: q·(W_k c) = (W_kᵀq)·c and Σ a (W_v c) = W_v Σ a c.

    The encoder's S positions are then never multiplied by W_k and W_v. Adapters on k or v, several positions and caches take transformers' way.
    """

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, key_value_states: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        plain = type(self.k) is nn.Linear and type(self.v) is nn.Linear
        if not plain or hidden_states.shape[1] != 1 or past_key_values is not None or key_value_states is None:
            parent: tuple[Any, ...] = super().forward(hidden_states, mask, key_value_states, past_key_values=past_key_values, **kwargs)
            return parent
        heads = (self.n_heads, self.key_value_proj_dim)
        query_MHd = self.q(hidden_states[:, 0]).unflatten(1, heads)
        query_MHD = torch.einsum("mhd,hdw->mhw", query_MHd, self.k.weight.unflatten(0, heads))
        scores_MHS = (query_MHD @ key_value_states.transpose(1, 2)).float() * self.scaling
        if mask is not None:
            scores_MHS = scores_MHS.masked_fill(~mask[:, 0], torch.finfo(torch.float32).min)
        weights_MHS = dropout(scores_MHS.softmax(-1), self.dropout, self.training)
        mixed_MHD = weights_MHS.to(key_value_states.dtype) @ key_value_states
        value_MHd = torch.einsum("mhw,hdw->mhd", mixed_MHD, self.v.weight.unflatten(0, heads))
        return self.o(value_MHd.flatten(1))[:, None], None, None


class T5GemmaBackbone(Seq2SeqBackbone):
    """T5Gemma: Gemma layers, bidirectional in the encoder."""

    model_types: ClassVar[tuple[str, ...]] = ("t5gemma",)
    lora_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def answer_rows(self, hidden_MD: Tensor, answers: Tensor) -> Tensor:
        logits_MA, cap = super().answer_rows(hidden_MD, answers), self.base.config.decoder.final_logit_softcapping
        return logits_MA if cap is None else cap * torch.tanh(logits_MA / cap)
