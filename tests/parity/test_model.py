"""GenSR against slow, obvious versions of its equations, and the invariances a ranking model must have."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.schema import REC, SRC, read_manifest
from tests.tiny_folder import make_tiny_folder
from trainer.batch import Batch
from trainer.config import Config
from trainer.configs import load_config
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.models.backbones.backbone import Prompt
from trainer.models.contract import GatherRows, Ranks
from trainer.models.gensr.grouping import in_one_pass
from trainer.models.gensr.history import HistoryEncoder, SoftFilter
from trainer.models.gensr.model import GenSR
from trainer.models.losses import answer_loss, contrastive_loss
from trainer.runs.weights import build_model
from trainer.runs.world import load_tokenizer

OVERRIDES = [
    "model.backbone=scratch:nano",
    "data.item_tokens=8",
    "data.history_tokens=4",
    "data.history_max=6",
    "model.dropout=0.1",
]

BACKBONES = ("scratch:nano", "scratch:llama_nano", "scratch:qwen3_nano", "scratch:t5gemma_nano")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny"))


def make(folder: Path, variant: str = "extended", *overrides: str) -> tuple[GenSR, Batch, Config]:
    torch.manual_seed(0)
    config = load_config(None, [*OVERRIDES, f"model.variant={variant}", *overrides])
    read_manifest(folder)
    tables = PreparedFolder.at(folder).tables(GenSR.needs, with_folds=True)
    model = build_model(config, PreparedFolder.at(folder), tables).eval()
    batch = next(iter(EvalStream(PreparedFolder.at(folder), "valid", config.data, batch_size=12)))
    assert isinstance(model, GenSR)
    assert {REC, SRC} <= set(batch.task.tolist())
    return model, batch, config


@torch.no_grad()
def scores(model: GenSR, batch: Batch) -> Tensor:
    return model.score(batch)


# ---- Eqs. 5 and 6 ------------------------------------------------------------------------------------------


def test_soft_filter_equals_a_double_loop() -> None:
    torch.manual_seed(1)
    width, heads = 8, 2
    soft_filter = SoftFilter(width, heads).double()
    candidates, history = torch.randn(3, 5, width).double(), torch.randn(3, 4, width).double()
    mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    result = soft_filter(candidates, history, mask)
    half = width // heads
    for b in range(3):
        for c in range(5):
            if not mask[b].any():
                assert torch.equal(result[b, c], soft_filter.no_history)
                continue
            query, expected = soft_filter.query(candidates[b, c]), torch.zeros(width).double()
            for j in range(4):
                if not mask[b, j]:
                    continue
                weight = 0.0
                for h in range(heads):
                    part = slice(h * half, (h + 1) * half)
                    logits = [
                        query[part] @ soft_filter.key(history[b, k])[part] / half**0.5
                        for k in range(4)
                        if mask[b, k]
                    ]
                    own = query[part] @ soft_filter.key(history[b, j])[part] / half**0.5
                    weight += (own.exp() / torch.stack(logits).exp().sum()).item() / heads
                expected = expected + weight * (soft_filter.value.weight @ history[b, j])
            # the weights are float32 by design
            torch.testing.assert_close(result[b, c], expected, rtol=0, atol=1e-6)


def test_history_weights_sum_to_one_and_ignore_padding() -> None:
    torch.manual_seed(2)
    soft_filter = SoftFilter(8, 2)
    mask = torch.tensor([[True, True, False]])
    weights = soft_filter.weights(torch.randn(1, 4, 8), torch.randn(1, 3, 8), mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4))
    assert (weights[..., 2] == 0).all()


def test_history_encoder_masks_padding() -> None:
    torch.manual_seed(3)
    encoder = HistoryEncoder(8, 2, 0.0, 6, ordered=True).eval()
    for parameter in encoder.parameters():  # it starts as the identity
        torch.nn.init.normal_(parameter)
    items = torch.randn(1, 6, 8)
    tasks = torch.zeros(1, 6, dtype=torch.long)
    mask = torch.tensor([[True] * 3 + [False] * 3])
    changed = items.clone()
    changed[:, 3:] = 100.0
    with torch.no_grad():
        torch.testing.assert_close(encoder(items, tasks, mask)[:, :3], encoder(changed, tasks, mask)[:, :3])


# ---- invariances -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("variant", ["paper", "extended"])
def test_many_candidates_at_once_equal_one_by_one(folder: Path, variant: str, backbone: str) -> None:
    model, batch, _ = make(folder, variant, f"model.backbone={backbone}")
    together = scores(model, batch)
    for candidate in (0, 17, 99):
        alone = scores(
            model, batch.with_candidates(batch.candidates[:, [candidate]], batch.labels[:, [candidate]])
        )
        torch.testing.assert_close(alone[:, 0], together[:, candidate], rtol=0, atol=2e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("variant", ["paper", "extended"])
def test_batch_composition_and_padding_do_not_change_a_score(
    folder: Path, variant: str, backbone: str
) -> None:
    model, batch, _ = make(folder, variant, f"model.backbone={backbone}")
    together = scores(model, batch)
    for row in range(batch.num_events):
        torch.testing.assert_close(
            scores(model, batch.rows(row, row + 1))[0], together[row], rtol=0, atol=2e-5
        )
    tables = model.tables
    # longer padding behind every query
    model.set_tables(replace(tables, query_tokens=torch.nn.functional.pad(tables.query_tokens, (0, 5))))
    torch.testing.assert_close(scores(model, batch), together, rtol=0, atol=2e-5)


def test_candidate_order_does_not_matter(folder: Path) -> None:
    model, batch, _ = make(folder)
    order = torch.randperm(batch.candidates.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = scores(model, batch.with_candidates(batch.candidates[:, order], batch.labels[:, order]))
    torch.testing.assert_close(shuffled, scores(model, batch)[:, order], rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", ["paper", "extended"])
def test_a_user_without_history_scores(folder: Path, variant: str) -> None:
    model, batch, _ = make(folder, variant)
    empty = replace(batch, history_mask=torch.zeros_like(batch.history_mask))
    model.train()
    result = model.score(empty)
    assert torch.isfinite(result).all()
    result.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_query_matters_in_search_only(folder: Path) -> None:
    model, batch, _ = make(folder)
    other = replace(
        batch,
        query=torch.where(
            batch.query >= 0, (batch.query + 1) % model.tables.query_tokens.shape[0], batch.query
        ),
    )
    moved = (scores(model, other) - scores(model, batch)).abs().amax(1)
    assert (moved[batch.task == SRC] > 0).all() and (moved[batch.task == REC] == 0).all()


def test_an_event_reads_the_table_that_did_not_see_its_click_in_training_only(folder: Path) -> None:
    model, batch, _ = make(folder)
    items, folds = batch.candidates[:2], torch.tensor([1, -1])
    assert torch.equal(model.cf_vectors(items, folds), model.tables.cf[items])
    model.train()
    held_out = model.cf_vectors(items, folds)
    assert torch.equal(held_out[0], model.tables.cf_folds[1][items[0]]) and torch.equal(
        held_out[1], model.tables.cf[items[1]]
    )


# ---- the answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("variant", ["paper", "extended"])
def test_answer_probability_equals_generate(folder: Path, variant: str, backbone: str) -> None:
    """P(Yes) under decoding constrained to {Yes, No}, from transformers' own generate, is the sigmoid of our
    score."""
    model, batch, _ = make(folder, variant, f"model.backbone={backbone}")
    prompts: list[Prompt] = []
    original = model.backbone.answer_logits

    def spy(prompt: Prompt, answers: Tensor) -> Tensor:
        prompts.append(prompt)
        return original(prompt, answers)

    model.backbone.answer_logits = spy  # type: ignore[method-assign]
    few = batch.with_candidates(batch.candidates[:, :3], batch.labels[:, :3])
    ours = scores(model, few).sigmoid()
    yes, no = model.answers
    for task, prompt in zip((REC, SRC), prompts, strict=True):
        vectors, mask = prompt.whole(model.backbone.shared_first)
        mask = torch.ones(vectors.shape[:2]) if mask is None else mask
        out = model.backbone.base.generate(
            inputs_embeds=vectors,
            attention_mask=mask.long(),
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_scores=True,
            prefix_allowed_tokens_fn=lambda *_: [yes, no],
        )
        generated = out.scores[0].softmax(-1)[:, yes].view(-1, 3)
        torch.testing.assert_close(ours[few.task == task], generated, rtol=0, atol=1e-5)


# ---- losses ------------------------------------------------------------------------------------------------


def test_answer_loss_is_the_negative_log_likelihood_of_the_answer() -> None:
    logits = torch.randn(4, 3, 2)  # yes, no
    labels = torch.tensor([[1.0, 0, 0]] * 4)
    weights = torch.tensor([1.0, 1.0, 2.0, 2.0])
    log_p = logits.log_softmax(-1)
    expected = (
        sum(weights[b] * -log_p[b, c, 0 if labels[b, c] else 1] for b in range(4) for c in range(3)) / 12
    )
    torch.testing.assert_close(answer_loss(logits[..., 0] - logits[..., 1], labels, weights), expected)


def test_contrastive_loss_equals_a_double_loop_without_same_user_negatives() -> None:
    torch.manual_seed(0)
    cf, sem, users = torch.randn(5, 6), torch.randn(5, 6), torch.tensor([3, 7, 3, -1, -1])
    tau, total = 0.5, 0.0
    for first, second in ((cf, sem), (sem, cf)):
        for i in range(5):
            similar = [
                torch.cosine_similarity(first[i], second[j], dim=0) / tau
                for j in range(5)
                if i == j or users[i] != users[j] or users[i] < 0
            ]
            own = torch.cosine_similarity(first[i], second[i], dim=0) / tau
            total += float(torch.stack(similar).logsumexp(0) - own) / 10
    assert contrastive_loss(cf, sem, users, tau).item() == pytest.approx(total, abs=1e-5)


def test_contrastive_loss_leaves_out_rows_without_history_as_a_double_loop_does() -> None:
    """Row 1 has no history and row 4 a view of length 0: neither counts, nor is it a negative."""
    torch.manual_seed(0)
    cf, sem, users = torch.randn(6, 6), torch.randn(6, 6), torch.tensor([3, 7, 3, 1, 2, 4])
    sem[4] = 0.0
    has_history = torch.tensor([True, False, True, True, True, True])
    tau, total, counted = 0.5, 0.0, (0, 2, 3, 5)
    for first, second in ((cf, sem), (sem, cf)):
        for i in counted:
            keys = [j for j in counted if i == j or users[i] != users[j]]
            similar = [torch.cosine_similarity(first[i], second[j], dim=0) / tau for j in keys]
            own = torch.cosine_similarity(first[i], second[i], dim=0) / tau
            total += float(torch.stack(similar).logsumexp(0) - own) / 12  # of six rows, both directions
    loss = contrastive_loss(cf, sem, users, tau, has_history_B=has_history)
    assert loss.item() == pytest.approx(total, abs=1e-5)
    nobody = torch.zeros(6, dtype=torch.bool)
    assert contrastive_loss(cf, sem, users, tau, has_history_B=nobody).item() == 0.0


def test_contrastive_loss_gathers_who_has_a_history() -> None:
    """Two ranks' losses average to that of the union when each sees the other's rows and who is counted."""
    torch.manual_seed(0)
    cf, sem, users = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6)
    has_history = torch.tensor([True, False, True, True, True, False])
    parts = []

    def gathered_from(start: int) -> GatherRows:
        asked = iter([F.normalize(cf, dim=1), F.normalize(sem, dim=1), users, has_history.long()])
        return lambda rows: (next(asked), start)

    for start in (0, 3):
        mine = slice(start, start + 3)
        parts.append(
            contrastive_loss(
                cf[mine],
                sem[mine],
                users[mine],
                0.5,
                gathered_from(start),
                has_history[mine],
            )
        )
    whole = contrastive_loss(cf, sem, users, 0.5, has_history_B=has_history)
    torch.testing.assert_close(sum(parts) / 2, whole)


@pytest.mark.parametrize("variant", ["paper", "extended"])
def test_events_without_history_give_a_first_gradient_of_ordinary_size(folder: Path, variant: str) -> None:
    """Eq. 10 normalises f_s, which starts as 0 for them: 1e10 and more where they take part in it."""
    model, batch, _ = make(folder, variant, "model.contrastive_weight=0.1")
    mask = batch.history_mask.clone()
    mask[::2] = False
    batch = replace(batch, history_mask=mask)
    model.train()
    model(batch)[0].backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert torch.isfinite(norm) and norm < 1e3
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name in missing if "no_history" in name]


def test_contrastive_loss_starts_near_log_of_the_batch(folder: Path) -> None:
    """A LayerNorm after the L2 normalisation would start near 850."""
    model, batch, _ = make(folder)
    _, report = model(batch)
    assert report["contrastive_loss"] < 4 * np.log(batch.num_events) + 10


def test_prompt_holds_five_segments_around_four_slots(folder: Path) -> None:
    for variant, slots in (("paper", 4), ("extended", 7)):
        for wording in ("paper", "compact"):
            model, _, _ = make(folder, variant, f"model.prompt={wording}")
            for task in (REC, SRC):
                positions = model.get_buffer(f"slots_{task}").tolist()
                ids = model.get_buffer(f"template_{task}")
                assert (
                    len(positions) == slots
                    and (ids[list(positions)] == 0).all()
                    and (np.diff(positions[:4]) > 1).all()
                )
                assert positions[0] > 0 and len(ids) > len(positions)
    assert not torch.equal(model.get_buffer(f"template_{REC}"), model.get_buffer(f"template_{SRC}"))
    assert load_tokenizer(folder / "tokenizer")("Yes", add_special_tokens=False)["input_ids"] == [
        model.answers[0]
    ]


@pytest.mark.parametrize("backbone", ["scratch:nano", "scratch:llama_nano"])
def test_groups_by_query_length_leave_less_padding_and_the_same_scores(
    folder: Path, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, _ = make(folder, "extended", f"model.backbone={backbone}")
    tokens = model.tables.query_tokens.clone()
    # queries of 1 … L tokens
    tokens[:, 1:] *= (torch.arange(len(tokens)) % tokens.shape[1])[:, None] > torch.arange(
        tokens.shape[1] - 1
    )
    model.set_tables(replace(model.tables, query_tokens=torch.nn.functional.pad(tokens, (0, 8))))
    padding, original = [], model.fill_prompt

    def spy(*arguments: Any) -> Prompt:
        prompt = original(*arguments)
        padding.append(int((~prompt.shared_mask_BP).sum()) if prompt.shared_mask_BP is not None else 0)
        return prompt

    monkeypatch.setattr(model, "fill_prompt", spy)
    few = batch.with_candidates(batch.candidates[:, :3], batch.labels[:, :3])
    whole, padded = scores(model, few), sum(padding)
    padding.clear()
    monkeypatch.setattr("trainer.models.gensr.grouping.PROMPTS_A_GROUP_ON_CPU", 1)
    torch.testing.assert_close(scores(model, few), whole, rtol=0, atol=2e-5)
    assert 1 + 1 < len(padding) <= 1 + 4 and sum(padding) < padded / 4, (padding, padded)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_groups_in_one_pass_have_the_same_scores_and_gradients(
    folder: Path, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU answers small batches: rows of all groups in one call of an encoder-decoder's layers, padded
    to the longest prompt."""
    model, batch, _ = make(folder, "extended", f"model.backbone={backbone}", "model.dropout=0")
    few = batch.with_candidates(batch.candidates[:, :3], batch.labels[:, :3])
    monkeypatch.setattr("trainer.models.gensr.grouping.PROMPTS_A_GROUP_ON_CPU", 1)
    rows: list[int] = []
    model.backbone.stacks[0].register_forward_pre_hook(
        lambda *arguments: rows.append(len(arguments[-1]["inputs_embeds"])), with_kwargs=True
    )

    def answered() -> tuple[Tensor, list[Tensor]]:
        rows.clear()
        model.zero_grad()
        scores_BC = model.score(few)
        scores_BC.square().sum().backward()
        return scores_BC.detach(), [
            parameter.grad.to_dense() for parameter in model.parameters() if parameter.grad is not None
        ]

    apart, gradients = answered()
    assert len(rows) > 1
    monkeypatch.setattr("trainer.models.gensr.grouping.ONE_PASS_TOKENS_ON_CPU", 1_000_000)
    together, others = answered()
    assert rows == [few.candidates.numel()] or model.backbone.shared_first
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-5)
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("num_prompts", "on_cpu", "expected"), [(100, False, True), (101, False, False), (1, True, False)]
)
def test_one_pass_is_for_few_tokens_on_a_gpu(
    num_prompts: int, on_cpu: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.models.gensr.grouping.ONE_PASS_TOKENS", 1000)
    assert in_one_pass(num_prompts, 10, on_cpu) is expected


@pytest.mark.parametrize("backbone", ["scratch:nano", "scratch:llama_nano"])
def test_ranks_call_the_backbone_equally_often_whatever_their_batches_hold(
    folder: Path, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ZeRO-3 needs it: batches of one size and both tasks, one task, one search. Scores stay the same, and
    every parameter has its gradient."""
    model, batch, _ = make(folder, "extended", f"model.backbone={backbone}")
    few = batch.with_candidates(batch.candidates[:, :3], batch.labels[:, :3])
    searches, others = (few.task == SRC).nonzero()[:, 0], (few.task == REC).nonzero()[:, 0]
    mixtures = [torch.cat([searches, others]), searches, others, torch.cat([others, searches[:1]])]
    batches = [few.take(rows[torch.arange(8) % len(rows)]) for rows in mixtures]
    expected = [scores(model, one) for one in batches]
    calls, original = [], model.backbone.answer_logits

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(model.backbone, "answer_logits", counted)
    monkeypatch.setattr("trainer.models.gensr.grouping.PROMPTS_A_GROUP_ON_CPU", 1)
    model._world[0] = replace(model.world, ranks=Ranks(size=2))
    for one, scores_BC in zip(batches, expected, strict=True):
        calls.clear()
        torch.testing.assert_close(scores(model, one), scores_BC, rtol=0, atol=2e-5)
        assert len(calls) == 1 + 4
        model.zero_grad()
        model.train()
        model(one)[0].backward()
        model.eval()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_explained_weights_are_those_of_the_soft_filter(folder: Path) -> None:
    """They sum to 1 over real items, and are 0 on padding and without a history."""
    model, batch, _ = make(folder)
    mask = batch.history_mask.clone()
    mask[0], mask[1, 1:] = False, False
    batch = replace(batch, history_mask=mask)
    with torch.no_grad():
        explained = model.explain(batch)
    for weights_BCN in explained.values():
        assert (weights_BCN.transpose(1, 2)[~mask] == 0).all()
        expected_BC = mask.any(1).float()[:, None].expand(weights_BCN.shape[:2])
        torch.testing.assert_close(weights_BCN.sum(-1), expected_BC)
    assert not torch.equal(explained["cf"], explained["semantic"])
