"""SASRec beside RecBole's: hidden state, scores and the cross-entropy with its column for padding."""

import torch

from tests.parity.oracles import RECBOLE_NAMES, load, renamed, sizes_of
from tests.tiny_world import make_world
from trainer.models.baselines.sasrec import SasRec, SasRecSettings
from trainer.models.layers.sequence import last_step


def test_oracle_sasrec():
    oracle = load("SASRec")
    sizes, hyper = sizes_of(oracle, "item_embedding.weight"), oracle.hyper
    settings = SasRecSettings(
        dim=sizes["dim"],
        num_layers=hyper["layers"],
        num_heads=hyper["heads"],
        ffn_dim=hyper["ffn"],
        softmax_over_padding=True,
    )
    length = len(oracle.weights["position_embedding.weight"])
    model = SasRec(settings, make_world(sizes["num_items"], history_max=length)).eval()
    model.core.load_state_dict(renamed(oracle.weights, RECBOLE_NAMES))

    hidden = last_step(model.core(oracle.inputs["item_seq"]), oracle.inputs["item_length"])

    oracle.check("hidden", hidden)
    oracle.check("scores", model.core.items(scores_of=hidden, with_padding=True))
    oracle.check("loss", model.next_item(hidden, oracle.inputs["target"]))
    assert torch.equal((oracle.inputs["item_seq"] != 0).sum(1), oracle.inputs["item_length"])
