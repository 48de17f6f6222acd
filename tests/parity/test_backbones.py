"""Backbones do less work than transformers' own forward passes and give the same: values and gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration

from trainer.errors import ConfigError
from trainer.models.backbones.adapters import keep_frozen_in_bf16, merge_adapters
from trainer.models.backbones.backbone import Backbone, Prompt
from trainer.models.backbones.families import FAMILIES, SCRATCH_SIZES, build_backbone
from trainer.models.backbones.settings import LoraConfig

DECODERS = ("scratch:llama_nano", "scratch:qwen2_nano", "scratch:qwen3_nano")
ANSWERS = torch.tensor([3, 4])


def make(name: str, **settings: object) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(name, vocab_size=40, dropout=0.0, **settings).eval()  # type: ignore[arg-type]


def prompt_of(width: int, num_events: int = 3, num_candidates: int = 4, padding: int = 2) -> Prompt:
    """Vectors of the size of tokens; the shared parts of the events differ in length."""
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(num_events, num_candidates, 7, width, generator=generator)
    shared = torch.randn(num_events, 5, width, generator=generator)
    lengths = 5 - torch.arange(num_events) % (padding + 1)
    return Prompt(own.requires_grad_(), shared.requires_grad_(), torch.arange(5) < lengths[:, None])


def run(backbone: Backbone, prompt: Prompt, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the gradients of a weighted sum of them with respect to the prompt and every weight."""
    logits = backbone.answer_logits(prompt, ANSWERS)
    leaves = [prompt.own_BCSD, prompt.shared_BPD, *(p for p in backbone.parameters() if p.requires_grad)]
    return logits.detach(), list(
        torch.autograd.grad((logits * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
    )


def assert_same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]], atol: float) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=atol)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def test_t5_equals_the_attentions_of_transformers() -> None:
    """One bias for all layers, W_k and W_v folded: within 5e-5."""
    fast = make("scratch:small")
    plain = make("scratch:small")
    reference = T5ForConditionalGeneration(plain.base.config)
    reference.load_state_dict(plain.base.state_dict())
    plain.model = reference.eval()  # its attentions are transformers' own
    assert {type(m).__name__ for m in plain.modules() if "Attention" in type(m).__name__}.isdisjoint(
        {"AbsorbedCrossAttention", "EncoderSelfAttention"}
    )
    for prompt in (
        prompt_of(256),
        Prompt(
            prompt_of(256).own_BCSD,
            torch.zeros(3, 0, 256, requires_grad=True),
            torch.ones(3, 0, dtype=torch.bool),
        ),
    ):
        weights = torch.randn(3, 4, 2)
        assert_same(run(fast, prompt, weights), run(plain, prompt, weights), 5e-5)


