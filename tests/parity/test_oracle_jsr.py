"""JSR of 2020 beside a public re-implementation: scores of all items, language models, and the losses."""

from typing import Any

import torch

from tests.parity.oracles import load, renamed
from tests.tiny_world import make_world
from trainer.models.baselines.jsr import Jsr, JsrSettings, interaction_losses

NAMES = {
    "user_embeddings": "users",
    "item_embeddings": "items",
    "keyword_embeddings": "language_model.words",
    "item_projector": "language_model.projection",
    "scorer.linear_layers": "scorer.layers",
}
TABLES = ("users.weight", "items.weight", "language_model.words.weight")


def test_oracle_jsr():
    oracle = load("JSR")
    hyper, given, weights = oracle.hyper, oracle.inputs, renamed(oracle.weights, NAMES)
    num_users, num_items, num_words = (len(weights[name]) for name in TABLES)
    settings = JsrSettings(
        variant=2020,
        dim=hyper["d"],
        word_dim=hyper["word_dim"],
        num_layers=hyper["layers"],
        background=1 - hyper["lm_weight"],
    )
    core: Any = Jsr(settings, make_world(num_items, num_users, num_words=num_words)).eval().core
    for name in TABLES:
        weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 1, 0))  # they have no row for padding
    core.load_state_dict(weights)
    users, words, clicked = given["user"] + 1, given["keywords"] + 1, given["item"] + 1

    every = torch.arange(1, num_items + 1)
    rec, src = core(users, words, every[None], every[None])

    has_query = (words != 0).any(1, keepdim=True)
    oracle.check("scores", torch.where(has_query, src, rec))
    oracle.check("item_language_models", core.language_model.log_probabilities(core.items(every)).exp())
    items = torch.stack([clicked, given["neg_item"] + 1], 1)
    labels = torch.tensor([[1.0, 0.0]]).expand(items.shape)
    loss_rec = interaction_losses(core.interactions(users, items), labels).mean()
    loss_words = core.word_losses(words, clicked, published=True).mean()
    oracle.check("loss_rec", loss_rec)
    oracle.check("loss_words", loss_words)
    oracle.check("loss", loss_rec + hyper["loss_weight"] * loss_words)
