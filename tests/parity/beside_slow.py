"""GenSR beside the slow reference (slow_gensr.py): from the program's types to the reference's, and the
comparison of scores, losses and gradients."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_shards.schema import REC, SRC, read_manifest
from tests.parity.slow_evidence import SlowEvidence
from tests.parity.slow_gensr import Event, Settings, SlowGenSR, Tables, answers_of
from trainer.batch import Batch
from trainer.config import Config
from trainer.data import TrainStream
from trainer.data.cf_table import CfTable, cf_path, save_cf
from trainer.data.folder import PreparedFolder
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import build_model

# Every term of the loss counts, and no number is the default of another.
SETTINGS = [
    "model.dropout=0",
    "model.contrastive_weight=0.3",
    "model.listwise_weight=0.4",
    "model.temperature=0.2",
    "data.history_max=5",
    "data.history_tokens=4",
    "data.item_tokens=7",
    "data.num_negatives=2",
    "data.weight_rec=0.7",
    "data.weight_src=1.6",
]
CF_WIDTH, NUM_FOLDS, NUM_EVENTS = 16, 2, 10


# ---- from the program's types to the reference's -----------------------------------------------------------


def events_of(batch: Batch) -> list[Event]:
    return [
        Event(
            user=int(batch.user[b]),
            task=int(batch.task[b]),
            query=int(batch.query[b]),
            fold=int(batch.fold[b]),
            history=[
                (int(item), int(task))
                for item, task, real in zip(
                    batch.history_items[b], batch.history_tasks[b], batch.history_mask[b], strict=True
                )
                if real
            ],
            candidates=batch.candidates[b].tolist(),
            clicked=batch.labels[b].tolist().index(1.0),
        )
        for b in range(batch.num_events)
    ]


def tables_of(folder: Path, model: GenSR) -> Tables:
    """Tokens and words as the folder's tables hold them, CF vectors from their file."""
    cf, tables = load_file(cf_path(folder)), model.tables
    rows = [row for row in cf["item"].double() if row.any()]
    scale = (sum(float((row * row).sum()) for row in rows) / (len(rows) * CF_WIDTH)) ** 0.5
    return Tables(
        cf=cf["item"].double() / scale,
        cf_folds=cf["item_folds"].double() / scale,
        item_tokens=tables.item_tokens.int().tolist(),
        item_words=tables.item_words.int().tolist(),
        query_tokens=tables.query_tokens.tolist(),
        query_words=tables.query_words.tolist(),
    )


@dataclass
class Slow:
    """The reference with the weights of a model: a copy in float64, by the model's names."""

    gensr: SlowGenSR
    weights: dict[str, Tensor]

    def backward(self, batch: Batch, share: float = 1.0) -> dict[str, Tensor]:
        terms = self.gensr.loss(events_of(batch))
        (terms["loss"] * share).backward()
        return terms


def slow(
    model: GenSR,
    folder: Path,
    scale: float = 1.0,
    before: Sequence[int] = (),
    behind: Sequence[int] = (),
    evidence: SlowEvidence | None = None,
) -> Slow:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    backbone_config = model.backbone.base.config
    kind = AutoModelForSeq2SeqLM if backbone_config.is_encoder_decoder else AutoModelForCausalLM
    backbone = kind.from_config(backbone_config).double().eval()  # transformers' own layers
    backbone.load_state_dict(model.backbone.base.state_dict())
    weights = {
        name: parameter.detach().double().requires_grad_(True)
        for name, parameter in model.named_parameters()
        if not name.startswith("backbone.")
    }
    weights |= {f"backbone.model.{name}": p for name, p in backbone.named_parameters()}
    settings, data = model.settings, model.world.data
    tokenizer = model.world.tokenizer
    assert tokenizer is not None
    encode = tokenizer()
    return Slow(
        SlowGenSR(
            Settings(
                variant=settings.variant,
                prompt=settings.prompt,
                num_heads=settings.num_heads,
                history_tokens=data.history_tokens,
                item_tokens=data.item_tokens,
                history_max=data.history_max,
                contrastive_weight=settings.contrastive_weight,
                listwise_weight=settings.listwise_weight,
                temperature=settings.temperature,
                weight_rec=data.weight_rec,
                weight_src=data.weight_src,
                words=model.world.num_words > 0,
                decoder=not backbone_config.is_encoder_decoder,
                mined_negatives=settings.mined_negatives,
                views=settings.views,
                soft_filter=settings.soft_filter,
                scale=scale,
                before=list(before),
                behind=list(behind),
            ),
            weights,
            tables_of(folder, model),
            backbone.get_input_embeddings().weight,
            answers_of(backbone, encode.convert_tokens_to_ids("Yes"), encode.convert_tokens_to_ids("No")),
            lambda text: encode(text, add_special_tokens=False)["input_ids"],
            evidence,
        ),
        weights,
    )


