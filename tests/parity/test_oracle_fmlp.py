"""FMLP-Rec beside its authors' code: hidden state, scores and loss."""

import torch

from tests.parity.oracles import load, renamed, sizes_of
from tests.tiny_world import make_world
from trainer.models.baselines.fmlp import Fmlp, FmlpSettings, balanced_bce
from trainer.models.layers.embedding import inner_products

NAMES = {
    "item_embeddings.": "items.",
    "position_embeddings.": "positions.",
    "item_encoder.layer.": "blocks.",
    "filterlayer.complex_weight": "filter",
    "filterlayer.LayerNorm": "filter_norm",
    "intermediate.dense_1": "inner",
    "intermediate.dense_2": "outer",
    "intermediate.LayerNorm": "norm",
    "LayerNorm": "norm",
}


def test_oracle_fmlp():
    oracle = load("FMLP")
    sizes, hyper, inputs = sizes_of(oracle, "item_embeddings.weight"), oracle.hyper, oracle.inputs
    settings = FmlpSettings(dim=sizes["dim"], num_layers=hyper["layers"], ffn_dim=hyper["ffn"])
    model = Fmlp(settings, make_world(sizes["num_items"], history_max=hyper["max_len"])).eval()
    state = renamed(oracle.weights, NAMES)
    model.core.load_state_dict({n: w[0] if n.endswith(".filter") else w for n, w in state.items()})
    items = model.core.items

    hidden = model.core(inputs["item_seq"])[:, -1]

    oracle.check("hidden", hidden)
    oracle.check("scores", inner_products(hidden, items(inputs["candidates"])))
    oracle.check("scores_all", items(scores_of=hidden, with_padding=True))
    pairs = torch.stack([inputs["positive"], inputs["negative"]], 1)
    labels = torch.tensor([1.0, 0.0]).expand(len(pairs), -1)
    oracle.check("loss", balanced_bce(inner_products(hidden, items(pairs)), labels))
