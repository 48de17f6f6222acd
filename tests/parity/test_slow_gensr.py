"""GenSR against slow_gensr.py, which shares no code with it: scores, both losses, gradients, and whole
training runs with the optimizer's groups, clipping and learning rate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

import trainer.training.loop
from tests.parity.beside_slow import (
    SETTINGS,
    close,
    compare,
    compare_disturbed,
    disturb,
    slow,
    telling_batch,
    with_cf,
)
from tests.parity.slow_gensr import SlowAdamW, learning_rate
from tests.tiny_folder import make_tiny_folder, relist
from trainer.batch import Batch
from trainer.config import Config
from trainer.configs import load_config
from trainer.data.folder import PreparedFolder
from trainer.models.backbones.families import build_backbone
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import build_model
from trainer.training.loop import train
from trainer.training.setup import Run

# ---- the equations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "variant", "prompt", "backbone"),
    [
        ("prepared", "paper", "paper", "scratch:nano"),
        ("prepared", "extended", "compact", "scratch:llama_nano"),
        ("prepared_words", "extended", "compact", "scratch:nano"),
    ],
)
def test_scores_losses_and_gradients(
    request: pytest.FixtureRequest, tmp_path: Path, world: str, variant: str, prompt: str, backbone: str
) -> None:
    folder = with_cf(request.getfixturevalue(world), tmp_path / "data")
    chosen = [f"model.variant={variant}", f"model.prompt={prompt}", f"model.backbone={backbone}"]
    compare_disturbed(folder, load_config(None, [*SETTINGS, *chosen]))


@pytest.mark.parametrize(
    "ablation", [["model.views=cf", "model.soft_filter=false"], ["model.views=semantic"]]
)
def test_ablations(prepared_words: Path, tmp_path: Path, ablation: list[str]) -> None:
    folder = with_cf(prepared_words, tmp_path / "data")
    compare_disturbed(folder, load_config(None, [*SETTINGS, "model.backbone=scratch:nano", *ablation]))


@pytest.mark.parametrize(
    ("world", "size", "frame", "before", "behind"),
    [
        ("prepared_words", "nano", "$A </s>", [], [1]),  # as T5's tokenizer does it
        ("prepared", "llama_nano", "</s> $A </s>", [1], []),  # a decoder answers behind its prompt
    ],
)
def test_a_pretrained_backbone_reads_what_it_was_pretrained_on(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    world: str,
    size: str,
    frame: str,
    before: list[int],
    behind: list[int],
) -> None:
    """Prompts between its tokenizer's special tokens, and slots of the size of its token vectors."""
    folder = with_cf(request.getfixturevalue(world), tmp_path / "data")
    path = str(folder / "tokenizer" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=[("</s>", 1)])
    tokenizer.save(path)
    relist(folder)
    torch.manual_seed(3)
    trained = build_backbone(f"scratch:{size}", vocab_size=tokenizer.get_vocab_size(), dropout=0.0)
    vectors = trained.base.get_input_embeddings().weight
    with torch.no_grad():
        vectors.mul_(20)
    trained.base.save_pretrained(tmp_path / "backbone")

    chosen = [f"model.backbone={tmp_path / 'backbone'}", "model.words_dim=32"]
    config = load_config(None, [*SETTINGS, *chosen])
    prepared = PreparedFolder.at(folder)
    model = build_model(config, prepared, prepared.tables(GenSR.needs, with_folds=True)).train()
    assert isinstance(model, GenSR)
    scale = float(vectors.detach().double().square().mean().sqrt())
    batch = telling_batch(prepared, config)
    with torch.no_grad():  # the CF slots: as large as tokens, as far as a new linear map keeps the size
        slots = scale * model.cf_projection(model.cf_vectors(batch.candidates, batch.fold))
        assert scale / 2 < float(slots.square().mean().sqrt()) < scale * 2
    disturb(model)
    compare(model, slow(model, folder, scale, before, behind), batch)


# ---- whole training runs -----------------------------------------------------------------------------------

# a small rate keeps float32 near float64; a large decay shows beside AdamW's steps of that size
NUM_STEPS, WARMUP, LR, BETA2, DECAY, CLIP = 4, 2, 1e-4, 0.95, 5.0, 0.5
RUN = [
    *SETTINGS,
    "model.backbone=scratch:nano",
    "optim.global_batch_size=8",
    "optim.micro_batch_size=4",
    f"optim.lr={LR}",
    f"optim.warmup_steps={WARMUP}",
    f"optim.beta2={BETA2}",
    f"optim.weight_decay={DECAY}",
    f"optim.grad_clip={CLIP}",
    f"run.max_steps={NUM_STEPS}",
    "run.validate_every_steps=100",
    "run.valid_events=4",
    "run.threads=1",
    "tracking.enabled=false",
]


@pytest.mark.parametrize("variant", ["paper", "extended"])
def test_training_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Two accumulation steps a step; weights and both moments of AdamW after four."""
    data = make_tiny_folder(tmp_path / "data", num_train=48, num_valid=8)
    config = load_config(
        None, [f"data.dir={data}", f"run.dir={tmp_path / 'run'}", *RUN, f"model.variant={variant}"]
    )
    watched = watch(monkeypatch, data)
    train(config)
    run, reference, batches = watched["run"], watched["reference"], watched["batches"]
    assert len(batches) == 2 * NUM_STEPS

    optimizer = SlowAdamW(reference.weights, BETA2, DECAY, CLIP)
    norms = []
    for step in range(NUM_STEPS):
        for batch in batches[2 * step : 2 * step + 2]:
            reference.backward(batch, share=0.5)
        optimizer.step(learning_rate(step, LR, WARMUP, NUM_STEPS))
        norms.append(optimizer.norm)
    assert max(norms) > CLIP  # else nothing was clipped
    state, parameters = run.optimizer.state, dict(run.module.named_parameters())
    assert set(optimizer.means) == {name for name, parameter in parameters.items() if parameter in state}
    for name, mean in optimizer.means.items():
        assert close(state[parameters[name]]["exp_avg"], mean, 1e-3), name
        assert close(state[parameters[name]]["exp_avg_sq"], optimizer.squares[name], 2e-3, floor=1e-6), name
        moved = parameters[name].detach().double() - watched["before"][name]
        expected = reference.weights[name].detach() - watched["before"][name]
        assert close(without_keys(name, moved), without_keys(name, expected), 2e-2), name


def without_keys(name: str, bias: Tensor) -> Tensor:
    """What attention adds to all keys changes no softmax: its gradient is rounding, and AdamW makes whole
    steps of the rounding's sign."""
    if name.endswith("filter.key.bias"):
        return bias[:0]
    if name.endswith("in_proj_bias"):  # of queries, keys, values
        return torch.cat(bias.chunk(3)[::2])
    return bias


def watch(monkeypatch: pytest.MonkeyPatch, data: Path) -> dict[str, Any]:
    """What train() works with: the run, the reference with its first weights, the batches as they come."""
    seen: dict[str, Any] = {"batches": []}
    real = trainer.training.loop.set_up

    def set_up(config: Config, *given: Any) -> Run:
        run = real(config, *given)
        disturb(run.module)
        seen["run"], seen["reference"] = run, slow(run.module, data)
        seen["before"] = {n: p.detach().double().clone() for n, p in run.module.named_parameters()}
        loss = run.module.loss

        def watched(batch: Batch) -> Any:
            seen["batches"].append(batch)
            return loss(batch)

        run.module.loss = watched
        return run

    monkeypatch.setattr(trainer.training.loop, "set_up", set_up)
    return seen