def disturb(model: GenSR) -> None:
    """GenSR's own layers start as identities and zeros, which would hide what they do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def with_cf(source: Path, folder: Path) -> Path:
    """A copy of a prepared folder with a random CF table of two folds, one item without clicks."""
    shutil.copytree(source, folder)
    manifest = read_manifest(folder)
    generator = torch.Generator().manual_seed(2)
    item = 0.3 * torch.randn(manifest.num_items, CF_WIDTH, generator=generator)
    item[0] = 0
    noise = torch.randn(NUM_FOLDS, *item.shape, generator=generator)
    save_cf(
        folder,
        CfTable(
            user=torch.zeros(manifest.num_users, CF_WIDTH),
            item=item,
            item_folds=item + 0.1 * noise,
            heldout_item=None,
            split_fingerprint=manifest.fingerprint,
            settings={"holdout": "crossfit"},
            validation={},
            gensr_version="0",
        ),
    )
    return folder


def close(ours: Tensor, theirs: Tensor, tolerance: float, floor: float = 1e-3) -> bool:
    """By the size of the whole tensor, `floor` at least: elements may be zero but for rounding."""
    return float((ours.double() - theirs).norm()) <= tolerance * max(float(theirs.norm()), floor)


# ---- the comparison ----------------------------------------------------------------------------------------


def compare(model: GenSR, reference: Slow, batch: Batch, as_trained: Batch | None = None) -> None:
    """Terms of the loss and gradients in training, scores in evaluation, which reads the full CF table.
    as_trained: the batch with mined negatives."""
    ours, report = model.loss(batch)
    ours.backward()
    terms = {name: float(value.detach()) for name, value in reference.backward(as_trained or batch).items()}
    assert float(ours.detach()) == pytest.approx(terms["loss"], rel=1e-5)
    assert float(report["answer_loss"]) == pytest.approx(terms["answer"], rel=1e-5)
    assert float(report["listwise_loss"]) == pytest.approx(terms["listwise"], rel=1e-5)
    if model.settings.views == "both":
        assert float(report["contrastive_loss"]) == pytest.approx(terms["contrast"], rel=1e-5)
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(reference.weights)
    for name, weight in reference.weights.items():
        theirs = weight.grad if weight.grad is not None else torch.zeros_like(weight)
        grad = parameters[name].grad
        assert close(grad if grad is not None else torch.zeros_like(theirs), theirs, 1e-4), name

    model.eval()
    events = [Event(**{**vars(event), "fold": -1}) for event in events_of(batch)]
    with torch.no_grad():
        scores_BC, expected = model.score(batch), [reference.gensr.scores(event) for event in events]
    torch.testing.assert_close(scores_BC, torch.tensor(expected), rtol=0, atol=2e-5)


def compare_disturbed(folder: Path, config: Config) -> None:
    """A new model of `config`, its weights moved off their first values, beside the slow reference."""
    prepared = PreparedFolder.at(folder)
    torch.manual_seed(0)
    model = build_model(config, prepared, prepared.tables(GenSR.needs, with_folds=True)).train()
    assert isinstance(model, GenSR)
    disturb(model)
    compare(model, slow(model, folder), telling_batch(prepared, config))


def telling_batch(folder: PreparedFolder, config: Config) -> Batch:
    return telling(next(iter(TrainStream(folder, config.data, 0, 64, 64, num_folds=NUM_FOLDS))))


def telling(batch: Batch) -> Batch:
    """Ten events that hold every case: both tasks, an empty history, both behaviours in one history, two
    events of one user, both folds."""
    events = events_of(batch)
    places = {"empty": next(n for n, event in enumerate(events) if not event.history)}
    for task in (REC, SRC):
        mixed = [
            n for n, e in enumerate(events) if e.task == task and {t for _, t in e.history} == {REC, SRC}
        ]
        assert mixed
        places[f"mixed {task}"] = mixed[0]
    users = [event.user for event in events]
    places["again"] = next(n for n, user in enumerate(users) if users.index(user) < n and events[n].history)
    places["first"] = users.index(users[places["again"]])
    chosen = list(dict.fromkeys([*places.values(), *range(len(events))]))[:NUM_EVENTS]
    assert {event.fold for event in events} == {0, 1}
    return batch.take(torch.tensor(chosen))
