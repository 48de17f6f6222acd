"""Layers beside transformers' own: the same values and gradients, fewer casts and less memory."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import (
    T5DenseActDense,
    T5DenseGatedActDense,
    T5ForConditionalGeneration,
    T5LayerNorm,
)

from trainer.models.backbones.t5_layers import FeedForward, GatedFeedForward, take_faster_layers
from trainer.models.layers.norm import Norm, rms_norm

CONFIG = T5Config(
    vocab_size=50,
    d_model=32,
    d_ff=64,
    d_kv=8,
    num_heads=4,
    num_layers=3,
    num_decoder_layers=3,
    dropout_rate=0.0,
    feed_forward_proj="gated-gelu",
    decoder_start_token_id=0,
)


def plain_layer(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = T5LayerNorm(CONFIG.d_model) if kind is T5LayerNorm else kind(CONFIG)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def results(layer: nn.Module, bf16: bool) -> list[Tensor]:
    """Output in float32, and the gradients of input and weights."""
    torch.manual_seed(1)
    x = (3 * torch.randn(5, 7, CONFIG.d_model)).requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        out = layer(x)
    out.float().square().sum().backward()
    return [
        out.detach().float(),
        *(tensor.grad.clone() for tensor in (x, *layer.parameters()) if tensor.grad is not None),
    ]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("kind", "faster"),
    [(T5LayerNorm, Norm), (T5DenseActDense, FeedForward), (T5DenseGatedActDense, GatedFeedForward)],
)
def test_layers_equal_those_of_transformers(
    kind: type[nn.Module], faster: type[nn.Module], bf16: bool
) -> None:
    layer = plain_layer(kind)
    expected = results(layer, bf16)
    layer.__class__ = faster
    # a norm's result is rounded to bf16 here, in the map that reads it there
    tolerance = 1e-5 if not bf16 else 2**-7 if faster is Norm else 0.0
    for ours, theirs in zip(results(layer, bf16), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def test_the_norms_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (8,), weight, 1e-6))
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))


def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = T5ForConditionalGeneration(CONFIG)
    faster = copy.deepcopy(plain)
    take_faster_layers(faster)
    return plain, faster


def loss_of(t5: Any, bf16: bool) -> Tensor:
    torch.manual_seed(2)
    vectors = torch.randn(6, 11, CONFIG.d_model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits: Tensor = t5(
            inputs_embeds=vectors, decoder_input_ids=torch.zeros(6, 1, dtype=torch.long)
        ).logits
    return logits.float().square().mean()


def test_under_autocast_gradients_are_as_near_to_float32s_as_with_transformers_layers() -> None:
    """Casting once must not cost precision: the error of all gradients together, relative to float32, is at
    most a tenth larger."""
    errors = []
    for t5 in pair():
        gradients = []
        for bf16 in (False, True):
            t5.zero_grad()
            loss_of(t5, bf16).backward()
            gradients.append(
                torch.cat(
                    [parameter.grad.flatten() for parameter in t5.parameters() if parameter.grad is not None]
                )
            )
        errors.append(float((gradients[1] - gradients[0]).norm() / gradients[0].norm()))
    theirs, ours = errors
    assert 0 < ours < 1.1 * theirs < 0.1, errors


def test_under_autocast_less_is_kept_for_the_backward_pass() -> None:
    kept = []
    for t5 in pair():
        weights = {parameter.untyped_storage().data_ptr() for parameter in t5.parameters()}
        storages: dict[int, Tensor] = {}

        def keep(
            tensor: Tensor, weights: set[int] = weights, storages: dict[int, Tensor] = storages
        ) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_of(t5.train(), bf16=True)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))
    theirs, ours = kept
    assert ours < 0.85 * theirs, kept
