"""Every model computes on another device than the CPU: weights, tables and batches lie there, and nothing
that a loss or a score makes is left on the CPU."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.contract.elsewhere import AWAY, Placing, move
from tests.contract.models import MODELS, TRAINED, new_model, no_dropout, some_events, training_batches
from trainer.batch import Batch
from trainer.data.folder import PreparedFolder
from trainer.models.contract import Ranker


@pytest.fixture(autouse=True)
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # the device has none
    made = torch.tensor  # of the device it would be empty: torch's own holds no values
    monkeypatch.setattr(torch, "tensor", lambda data, device=None, **of: made(data, **of).to(device or "cpu"))
    with Placing():
        yield


def moved(model: Ranker) -> Ranker:
    move(model)
    model.set_tables(model.tables.to(AWAY))
    return model


def ready(model: Ranker, batch: Batch) -> Batch:
    return model.prepare(batch).to(AWAY)


def asked(model: Ranker, batch: Batch) -> dict[str, Tensor]:
    """All that evaluation and serving ask of a model."""
    device = model.device
    found = {
        "scores": model(batch, mode="score"),
        "catalogue": model.score_catalogue(batch),
        **{f"explained {name}": weights for name, weights in model.explain(batch).items()},
        **{f"represented {name}": vectors for name, vectors in model.representations(batch).items()},
    }
    for name, view in model.views().items():
        found[f"items of {name}"] = items = view.items(torch.arange(model.world.num_items, device=device))
        mean = items.mean(0) if view.centred else torch.zeros(view.width, device=device)
        found[f"asked of {name}"] = view.ask(batch, mean)
    if pre_ranking := model.pre_ranking():
        found["proposed"], found["pre-ranked"] = pre_ranking.propose(batch), pre_ranking.score(batch)
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_a_loss_and_its_gradients_are_those_of_the_cpu(name: str, texts: PreparedFolder) -> None:
    (batch,) = training_batches(name, texts, 16, 16)
    found = []
    for there in (False, True):
        model = new_model(name, texts, *no_dropout(name)).train()
        model = moved(model) if there else model
        batch = model.prepare(batch)
        torch.manual_seed(0)
        loss, _ = model(batch.to(AWAY) if there else batch)
        loss.backward()
        gradients = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
        assert {loss.device, *(gradient.device for gradient in gradients)} == {model.device}
        found.append(torch.cat([loss.detach()[None], *(one.flatten() for one in gradients)]).cpu())
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_cpu(name: str, texts: PreparedFolder) -> None:
    found = []
    for model in (new_model(name, texts), moved(new_model(name, texts))):
        batch = model.prepare(some_events(model, texts))
        model.ready_to_serve()
        with torch.no_grad():
            found.append(asked(model.eval(), batch.to(model.device)))
        assert {answer.device for answer in found[-1].values()} == {model.device}
    here, there = found
    torch.testing.assert_close(
        {what: answer.cpu() for what, answer in there.items()}, here, atol=1e-4, rtol=1e-4
    )


def test_what_is_left_on_the_cpu_is_noticed(texts: PreparedFolder) -> None:
    model = moved(new_model("sasrec", texts)).eval()
    batch = ready(model, some_events(model, texts))
    model(batch, mode="score")
    with pytest.raises(AssertionError, match="reads a tensor of the CPU"):
        model(replace(batch, history_items=batch.history_items.cpu()), mode="score")
