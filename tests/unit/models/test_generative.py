"""BSR, CoLLM and IDGenRec against slow, obvious computations."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_shards.schema import SRC
from tests import tiny_folder
from tests.tiny_folder import make_tiny_folder
from trainer.batch import Batch
from trainer.config import Config
from trainer.configs import config_from_dict, load_config
from trainer.data import TrainStream
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, DataError
from trainer.evaluation.ranking import share_reached
from trainer.models.baselines import idgenrec
from trainer.models.contract import UNREACHED, Ranker
from trainer.models.layers.item_ids import Tokens, rare_words
from trainer.models.layers.trie import END
from trainer.models.zoo import model_class
from trainer.runs.weights import build_model, load_model, save_model
from trainer.training import plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> PreparedFolder:
    return PreparedFolder.at(make_tiny_folder(tmp_path_factory.mktemp("generative")))


def made(folder: PreparedFolder, name: str, **settings: object) -> tuple[Any, Batch]:
    """A new model in evaluation mode, and training events of its tasks."""
    torch.manual_seed(0)
    section = {"name": name, "backbone": "scratch:nano", "dropout": 0.0, **settings}
    data = {"dir": str(folder.path), "history_max": 4, "history_tokens": 3, "item_tokens": 5}
    config: Config = config_from_dict({"model": section, "data": data})
    kind = model_class(name)
    model = build_model(config, folder, folder.tables(kind.needs, with_folds="cf" in kind.needs))
    model.fit()
    stream = TrainStream(folder, config.data, 0, 8, 8, num_folds=2, tasks=model.tasks)
    return model.eval(), next(iter(stream))


def trained_parts(model: Ranker, batch: Batch) -> set[str]:
    """First names of the parameters that a loss moves."""
    model.train()
    model.loss(batch)[0].backward()
    return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def check_scores_stand_alone(model: Ranker, batch: Batch) -> None:
    """A score depends neither on other rows nor on other candidates nor on padding."""
    with torch.no_grad():
        scores = model.score(batch)
        for row in range(3):
            for candidate in range(2):
                one = batch.rows(row, row + 1)
                width = max(int(one.history_mask.sum()), 1)
                narrow = Batch(**{**vars(one), **{k: getattr(one, k)[:, :width] for k in HISTORY}})
                chosen = narrow.candidates[:, candidate : candidate + 1]
                alone = model.score(narrow.with_candidates(chosen, torch.ones(1, 1)))
                torch.testing.assert_close(alone[0, 0], scores[row, candidate], atol=1e-4, rtol=0)
    assert scores.dtype == torch.float32 and scores.isfinite().all()


HISTORY = ("history_items", "history_tasks", "history_queries", "history_mask")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bsr", {}),
        ("collm", {"stage": "map", "lora": {"rank": 2}}),
        ("idgenrec", {"ids": "generator", "generator": "scratch:mini", "id_tokens": 3}),
    ],
)
def test_what_is_saved_is_what_is_loaded(
    folder: PreparedFolder, tmp_path: Path, name: str, settings: dict[str, object]
) -> None:
    model, batch = made(folder, name, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.fit()  # IDGenRec: other ids
        expected = model.score(batch)
        config = Config(data=model.world.data, model=model.settings)
        save_model(tmp_path / "model", model, model.state_dict(), config, folder)
        loaded = load_model(tmp_path / "model", folder.tables(model.needs))
        torch.testing.assert_close(loaded.score(batch), expected, atol=1e-4, rtol=0)


# ---- BSR ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["scratch:nano", "scratch:llama_nano"])
def test_bsr_ranks_items_by_one_step(folder: PreparedFolder, backbone: str) -> None:
    model, batch = made(folder, "bsr", backbone=backbone)
    assert (batch.task == SRC).any() and (batch.task != SRC).any()
    check_scores_stand_alone(model, batch)
    with torch.no_grad():
        everything = model.score_catalogue(batch)
        torch.testing.assert_close(everything.gather(1, batch.candidates), model.score(batch))
        target = batch.candidates.gather(1, batch.labels.argmax(1, keepdim=True))[:, 0]
        torch.testing.assert_close(model.loss(batch)[0], F.cross_entropy(everything, target))
    trained = trained_parts(model, batch)
    assert {"backbone", "items"} <= trained
    assert not any(p.grad is not None and p.grad.is_sparse for p in model.parameters())


def test_bsr_search_does_not_read_the_history(folder: PreparedFolder) -> None:
    model, batch = made(folder, "bsr")
    other = Batch(**{**vars(batch), "history_items": (batch.history_items + 1) % model.world.num_items})
    with torch.no_grad():
        changed = (model.score(batch) != model.score(other)).any(1)
    assert not changed[batch.task == SRC].any()
    assert changed[(batch.task != SRC) & batch.history_mask.any(1)].all()


def test_bsr_sampled_softmax_estimates_the_full_one(folder: PreparedFolder) -> None:
    model, batch = made(folder, "bsr", softmax="sampled", num_samples=200_000)
    with torch.no_grad():
        sampled, report = model.loss(batch)
        full = made(folder, "bsr", softmax="full")[0].loss(batch)[0]
    assert report["sampled_items"] == 200_000
    assert float(sampled) == pytest.approx(float(full), abs=0.02)
    places = torch.arange(model.world.num_items)
    assert float(model._log_draws(places).exp().sum()) == pytest.approx(200_000, rel=1e-4)


def test_bsr_samples_by_itself_only_where_the_catalogue_is_large(folder: PreparedFolder) -> None:
    model, _ = made(folder, "bsr")
    assert not model.samples
    model._world[0] = type(model.world)(**{**vars(model.world), "num_items": 500_001})
    assert model.samples


# ---- CoLLM -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["scratch:nano", "scratch:llama_nano"])
@pytest.mark.parametrize("stage", ["text", "map"])
def test_collm_trains_one_part_a_stage(folder: PreparedFolder, stage: str, backbone: str) -> None:
    model, batch = made(folder, "collm", stage=stage, backbone=backbone)
    check_scores_stand_alone(model, batch)
    assert trained_parts(model, batch) == {"backbone" if stage == "text" else "map"}
    assert {name.split(".")[0] for name in model.saved_names()} == {"backbone", "map"}
    assert not any(p.grad is not None and p.grad.is_sparse for p in model.parameters())


def test_collm_joint_trains_both_parts_in_the_second_stage(folder: PreparedFolder) -> None:
    for stage, parts in (("text", {"backbone"}), ("map", {"backbone", "map"})):
        model, batch = made(folder, "collm", stage=stage, joint=True)
        assert trained_parts(model, batch) == parts
    model, batch = made(folder, "collm", stage="map", joint=True, lora={"rank": 2, "target_modules": "q,v"})
    assert trained_parts(model, batch) == {"backbone", "map"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("map.") for name in trained)


def test_collm_with_adapters_trains_them_alone_and_then_the_map_alone(folder: PreparedFolder) -> None:
    lora = {"rank": 2, "target_modules": "q,v"}
    model, batch = made(folder, "collm", lora=lora)
    trained_parts(model, batch)
    assert all("lora_" in name for name, p in model.named_parameters() if p.grad is not None)
    later, batch = made(folder, "collm", lora=lora, stage="map")
    assert trained_parts(later, batch) == {"map"}
    assert any("lora_" in name for name in later.saved_names())


def test_collm_reads_cf_vectors_in_the_second_stage_only(folder: PreparedFolder) -> None:
    for stage, reads in (("text", False), ("map", True)):
        model, batch = made(folder, "collm", stage=stage)
        with torch.no_grad():
            before = model.score(batch)
            model.tables.cf.add_(1.0)
            assert bool((model.score(batch) != before).any()) == reads
            model.tables.cf.sub_(1.0)


@pytest.mark.parametrize("wording", ["paper", "compact"])
def test_collm_score_is_the_logit_of_yes_after_the_whole_prompt(folder: PreparedFolder, wording: str) -> None:
    model, batch = made(folder, "collm", stage="map", prompt=wording)
    from trainer.models.baselines.collm import WORDINGS

    texts = WORDINGS[wording]
    encode = lambda text: model.world.tokenizer()(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    with torch.no_grad():
        event, item = batch.rows(0, 1), int(batch.candidates[0, 1])
        titles = [model.tables.item_tokens[int(i)][:3] for i in event.history_items[event.history_mask]]
        words = model.backbone.embed
        liked = [int(t) for title in titles for t in title if t]
        vectors = model.tables.cf[event.history_items[event.history_mask]]
        taste = vectors.mean(0) if len(vectors) else torch.zeros(model.tables.cf.shape[1])
        own = [int(t) for t in model.tables.item_tokens[item][:5] if t]
        prompt = [
            words(torch.tensor(encode(texts["candidate"]) + own + encode(texts["item"]))),
            model.map(model.tables.cf[item])[None],
            words(torch.tensor(encode(texts["question"]) + encode(texts["liked"]) + liked)),
            words(torch.tensor(encode(texts["user"]))),
            model.map(taste)[None],
        ]
        t5 = model.backbone.base
        logits = t5(inputs_embeds=torch.cat(prompt)[None], decoder_input_ids=torch.zeros(1, 1).long()).logits
        expected = logits[0, 0, encode("Yes")[0]]
        torch.testing.assert_close(model.score(batch)[0, 1], expected, atol=1e-4, rtol=0)


def test_collm_refuses_what_zero3_cannot_do() -> None:
    kind = model_class("collm")
    settings = kind.Settings(lora={"rank": 2, "four_bit": True})  # type: ignore[call-arg]
    assert kind.refusals(settings, 3) == ["model.lora.four_bit=true"]
    assert kind.refusals(settings, 2) == kind.refusals(kind.Settings(), 3) == []


@pytest.mark.parametrize("name", ["gensr", "collm"])
def test_the_dry_run_wants_a_tokenizer_with_yes_and_no(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny_folder(tmp_path / "with")
    config = load_config(None, [f"model.name={name}"])
    plan._check_folder(config, PreparedFolder.at(path))
    others = [{"Yes": "Yea", "No": "Nay"}.get(word, word) for word in tiny_folder.WORDS]
    monkeypatch.setattr(tiny_folder, "WORDS", others)
    path = make_tiny_folder(tmp_path / "without")
    with pytest.raises(DataError, match="no single tokens for 'Yes' and 'No'"):
        plan._check_folder(config, PreparedFolder.at(path))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_collm_holds_frozen_weights_as_its_dry_run_counts_them(
    folder: PreparedFolder, precision: str
) -> None:
    overrides = ["model.name=collm", "model.lora.rank=2", "data.history_max=4", f"run.precision={precision}"]
    config = load_config(None, overrides)
    model: Any = build_model(config, folder, folder.tables(model_class("collm").needs))
    frozen = [m.weight for m in model.backbone.modules() if isinstance(m, torch.nn.Linear)]
    low = sum(2 * w.numel() for w in frozen if w.dtype == torch.bfloat16)
    assert model.cost().saved_bytes == pytest.approx(low, rel=0.05)  # it counts norms, too
    assert (low > 0) == (precision == "bf16")


# ---- IDGenRec ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["scratch:nano", "scratch:llama_nano"])
def test_idgenrec_scores_are_those_of_every_id_spelled_out(folder: PreparedFolder, backbone: str) -> None:
    model, batch = made(folder, "idgenrec", backbone=backbone, id_tokens=4)
    ids = [tuple(row) for row in model.ids.tolist()]
    assert len(set(ids)) == model.world.num_items and all(row[-1] == END for row in ids)
    check_scores_stand_alone(model, batch)
    with torch.no_grad():
        read = model.backbone.reader(model._prompt(batch, 0))
        expected = torch.zeros(2, len(ids))
        for item, row in enumerate(ids):
            word = row[: row.index(END) + 1]
            for place, token in enumerate(word):
                begun = torch.tensor(word[:place], dtype=torch.int64).expand(batch.num_events, 1, -1)
                log = model.backbone.token_logits(read(begun)[:, 0, -1]).log_softmax(-1)
                expected[:, item] += log[:2, token] / len(word)
        scores = model.score(batch)
        torch.testing.assert_close(scores[:2], expected.gather(1, batch.candidates[:2]), atol=1e-4, rtol=0)
        clicked = batch.candidates.gather(1, batch.labels.argmax(1, keepdim=True))[:2, 0]
        two = batch.rows(0, 2)
        torch.testing.assert_close(model.loss(two)[0], -expected.gather(1, clicked[:, None]).mean())
    assert not any(p.grad is not None and p.grad.is_sparse for p in model.parameters())


def test_idgenrec_beams_reach_legal_ids_only_and_all_of_them_when_there_are_enough(
    folder: PreparedFolder,
) -> None:
    model, batch = made(folder, "idgenrec", id_tokens=4, catalogue_beams=500)
    narrow, _ = made(folder, "idgenrec", id_tokens=4, catalogue_beams=6, num_beams=2)
    with torch.no_grad():
        everything = model.score_catalogue(batch)
        torch.testing.assert_close(
            everything.gather(1, batch.candidates), model.score(batch), atol=1e-4, rtol=0
        )
        assert (model.beams(), model.beams(catalogue=True)) == (0, 500)
        assert share_reached(everything).eq(1).all() and share_reached(model.score(batch)).eq(1).all()
        few = narrow.score_catalogue(batch)
        reached = few > UNREACHED
        assert reached.sum(1).le(6).all() and reached.any(1).all()
        torch.testing.assert_close(few[reached], everything[reached], atol=1e-4, rtol=0)
        share = share_reached(narrow.score(batch))
        assert share.le(2 / batch.candidates.shape[1] + 1e-6).all() and share.gt(0).all()


def test_idgenrec_makes_a_longer_wording_only_where_the_shorter_is_taken(
    folder: PreparedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_of: list[tuple[int, int]] = []  # how many texts, of which size

    def counted(texts: torch.Tensor, counts: torch.Tensor, size: int) -> list[Tokens]:
        made_of.append((len(texts), size))
        return rare_words(texts, counts, size)

    monkeypatch.setattr(idgenrec, "rare_words", counted)
    monkeypatch.setattr(idgenrec, "ITEM_SLICE", 100)
    model, _ = made(folder, "idgenrec", id_tokens=4, shortest_id=1)
    lengths = model.ids.ne(END).sum(1)
    first = [number for number, size in made_of if size == 1]
    assert max(first) == 100 and sum(first) == model.world.num_items
    assert sum(number for number, size in made_of if size == 2) == int(lengths.gt(1).sum()) > 0


def test_idgenrec_among_legal_words_gives_all_items_a_probability_of_1(folder: PreparedFolder) -> None:
    settings = dict(id_tokens=4, legal_only=True, length_penalty=0.0)
    model, batch = made(folder, "idgenrec", catalogue_beams=0, **settings)
    searching, _ = made(folder, "idgenrec", catalogue_beams=500, **settings)
    with torch.no_grad():
        everything = model.score_catalogue(batch)
        torch.testing.assert_close(everything.exp().sum(1), torch.ones(batch.num_events))
        torch.testing.assert_close(searching.score_catalogue(batch), everything, atol=1e-4, rtol=0)
        item = batch.candidates.gather(1, batch.labels.argmax(1, keepdim=True))
        lengths = model.ids[item[:, 0]].ne(END).sum(1) + 1
        torch.testing.assert_close(model.loss(batch)[0], -(everything.gather(1, item)[:, 0] / lengths).mean())


def test_idgenrec_trains_one_part_a_stage(folder: PreparedFolder) -> None:
    written = dict(ids="generator", generator="scratch:nano", id_tokens=3)
    model, batch = made(folder, "idgenrec", **written)
    assert len({tuple(row) for row in model.ids.tolist()}) == model.world.num_items
    assert trained_parts(model, batch) == {"backbone"}
    model, batch = made(folder, "idgenrec", stage="generator", **written)
    assert trained_parts(model, batch) == {"generator"}
    assert model.generator.training and not model.backbone.training
    with pytest.raises(ConfigError, match=r"model\.ids=generator"):
        made(folder, "idgenrec", stage="generator")


def test_idgenrec_soft_ids_are_expected_vectors_of_greedy_tokens(folder: PreparedFolder) -> None:
    model, _ = made(
        folder, "idgenrec", stage="generator", ids="generator", generator="scratch:nano", id_tokens=3
    )
    items = torch.tensor([[3, 8]])
    soft, mask = model._soft_ids(items)
    for place, item in enumerate(items[0].tolist()):
        begun: list[int] = []
        logits_of = model._generates(torch.tensor([item]))
        for step in range(3):
            p = logits_of(torch.tensor([[begun]], dtype=torch.int64).view(1, 1, -1))[0, 0].softmax(0)
            token = int(p.argmax())
            if token in model.text_stops:
                assert not mask[0, place, step:].any()
                break
            wanted = p @ model.backbone.embedding_weight() * (token not in model.text_marks)
            torch.testing.assert_close(soft[0, place, step], wanted, atol=1e-5, rtol=0)
            begun.append(token)
    assert soft.requires_grad
