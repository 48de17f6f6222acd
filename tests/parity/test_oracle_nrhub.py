"""NRHUB beside the public code of its form without texts: scores and loss."""

import torch.nn.functional as F

from tests.parity.oracles import load, renamed
from trainer.models.baselines.nrhub import NrhubCore, NrhubSettings
from trainer.models.layers.embedding import inner_products

NAMES = {
    "photo_embedding_layer": "items",
    "query_embedding_layer": "queries",
    "search_query_att": "query_pool",
    "search_click_att": "click_pool",
    "browse_photo_att": "browse_pool",
    "photo_rep.0": "item_map",
    "user_rep.0": "view_map",
    "user_rep.2": "view_pool",
    ".Uq": ".projection",
    ".vq": ".query.weight",
}


def test_oracle_nrhub():
    oracle = load("NRHUB")
    inputs, hyper = oracle.inputs, oracle.hyper
    settings = NrhubSettings(dim=hyper["d"], hidden_dim=hyper["dense"], view_dim=hyper["view_attention"])
    num_items = len(oracle.weights["photo_embedding_layer.weight"]) - 1
    num_queries = len(oracle.weights["query_embedding_layer.weight"]) - 1
    core = NrhubCore(num_items, num_queries, settings).eval()
    state, own = renamed(oracle.weights, NAMES), core.state_dict()
    core.load_state_dict({name: tensor.reshape(own[name].shape) for name, tensor in state.items()})

    user = core(inputs["queries"], inputs["search_clicks"], inputs["browsed"])
    scores = inner_products(user, core.item_vectors(inputs["candidates"]))

    oracle.check("scores", scores.sigmoid())
    oracle.check("loss", F.binary_cross_entropy_with_logits(scores, inputs["labels"]))
