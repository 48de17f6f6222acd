"""TEM beside its public code: scores and both losses."""

from tests.parity import product_search
from tests.parity.oracles import load
from tests.tiny_world import make_world
from trainer.models.baselines.tem import Tem, TemSettings

NAMES = {
    "transformer_encoder.layer_norm": "norm",
    "transformer_encoder.transformer_inter": "layers",
    "self_attn": "attention",
    "feed_forward.layer_norm": "ffn_norm",
    "feed_forward.w_1": "inner",
    "feed_forward.w_2": "outer",
}


def test_oracle_tem():
    oracle = load("TEM")
    sizes, hyper = product_search.sizes(oracle), oracle.hyper
    settings = TemSettings(
        dim=sizes.pop("dim"), num_layers=hyper["layers"], num_heads=hyper["heads"], ffn_dim=hyper["ffn"]
    )
    model = Tem(settings, make_world(**sizes)).eval()
    model.core.load_state_dict(product_search.state(oracle, NAMES))
    given = product_search.inputs(oracle)

    question = model.core(given["query_words"], given["history"])

    product_search.check(oracle, model.core, question)
