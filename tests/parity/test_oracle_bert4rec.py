"""BERT4Rec beside RecBole's: the vector of [MASK], scores, and the loss over given masks."""

import torch

from tests.parity.oracles import RECBOLE_NAMES, load, renamed
from tests.tiny_world import make_world
from trainer.models.baselines.bert4rec import Bert4Rec, Bert4RecSettings
from trainer.models.layers.sequence import last_step

NAMES = {
    **{"output_ffn": "output", "output_ln": "output_norm", "output_bias": "item_bias.weight"},
    **RECBOLE_NAMES,
}


def test_oracle_bert4rec():
    oracle = load("BERT4Rec")
    hyper, inputs = oracle.hyper, oracle.inputs
    length, dim = oracle.weights["position_embedding.weight"].shape
    settings = Bert4RecSettings(
        dim=dim,
        num_layers=hyper["layers"],
        num_heads=hyper["heads"],
        ffn_dim=hyper["ffn"],
        mask_ratio=inputs["mask_index"].shape[1] / length,
        skip_first_position=True,
        softmax_over_padding=True,
    )
    model = Bert4Rec(settings, make_world(hyper["mask_id"] - 1, history_max=length)).eval()
    state = renamed(oracle.weights, NAMES)
    state["item_bias.weight"] = state["item_bias.weight"][:, None]
    model.core.load_state_dict(state)
    assert model.core.mask == hyper["mask_id"]

    hidden = last_step(model.core(inputs["test_seq"]), (inputs["test_seq"] != 0).sum(1))

    oracle.check("hidden", hidden)
    oracle.check("scores", model.core.all_scores(hidden, with_padding=True))
    masked = inputs["mask_seq"] == model.core.mask
    ids = torch.where(masked, inputs["item_seq"], inputs["mask_seq"])
    used = inputs["mask_index"] > 0
    assert torch.equal(ids.gather(1, inputs["mask_index"])[used], inputs["mask_target"][used])
    oracle.check("loss", model.mask_loss(model.core(inputs["mask_seq"]), masked, ids))
