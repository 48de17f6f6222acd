"""DIN beside RecBole's: users, log-odds with running and with batch statistics, loss."""

import torch.nn.functional as F

from tests.parity.oracles import load, renamed, sizes_of
from tests.tiny_world import make_world
from trainer.models.baselines.din import Din, DinSettings


def names_of(widths: tuple[list[int], list[int]]) -> dict[str, str]:
    """RecBole numbers dropout, linear map and activation of each width, and in the head a norm."""
    attention = {
        f"attention.att_mlp_layers.mlp_layers.{1 + 3 * i}.": f"interest.maps.{i}."
        for i in range(len(widths[0]))
    }
    linears = {f"dnn_mlp_layers.mlp_layers.{1 + 4 * i}.": f"head.maps.{i}." for i in range(len(widths[1]))}
    norms = {f"dnn_mlp_layers.mlp_layers.{2 + 4 * i}.": f"head.norms.{i}." for i in range(len(widths[1]))}
    others = {
        "item_embedding.": "items.",
        "attention.dense": "interest.output",
        "dnn_predict_layers": "head.output",
    }
    return {**attention, **linears, **norms, **others}


def test_oracle_din():
    oracle = load("DIN")
    sizes, hyper, inputs = sizes_of(oracle, "item_embedding.weight"), oracle.hyper, oracle.inputs
    widths = hyper["attention_mlp"], hyper["fc"]
    settings = DinSettings(dim=sizes["dim"], attention_dims=tuple(widths[0]), head_dims=tuple(widths[1]))
    model = Din(settings, make_world(sizes["num_items"])).eval()
    state = renamed(oracle.weights, names_of(widths))
    model.core.load_state_dict({n: w for n, w in state.items() if not n.endswith("num_batches_tracked")})
    given = (inputs["item_seq"], inputs["candidates"])

    oracle.check("user", model.core.user(*given))
    logits = model.core(*given)
    oracle.check("logits", logits)
    oracle.check("scores", model.probability(logits))
    logits = model.train().core(*given)
    oracle.check("train_logits", logits)
    oracle.check("loss", F.binary_cross_entropy_with_logits(logits, inputs["labels"]))
