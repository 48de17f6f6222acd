"""Layers of T5 that give what transformers' own give, with less work. Weights and their names stay, so that
any checkpoint fits.

Under autocast the residual stream is float32 and linear maps are bf16. transformers' layers go back and forth
between the two: a norm's result is cast anew by each map that reads it, and the feed-forward's product goes
to float32 and back. Here each value is cast once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.models.t5.modeling_t5 import T5Attention, T5DenseActDense, T5DenseGatedActDense, T5LayerNorm

from trainer.models.layers.dropout import Dropout, dropout
from trainer.models.layers.norm import Norm


def take_faster_layers(t5: Any) -> None:
    """Replace the layers of a transformers T5 in place."""
    encoder, decoder = t5.get_encoder(), t5.get_decoder()
    for module in [*encoder.modules(), *decoder.modules()]:
        # not the decoder's last norm: answers are computed from it in float32
        if type(module) in REPLACEMENTS and module is not decoder.final_layer_norm:
            module.__class__ = REPLACEMENTS[type(module)]
        elif type(module) is T5Attention and not module.is_causal:
            module.__class__ = AbsorbedCrossAttention if module.is_decoder else EncoderSelfAttention
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = nn.GELU(approximate="tanh")  # the same formula as one kernel, not eight


class FeedForward(T5DenseActDense):
    def forward(self, hidden_states: Tensor) -> Tensor:
        result: Tensor = self.wo(self.dropout(self.act(self.wi(hidden_states))))
        return result


class GatedFeedForward(T5DenseGatedActDense):
    def forward(self, hidden_states: Tensor) -> Tensor:
        result: Tensor = self.wo(self.dropout(self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)))
        return result


def lacks_dropout(query: Tensor) -> bool:
    """Whether torch's fused attention has no dropout on the tensor's device."""
    return query.device.type == "cpu"


def aligned_rows(mask: Tensor) -> Tensor:
    """A contiguous copy whose rows begin at multiples of 8: else the GPU's fused kernels copy the mask in
    every layer."""
    length = mask.shape[-1]
    return F.pad(mask, (0, -length % 8)).contiguous()[..., :length]


class EncoderSelfAttention(T5Attention):
    """Position bias and mask become one additive mask in the first layer, which the others reuse;
    transformers' own builds it in every layer."""

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        heads = (self.n_heads, self.key_value_proj_dim)
        query, key, value = (
            linear(hidden_states).unflatten(2, heads).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        if position_bias is None:
            length = hidden_states.shape[1]
            position_bias = self.compute_bias(length, length, device=hidden_states.device).to(query.dtype)
            if mask is not None:
                position_bias = position_bias.masked_fill(~mask, torch.finfo(query.dtype).min)
            position_bias = aligned_rows(position_bias)
        if self.training and self.dropout and lacks_dropout(query):
            weights = torch.add(position_bias, query @ key.transpose(2, 3), alpha=self.scaling).softmax(-1)
            mixed = dropout(weights, self.dropout, True) @ value
        else:
            p = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(
                query, key, value, attn_mask=position_bias, dropout_p=p, scale=self.scaling
            )
        return self.o(mixed.transpose(1, 2).flatten(2)), position_bias, None


class AbsorbedCrossAttention(T5Attention):
    """Attention of one query position, with W_k folded into the query and W_v into the mixture:

        q·(W_k c) = (W_kᵀq)·c
        Σ a (W_v c) = W_v Σ a c

    The encoder's S positions are then never multiplied by W_k and W_v. Adapters on k or v, several positions
    and caches take transformers' way.
    """

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        plain = type(self.k) is nn.Linear and type(self.v) is nn.Linear
        if (
            not plain
            or hidden_states.shape[1] != 1
            or past_key_values is not None
            or key_value_states is None
        ):
            parent: tuple[Any, ...] = super().forward(
                hidden_states, mask, key_value_states, past_key_values=past_key_values, **kwargs
            )
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


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    T5LayerNorm: Norm,
    T5DenseActDense: FeedForward,
    T5DenseGatedActDense: GatedFeedForward,
    nn.Dropout: Dropout,
}
