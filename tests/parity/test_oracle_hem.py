"""HEM beside a public implementation: M, scores, and the loss with and without norms of tables."""

import torch
import torch.nn.functional as F

from tests.parity.oracles import load, renamed
from tests.parity.product_search import SHARED_NAMES, check_shared, with_shared_negatives
from tests.tiny_world import make_world
from trainer.models.baselines.hem import Hem, HemSettings


def test_oracle_hem():
    oracle = load("HEM")
    given, weights = oracle.inputs, renamed(oracle.weights, SHARED_NAMES)
    entities = weights.pop("entity_embedding_layer.weight")  # users, then items: one table there
    biases = weights.pop("entity_bias.weight")
    num_users = int(torch.cat([given["candidates"].flatten(), given["neg_items"]]).min())
    assert int(given["users"].max()) < num_users
    weights["users.weight"] = F.pad(entities[:num_users], (0, 0, 1, 0))
    weights["items.weight"] = F.pad(entities[num_users:], (0, 0, 1, 0))
    weights["item_bias.weight"] = F.pad(biases[num_users:], (0, 0, 1, 0))
    num_terms, dim = weights["words.vectors.weight"].shape
    settings = HemSettings(dim=dim, query_weight=oracle.hyper["lambda"], count_query_padding=True)
    world = make_world(len(entities) - num_users, num_users, num_words=num_terms - 1)
    core = Hem(settings, world).eval().core
    core.load_state_dict(weights)

    users = given["users"] + 1
    question = core(given["query_words"], users)

    items = with_shared_negatives(given["items"], given["neg_items"]) - num_users + 1
    candidates = given["candidates"] - num_users + 1
    check_shared(oracle, core, question, candidates, items, lambda *drawn: core.user_text_loss(users, *drawn))
