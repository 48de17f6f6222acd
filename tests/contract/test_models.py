"""The contract of trainer/models/contract.py, one claim a test, for every model of the house. A new file in
trainer/models/baselines/ is tested without a line here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_shards.schema import REC, SRC, TASKS
from tests.contract.conftest import NUM_STEPS, run_config
from tests.contract.draws import NoWaits, RepeatingDraws
from tests.contract.models import (
    COUNTED,
    FIT_STEPS,
    MODELS,
    TRAINED,
    cold_items,
    config_of,
    fitted,
    model_files,
    new_model,
    no_dropout,
    odd_batches,
    padded,
    queries_without_words,
    scorer_of,
    scores_of,
    some_events,
    trained_parameters,
    training_batches,
)
from tests.distributed.launching import records
from trainer.batch import Batch
from trainer.data.folder import PreparedFolder
from trainer.errors import RequestError, RunError
from trainer.models.contract import Ranker
from trainer.models.zoo import model_class, settings_class
from trainer.runs.weights import load_model, load_run_model, save_model
from trainer.runtime.device import autocast
from trainer.serving.recommend import Recommender
from trainer.serving.retrieval import build_retrieval
from trainer.serving.users import NoUsers
from trainer.training.loop import train
from trainer.training.plan import model_size, size_of_folder

NEEDS = {"cf", "cf_users", "item_text", "history_queries", "users", "item_category", "texts"}
READ_TEXT = [name for name in MODELS if model_class(name).needs & {"item_text", "texts"}]
REGISTERED = [
    "item_knn",
    "sasrec",
    "two_tower",
]  # without and with steps, with views; GenSR: test_registry.py

# one wait in a micro-batch costs less than the padding, or the other task's events, that it leaves out
SKIP_PADDING = {
    "bert4rec",
    "bsr",
    "collm",
    "idgenrec",
    "query_seqrec",
    "sesrec",
    "unifiedssr",
    "unisar",
    "user",
}
SKIP_PADDING |= {"gensr"}  # a CPU only: tests/unit/test_device.py

every_model = pytest.mark.parametrize("name", MODELS)
trained_models = pytest.mark.parametrize("name", TRAINED)

Fitted = tuple[Ranker, Batch]


@pytest.fixture(params=[*MODELS, *(f"{name} of words" for name in READ_TEXT)])
def fit(request: pytest.FixtureRequest) -> Fitted:
    """A fitted model and events of the test split; of models that read text also on anonymised words."""
    name, _, world = request.param.partition(" of ")
    folder = request.getfixturevalue(world or "texts")
    model, _ = fitted(name, folder.path)
    return model, some_events(model, folder)


def assert_same(
    scores: Tensor, expected: Tensor, what: str = "", atol: float = 1e-5, rtol: float = 1e-5
) -> None:
    torch.testing.assert_close(scores, expected, atol=atol, rtol=rtol, msg=lambda text: f"{what}: {text}")


# ---- what it says of itself --------------------------------------------------------------------------------


@every_model
def test_it_says_what_it_is(name: str, texts: PreparedFolder) -> None:
    kind = model_class(name)
    assert settings_class(name)().name == name and kind.title
    assert kind.needs | kind.may_read | kind.reads(settings_class(name)()) <= NEEDS
    assert kind.tasks and set(kind.tasks) <= {REC, SRC}
    assert sum(model_class(other).title == kind.title for other in MODELS) == 1
    model = new_model(name, texts)
    assert bool(trained_parameters(model)) == kind.trained
    assert model_size(config_of(name), size_of_folder(texts), cf_dim=16).total == sum(
        p.numel() for p in model.parameters()
    ), "a dry run counts what is built"


def test_a_model_without_a_title_is_called_by_its_class() -> None:
    class Untitled(model_class("popularity")):  # type: ignore[misc]
        pass

    assert Untitled.title == "Untitled"


# ---- loss --------------------------------------------------------------------------------------------------


@trained_models
def test_the_loss_falls_on_the_planted_world(name: str, texts: PreparedFolder) -> None:
    model, losses = fitted(name, texts.path)
    at_start, at_end = sum(losses[:4]) / 4, sum(losses[-4:]) / 4  # each of the four batches once
    assert len(losses) == FIT_STEPS
    assert at_end < 0.9 * at_start, (
        f"in {FIT_STEPS} steps on four batches the loss must fall by 10 %: {at_start:.4g} → {at_end:.4g}"
    )
    (batch,) = training_batches(name, texts, 64, 64)
    place = (scores_of(model, batch) >= scores_of(model, batch).gather(1, clicked(batch))).sum(1)
    assert (place.float().reciprocal()).mean() > 0.6, "what lowers the loss ranks the clicked item up"


def clicked(batch: Batch) -> Tensor:
    return batch.labels.argmax(1, keepdim=True)


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in SKIP_PADDING])
def test_a_training_step_waits_for_no_value(name: str, texts: PreparedFolder) -> None:
    """What a loss asks its tensors for, a GPU would be waited for."""
    model = new_model(name, texts).train()
    batch = model.prepare(training_batches(name, texts, 8, 8)[0])
    model(batch)  # what only the first step opens
    with NoWaits():
        loss, _ = model(batch)
        loss.backward()


@pytest.mark.parametrize("name", [name for name in TRAINED if not model_class(name).in_batch])
def test_micro_batches_add_up(name: str, texts: PreparedFolder) -> None:
    """Two halves of a batch give the mean of its losses and of its gradients. Models whose loss compares the
    events of a batch say so (in_batch); test_models_distributed.py holds them to the mean over ranks."""
    model = new_model(name, texts, *no_dropout(name)).train()
    (batch,) = training_batches(name, texts, 16, 16)
    whole, gradients = loss_and_gradients(model, batch)
    halves = [loss_and_gradients(model, batch.rows(first, first + 8)) for first in (0, 8)]
    torch.testing.assert_close(sum(loss for loss, _ in halves) / 2, whole)
    for key, gradient in gradients.items():
        mean = (halves[0][1][key] + halves[1][1][key]) / 2
        assert_same(mean, gradient, key, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in TRAINED if len(model_class(name).tasks) == 2])
def test_the_weight_of_a_task_is_that_in_the_loss(name: str, texts: PreparedFolder) -> None:
    (batch,) = training_batches(name, texts, 16, 16)
    losses = [
        loss_and_gradients(new_model(name, texts, *no_dropout(name), f"data.weight_src={weight}"), batch)[0]
        for weight in (1, 3)
    ]
    assert set(batch.task.tolist()) == {REC, SRC}
    assert losses[1] > losses[0], "loss() must weigh each event by data.weight_rec or data.weight_src"


def loss_and_gradients(model: Ranker, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with RepeatingDraws():
        loss, _ = model(model.prepare(batch))
    loss.backward()
    return loss.detach(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in trained_parameters(model).items()
    }


@trained_models
def test_every_weight_has_a_part_in_every_loss(name: str, texts: PreparedFolder) -> None:
    """DDP and ZeRO wait for the gradient of each weight, on each rank, whatever its events are. A loss of
    few or odd events is finite."""
    model = new_model(name, texts).train()
    (batch,) = training_batches(name, texts, 16, 16)
    events = {"as they come": batch, **odd_batches(batch)}
    for task in model.tasks:
        if (batch.task == task).any():
            events[f"task {task} only"] = batch.take(batch.task == task)
    for what, some in events.items():
        model.zero_grad(set_to_none=True)
        loss, report = model(model.prepare(some))
        loss.backward()
        assert loss.ndim == 0 and bool(loss.isfinite()), what
        assert all(not torch.is_tensor(part) or not part.requires_grad for part in report.values()), what
        gradients = {key: p.grad for key, p in trained_parameters(model).items()}
        assert not [key for key, gradient in gradients.items() if gradient is None], what
        assert all(bool(g.isfinite().all()) for g in gradients.values() if g is not None), what


# ---- scores ------------------------------------------------------------------------------------------------


def test_a_score_depends_on_its_event_and_its_item_alone(fit: Fitted) -> None:
    model, batch = fit
    scores = scores_of(model, batch)
    size, width = batch.candidates.shape
    assert scores.shape == (size, width) and scores.dtype == torch.float32 and bool(scores.isfinite().all())
    alone = [scores_of(model, batch.rows(row, row + 1)) for row in range(size)]
    assert_same(torch.cat(alone), scores, "other events")
    assert_same(scores_of(model, batch.take(torch.arange(size).flip(0))).flip(0), scores, "order of events")
    other_way = batch.with_candidates(batch.candidates.flip(1), batch.labels.flip(1))
    assert_same(scores_of(model, other_way).flip(1), scores, "order of candidates")
    fewer = batch.with_candidates(batch.candidates[:, :2], batch.labels[:, :2])
    assert_same(scores_of(model, fewer), scores[:, :2], "other candidates")
    unlabelled = batch.with_candidates(batch.candidates, torch.zeros_like(batch.labels))
    assert_same(scores_of(model, unlabelled), scores, "labels")
    assert_same(scores_of(model, padded(batch, 3)), scores, "padding")


def test_scores_under_bf16_are_float32(fit: Fitted) -> None:
    """In bf16 near scores would tie."""
    model, batch = fit
    with autocast("cpu", "bf16"), torch.no_grad():
        scores, whole = scores_of(model, batch), model.score_catalogue(model.prepare(batch))
    assert scores.dtype == whole.dtype == torch.float32


def test_padding_is_never_read(fit: Fitted) -> None:
    model, batch = fit
    short = replace(batch, history_mask=batch.history_mask & (torch.arange(batch.history_mask.shape[1]) < 2))
    cut = replace(short, **{n: getattr(short, n)[:, :2] for n in vars(short) if n.startswith("history_")})
    assert_same(scores_of(model, short), scores_of(model, cut))


def test_odd_events_have_finite_scores(fit: Fitted, texts: PreparedFolder) -> None:
    model, batch = fit
    for what, events in odd_batches(batch).items():
        assert bool(scores_of(model, events).isfinite().all()), what
    with queries_without_words(model):
        assert bool(scores_of(model, batch).isfinite().all()), "queries without words"
    cold = cold_items(texts)
    assert len(cold) >= 5
    unseen = batch.with_candidates(cold[:5].expand(batch.num_events, -1), torch.zeros(batch.num_events, 5))
    history = cold[torch.arange(batch.history_items.shape[1]) % len(cold)] * batch.history_mask
    assert bool(scores_of(model, replace(unseen, history_items=history)).isfinite().all()), "cold items"


def test_unknown_users_have_finite_scores_or_are_refused(fit: Fitted) -> None:
    model, batch = fit
    unknown = replace(batch, user=torch.full_like(batch.user, -1))
    if "users" in model.needs:
        with pytest.raises(RequestError, match="user_id"):
            scores_of(model, unknown)
    else:
        assert bool(scores_of(model, unknown).isfinite().all())


# ---- catalogue, views, weights -----------------------------------------------------------------------------


def test_the_catalogue_is_scored_as_its_items_are(fit: Fitted) -> None:
    model, batch = fit
    items = torch.arange(model.world.num_items).expand(batch.num_events, -1)
    with torch.no_grad():
        whole = model.score_catalogue(model.prepare(batch))
    assert whole.dtype == torch.float32
    assert_same(whole, scores_of(model, batch.with_candidates(items, torch.zeros(items.shape))))


def test_views_have_the_shapes_they_promise(fit: Fitted) -> None:
    model, batch = fit
    views = model.views()
    items = torch.arange(model.world.num_items)
    odd = odd_batches(batch)["no history"]
    for name, view in views.items():
        with torch.no_grad():
            vectors = view.items(items)
            mean = vectors.mean(0) if view.centred else torch.zeros(view.width)
            asked = [view.ask(model.prepare(events), mean) for events in (batch, odd)]
        assert vectors.shape == (len(items), view.width) and bool(vectors.any()), name
        assert all(a.shape == (batch.num_events, view.width) for a in asked), name
        for values in (vectors, *asked):
            assert values.dtype == torch.float32 and bool(values.isfinite().all()), name
    for task in model.tasks if views else ():
        assert sum(view.share[task] for view in views.values()) == pytest.approx(1)


def test_pre_ranking_proposes_items_and_orders_them(fit: Fitted) -> None:
    model, batch = fit
    with torch.no_grad():
        pre_ranking = model.pre_ranking()
        if pre_ranking is None:
            return
        assert model.views()  # it orders what they find
        for events in (batch, odd_batches(batch)["no history"]):
            proposed_BP = pre_ranking.propose(events)
            real = proposed_BP < model.world.num_items
            assert len(proposed_BP) == events.num_events and bool(real.any(1).all())
            assert int(proposed_BP.min()) >= 0 and int(proposed_BP.max()) <= model.world.num_items
            scores_BC = pre_ranking.score(events)
            assert scores_BC.shape == events.candidates.shape and scores_BC.dtype == torch.float32
            assert bool(scores_BC.isfinite().all())
        one = batch.rows(1, 2)
        alone = batch.rows(1, 2).with_candidates(batch.candidates[1:2, :1], batch.labels[1:2, :1])
        assert_same(pre_ranking.score(one), pre_ranking.score(batch)[1:2])
        assert_same(pre_ranking.score(alone), pre_ranking.score(batch)[1:2, :1])


def test_explained_weights_are_shares_of_the_history(fit: Fitted) -> None:
    model, batch = fit
    batch = replace(batch, history_mask=batch.history_mask.index_fill(0, torch.tensor([0]), False))
    with torch.no_grad():
        explained = model.explain(model.prepare(batch))
    for name, weights in explained.items():
        assert weights.shape == (*batch.candidates.shape, batch.history_mask.shape[1]), name
        some = batch.history_mask.any(1).float()[:, None].expand_as(batch.candidates)
        assert_same(weights.sum(2), some, name)
        assert not weights.masked_select(~batch.history_mask[:, None].expand_as(weights)).any(), name


def test_probabilities_keep_the_order_of_scores(fit: Fitted) -> None:
    model, batch = fit
    scores = scores_of(model, batch)
    answers = model.probability(scores)
    assert bool(((answers >= 0) & (answers <= 1)).all())
    places = scores.argsort(dim=1)
    assert bool((answers.gather(1, places).diff(dim=1) >= 0).all())


# ---- runs --------------------------------------------------------------------------------------------------


@every_model
def test_a_saved_model_comes_back(name: str, texts: PreparedFolder, tmp_path: Path) -> None:
    model, _ = fitted(name, texts.path)
    save_model(tmp_path / "model", model, model.state_dict(), config_of(name), texts)
    loaded = load_model(tmp_path / "model", texts.tables(model.needs), folder=texts)
    batch = some_events(model, texts)
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(scores_of(loaded, batch), scores_of(model, batch))
    assert {Path(file).suffix for file in model_files(tmp_path)} == {".safetensors", ".json"}


@pytest.mark.slow
@trained_models
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    name: str, texts: PreparedFolder, run_of: Any, tmp_path: Path, stop_after: Any
) -> None:
    undisturbed, config = run_of(name), run_config(name, texts, tmp_path / "run")
    stop_after(NUM_STEPS // 2)
    assert (train(config).status, train(config, resume="auto").status) == ("stopped", "finished")
    assert records(tmp_path / "run") == records(undisturbed)
    one, other = (load_file(run / "model/model.safetensors") for run in (tmp_path / "run", undisturbed))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", COUNTED)
def test_a_model_without_steps_is_counted_once(name: str, texts: PreparedFolder, run_of: Any) -> None:
    model, _config, _folder = load_run_model(run_of(name))
    counted, _ = fitted(name, texts.path)
    batch = some_events(counted, texts)
    assert torch.equal(scores_of(model, batch), scores_of(counted, batch))
    again = train(run_config(name, texts, run_of(name)), resume="auto")
    assert (again.status, again.step) == ("already_finished", 0)


@pytest.mark.slow
@every_model
def test_a_run_is_evaluated_on_sampled_and_on_all_candidates(name: str, evaluated: Any) -> None:
    (run_dir, documents), kind = evaluated(name), model_class(name)
    for file, document in zip(("evaluation-test.json", "evaluation-test-full.json"), documents, strict=True):
        assert json.loads((run_dir / file).read_text()) == document
        assert (run_dir / file).with_suffix(".parquet").is_file()
        assert document["protocol"]["model_title"] == kind.title
        tasks = [task for place, task in enumerate(("rec", "src")) if place in kind.tasks]
        assert not {"rec", "src"} - set(tasks) & document.keys()
        decodes = kind.beams is not Ranker.beams
        assert ("num_beams" in document["protocol"]) == decodes
        assert all(("share_reached" in document[task]) == decodes for task in tasks)


@pytest.mark.slow
@every_model
def test_the_kept_lists_are_those_that_were_measured(
    name: str, evaluated: Any, texts: PreparedFolder
) -> None:
    run_dir, (_, full) = evaluated(name)
    of_item = texts.items("train_rec_clicks").to_pandas()["train_rec_clicks"].set_axis(texts.item_ids())
    for which in ("test", "test-full"):
        lists = pd.read_parquet(run_dir / f"lists-{which}.parquet")
        events = pd.read_parquet(run_dir / f"evaluation-{which}.parquet")
        assert lists.groupby("event_id").size().reindex(events["event_id"]).eq(12).all()
        better = lists.groupby("event_id")["score"].shift()
        assert (lists["score"] <= better.fillna(np.inf)).all() and np.isfinite(lists["score"]).all()
        clicked = events.merge(lists[lists["clicked"]], on=["event_id", "task", "user_id", "item_id"])
        assert ((clicked["place"] - clicked["rank"]).abs() <= (clicked["num_tied"] - 1) / 2).all()
        last_place = events["rank"] + (events["num_tied"] - 1) / 2
        assert set(events["event_id"][last_place <= 12]) <= set(clicked["event_id"])
    for task in {"rec", "src"} & full.keys():  # of the whole catalogue, which was read last
        shown = lists[(lists["task"] == task) & (lists["place"] <= 10)]["item_id"]
        assert full[task]["coverage@10"] == shown.nunique() / len(of_item)
        assert full[task]["mean_clicks@10"] == pytest.approx(shown.map(of_item).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", REGISTERED)
def test_a_registered_version_scores_as_its_run(name: str, evaluated: Any, texts: PreparedFolder) -> None:
    from trainer.registry.signature import example_requests
    from trainer.registry.store import open_model
    from trainer.registry.versions import register
    from trainer.serving.scorer import Scorer

    run_dir, _ = evaluated(name)
    version = register(run_dir, f"contract-{name}")
    scorer = Scorer.from_run(run_dir)
    requests = example_requests(texts, scorer.model.tasks)
    opened = open_model(f"models:/contract-{name}/{version}", f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    for scores, expected in zip(opened.score(requests), scorer.score_many(requests), strict=True):
        assert scores == pytest.approx(expected, abs=1e-5) and len(set(scores)) > 1


# those that are asked with a history and the words of a query alone
ASKED_BY_TEXT = [
    name
    for name in READ_TEXT
    if SRC in model_class(name).tasks and not model_class(name).needs & {"users", "history_queries"}
]


@pytest.mark.parametrize("world", ["texts", "words"])
@pytest.mark.parametrize("name", ASKED_BY_TEXT)
def test_a_query_is_known_by_its_text(request: pytest.FixtureRequest, name: str, world: str) -> None:
    """A request brings its own query, whatever stands in that row of the prepared folder."""
    folder = request.getfixturevalue(world)
    model = new_model(name, folder).eval()
    batch = some_events(model, folder, 16)
    batch = batch.take(batch.task == SRC)
    expected = model.probability(scores_of(model, batch))
    scorer = scorer_of(model, folder)
    texts, item_ids = folder.query_texts(), folder.item_ids()
    requests = [
        {
            "task": "src",
            "query": texts[batch.query[b]],
            "history": [
                {"item_id": item_ids[item], "task": TASKS[task]}
                for item, task in zip(
                    batch.history_items[b][batch.history_mask[b]].tolist(),
                    batch.history_tasks[b][batch.history_mask[b]].tolist(),
                    strict=True,
                )
            ],
            "candidates": [item_ids[item] for item in batch.candidates[b].tolist()],
        }
        for b in range(batch.num_events)
    ]
    assert len({query["query"] for query in requests}) > 3
    assert_same(torch.tensor(scorer.score_many(requests[::-1])[::-1]), expected)


@pytest.mark.parametrize("name", [name for name in MODELS if "users" not in model_class(name).needs])
def test_a_request_is_answered_from_the_whole_catalogue(name: str, texts: PreparedFolder) -> None:
    """By a history longer than the model reads, whose items are left out; of a model with views by
    retrieval."""
    model, item_ids = new_model(name, texts).eval(), texts.item_ids()
    items = texts.catalog / "items.parquet"
    recommender = Recommender(
        scorer_of(model, texts), build_retrieval(model), {}, items, users=NoUsers("unknown")
    )
    length = model.world.data.history_max + 3
    history = [{"item_id": item_id, "task": "rec"} for item_id in item_ids[:length]]
    asked = {REC: {"task": "rec"}, SRC: {"task": "src", "query": texts.query_texts()[0]}}
    for task in model.tasks:
        answer = recommender.recommend({**asked[task], "history": history, "k": 5})
        found = [item["item_id"] for item in answer["items"]]
        assert len(set(found)) == 5 and not set(found) & set(item_ids[:length])
        assert answer["scores"] == sorted(answer["scores"], reverse=True)


@pytest.mark.parametrize("name", [name for name in MODELS if model_class(name).needs & {"texts", "users"}])
def test_a_model_that_reads_the_prepared_folder_is_not_registered(name: str, run_of: Any) -> None:
    from trainer.registry.versions import register

    with pytest.raises(RunError, match=f"{name} cannot be registered: it .*gensr evaluate"):
        register(run_of(name), f"contract-{name}")
