"""Continuations of prompts: what reader() gives is what the whole text gives, for every family."""

import pytest
import torch

from trainer.models.backbones.backbone import Backbone, Prompt
from trainer.models.backbones.families import build_backbone

SIZES = ("nano", "t5gemma_nano", "llama_nano", "qwen2_nano", "qwen3_nano")
ANSWERS = torch.arange(50)


def made(size: str) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(f"scratch:{size}", vocab_size=50, dropout=0.0).eval()


def prompt_of(backbone: Backbone, candidates: int = 1, padding: int = 0) -> Prompt:
    """Two events; the second one's shared part is shorter by two tokens."""
    generator = torch.Generator().manual_seed(1)
    own = torch.randint(1, 50, (2, candidates, 3), generator=generator)
    shared = torch.randint(1, 50, (2, 5), generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    shared = torch.nn.functional.pad(shared, (0, padding), value=7)
    mask = torch.nn.functional.pad(mask, (0, padding), value=False)
    return Prompt(backbone.embed(own), backbone.embed(shared), mask)


@pytest.mark.parametrize("size", SIZES)
def test_a_continuation_without_tokens_is_the_answer(size: str) -> None:
    backbone = made(size)
    with torch.no_grad():
        prompt = prompt_of(backbone)
        hidden = backbone.reader(prompt)(torch.zeros((2, 1, 0), dtype=torch.int64))
        expected = backbone.answer_logits(prompt, ANSWERS)
        torch.testing.assert_close(backbone.token_logits(hidden[:, :, 0]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_each_position_knows_what_is_before_it_only(size: str) -> None:
    backbone = made(size)
    tokens = torch.randint(1, 50, (2, 3, 4), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = backbone.reader(prompt_of(backbone))(tokens)
        padded = backbone.reader(prompt_of(backbone, padding=3))
        assert whole.shape[:3] == (2, 3, 5)
        for length in range(5):
            for row in range(3):
                alone = padded(tokens[:, row : row + 1, :length])[:, 0, -1]
                torch.testing.assert_close(alone, whole[:, row, length], atol=1e-4, rtol=0)


def test_t5_spells_as_transformers_does() -> None:
    backbone = made("nano")
    prompt, tokens = prompt_of(backbone), torch.randint(1, 50, (2, 1, 4))
    vectors, mask = prompt.whole(shared_first=False)
    with torch.no_grad():
        ours = backbone.token_logits(backbone.reader(prompt)(tokens[..., :-1]))[:, 0]
        theirs = backbone.base(inputs_embeds=vectors, attention_mask=mask, labels=tokens[:, 0]).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_padding_of_a_candidates_own_part_changes_nothing(size: str) -> None:
    backbone = made(size)
    with torch.no_grad():
        prompt = prompt_of(backbone, candidates=2)
        last, noise = prompt.own_BCSD[:, :, -1:], torch.randn(2, 2, 3, backbone.width)
        mask = torch.tensor([True, True, False, False, False, True]).expand(2, 2, -1)
        padded = torch.cat([prompt.own_BCSD[:, :, :-1], noise, last], 2)
        ours = backbone.answer_logits(Prompt(padded, prompt.shared_BPD, prompt.shared_mask_BP, mask), ANSWERS)
        expected = backbone.answer_logits(prompt, ANSWERS)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