@pytest.mark.parametrize("name", ["scratch:nano", "scratch:llama_nano"])
def test_gradients_of_rows_add_up_to_that_of_the_table(name: str) -> None:
    """embed() gives rows, embed_mean() a whole table: what arrives at the weight is dense, and what plain
    look-ups give (1e-6)."""
    backbone, tokens, texts = make(name), torch.tensor([[5, 7], [7, 0]]), torch.tensor([[5, 9, 0], [0, 0, 0]])
    weight, towards = backbone.embedding_weight(), torch.randn(2, 64)
    (
        (backbone.embed(tokens).sum(1) + backbone.embed_mean(texts) + backbone.embed(tokens[:, 0])) * towards
    ).sum().backward()
    gradient, weight.grad = weight.grad, None
    assert gradient is not None and gradient.layout == torch.strided
    mean = weight[texts].mul(texts.ne(0)[..., None]).sum(1) / texts.ne(0).sum(1, keepdim=True).clamp(min=1)
    ((weight[tokens].sum(1) + mean + weight[tokens[:, 0]]) * towards).sum().backward()
    torch.testing.assert_close(gradient, weight.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", DECODERS)
def test_the_shared_part_read_once_equals_whole_prompts(name: str) -> None:
    backbone = make(name)
    prompt, weights = prompt_of(64), torch.randn(3, 4, 2)
    cached = run(backbone, prompt, weights)
    backbone._shared_once = backbone._whole
    assert_same(cached, run(backbone, prompt, weights), 2e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_padding_in_a_decoders_prompt_shifts_nothing(name: str) -> None:
    backbone, prompt = make(name), prompt_of(64)
    together = backbone.answer_logits(prompt, ANSWERS)
    assert prompt.shared_mask_BP is not None
    for event in range(3):
        length = int(prompt.shared_mask_BP[event].sum())
        mask = torch.ones(1, length, dtype=torch.bool)
        alone = backbone.answer_logits(
            Prompt(prompt.own_BCSD[event : event + 1], prompt.shared_BPD[event : event + 1, :length], mask),
            ANSWERS,
        )
        torch.testing.assert_close(alone[0], together[event], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["scratch:nano", "scratch:llama_nano", "scratch:t5gemma_nano"])
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    prompt, weights = prompt_of(64), torch.randn(3, 4, 2)
    assert_same(
        run(make(name).train(), prompt, weights),
        run(make(name, activation_checkpointing=True).train(), prompt, weights),
        1e-5,
    )


@pytest.mark.parametrize("name", [f"scratch:{size}" for size in SCRATCH_SIZES if size.endswith("nano")])
def test_every_family_is_listed_and_its_default_adapters_reach_all_of_its_layers(name: str) -> None:
    backbone = make(name, lora=LoraConfig(rank=2))
    assert type(backbone) in FAMILIES and backbone.width == 64
    trained = {n.split(".lora_")[0] for n, p in backbone.named_parameters() if p.requires_grad}
    matrices = {
        n.removesuffix(".base_layer.weight")
        for n, p in backbone.named_parameters()
        if n.endswith(".base_layer.weight")
    }
    assert trained == matrices and len(trained) >= 14
    plain = [
        n
        for n, m in backbone.base.named_modules()
        if type(m) is torch.nn.Linear and ".lora_" not in n and "base_layer" not in n
    ]
    assert all("lm_head" in n for n in plain), plain


@pytest.mark.parametrize("name", ["scratch:nano", "scratch:qwen2_nano", "scratch:llama_nano"])
def test_frozen_weights_in_bf16_are_what_autocast_makes_of_them(name: str) -> None:
    """Bit for bit, values and gradients, in half the bytes."""
    backbone, prompt, weights = make(name, lora=LoraConfig(rank=4)), prompt_of(64), torch.randn(3, 4, 2)
    with torch.no_grad():
        for parameter_name, parameter in backbone.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, gradients = run(backbone, prompt, weights)
        num_bytes = sum(p.nbytes for p in backbone.parameters())
        keep_frozen_in_bf16(backbone)
        assert sum(p.nbytes for p in backbone.parameters()) < 0.75 * num_bytes
        again, same_gradients = run(backbone, prompt, weights)
    assert torch.equal(logits, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients, same_gradients, strict=True))
    assert all(
        p.dtype == torch.float32
        for p in [*(p for p in backbone.parameters() if p.requires_grad), backbone.embedding_weight()]
    )


@pytest.mark.parametrize(
    "variant", [{}, {"rslora": True}, {"dora": True}, {"also_train": "embeddings, head"}]
)
@pytest.mark.parametrize("name", ["scratch:nano", "scratch:qwen3_nano"])
@torch.no_grad()
def test_merged_adapters_score_as_they_did(name: str, variant: dict[str, object]) -> None:
    backbone = make(name, lora=LoraConfig(rank=4, **variant))  # type: ignore[arg-type]
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    prompt = prompt_of(64)
    before = backbone.answer_logits(prompt, ANSWERS)
    num_parameters = sum(p.numel() for p in backbone.parameters())
    merge_adapters(backbone)
    assert sum(p.numel() for p in backbone.parameters()) < num_parameters
    torch.testing.assert_close(backbone.answer_logits(prompt, ANSWERS), before, rtol=0, atol=2e-5)


def test_which_parts_stay_trainable() -> None:
    def trainable(**lora: object) -> set[str]:
        backbone = make("scratch:llama_nano", lora=LoraConfig(rank=2, **lora))  # type: ignore[arg-type]
        return {
            n.rsplit(".", 2)[1]
            for n, p in backbone.named_parameters()
            if p.requires_grad and "lora_" not in n
        }

    assert trainable() == set()
    assert trainable(also_train="embeddings") == {"embed_tokens"}
    assert trainable(also_train="norm,input_layernorm") == {"norm", "input_layernorm"}
    assert trainable(target_modules="q_proj", also_train="v_proj") == {"v_proj"}


def test_what_cannot_be_had_is_refused_with_what_can(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"also_train=tail.*embeddings, head"):
        make("scratch:nano", lora=LoraConfig(rank=2, also_train="tail"))
    with pytest.raises(ConfigError, match=r"target_modules=nothing.*q"):
        make("scratch:nano", lora=LoraConfig(rank=2, target_modules="nothing"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(
        ConfigError, match=r"its family is gpt2\. Supported: t5, t5gemma, llama, qwen2, qwen3"
    ):
        make(str(tmp_path))
    with pytest.raises(ConfigError, match=r"scratch:llama_nano"):
        make("scratch:huge")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"four_bit=true needs"):
            make(str(tmp_path), lora=LoraConfig(rank=2, four_bit=True))


@pytest.mark.long
def test_a_compiled_backbone_gives_the_same_and_keeps_its_names() -> None:
    plain, compiled = make("scratch:nano"), make("scratch:nano")
    compiled.compile_layers()
    prompt = prompt_of(64)
    torch.testing.assert_close(
        compiled.answer_logits(prompt, ANSWERS), plain.answer_logits(prompt, ANSWERS), rtol=0, atol=2e-5
    )
    assert [name for name, _ in compiled.named_parameters()] == [name for name, _ in plain.named_parameters()]
