"""UnifiedSSR beside its authors' code, faults included: encoder, windows, scores and losses of both tasks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.oracles import Oracle, load, renamed
from trainer.models.baselines.unifiedssr import UnifiedSsrCore, UnifiedSsrSettings
from trainer.models.layers.nce import nce
from trainer.models.layers.sequence import last_step

NAMES = {
    "next_product_search_w": "mix.weight",
    "u_embed.lut": "users",
    "p_embed.lut": "products",
    "q_t_embed.lut": "words.words",
    "encoder.norm": "norm",
    "self_attn": "attention",
    "cross_attn": "cross",
    "linears.0": "query",
    "linears.1": "key",
    "linears.2": "value",
    "linears.3": "output",
    "feed_forward.w_1": "inner",
    "feed_forward.w_2": "outer",
    "sublayer.0.norm": "norms.0",
    "sublayer.1.norm": "norms.1",
    "sublayer.2.norm": "norms.2",
    ".a_2": ".weight",
    ".b_2": ".bias",
    "seq_partition.offset_predictor": "windows.offsets",
    "seq_partition.sub_seq_coder.width_bias": "windows.width_bias",
}


def state_of(oracle: Oracle, core: UnifiedSsrCore) -> dict[str, Tensor]:
    own, state = core.state_dict(), renamed(oracle.weights, NAMES)
    # only the last layer acts, and only that one is in the file
    (acting,) = {name.split(".")[2] for name in state if name.startswith("encoder.layers.")}
    state = renamed(state, {f"encoder.layers.{acting}.": "layers.0."})
    # the reference has no row for an unknown user
    state["users.weight"] = torch.cat([torch.zeros_like(state["users.weight"][:1]), state["users.weight"]])
    return {name: tensor.reshape(own[name].shape) for name, tensor in state.items()}


def core_of(oracle: Oracle) -> UnifiedSsrCore:
    hyper = oracle.hyper
    settings = UnifiedSsrSettings(
        dim=hyper["d"],
        num_layers=1,
        num_heads=hyper["heads"],
        ffn_dim=hyper["hidden"],
        num_sessions=hyper["sub_sequences"],
        windows="hard",
        causal=False,
    )
    rows = [len(oracle.weights[f"{table}.lut.weight"]) for table in ("u_embed", "p_embed", "q_t_embed")]
    core = UnifiedSsrCore(rows[0], rows[1] - 1, rows[2] - 1, settings).eval()
    core.load_state_dict(state_of(oracle, core))
    return core


def step_loss(core: UnifiedSsrCore, steps: Tensor, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Mean over the real steps."""
    items = torch.cat([inputs["targets"][..., None], inputs["negatives"]], 2)
    scores = core.scores(steps[mask], items[mask])
    return nce(scores[:, 0], scores[:, 1:]).mean()


def mean_of_others(values: Tensor) -> Tensor:
    """Mean over those that are not 0."""
    return values.sum() / (values != 0).sum()


def test_oracle_unifiedssr_recommendation():
    oracle = load("UnifiedSSR")
    core, inputs = core_of(oracle), oracle.inputs
    mask = inputs["products"] != 0
    padded = torch.full((len(mask),), mask.shape[1])

    steps = core.recommend(inputs["user"] + 1, inputs["products"], mask)
    encoded = core.with_sessions(steps, mask, padded)

    oracle.check("encoded_rec", steps)
    oracle.check("windows_rec", core.windows(steps, padded))
    oracle.check("encoded_rec_session", encoded.steps)
    scores = core.scores(last_step(encoded.steps, inputs["last"] + 1), inputs["candidates"])
    oracle.check("scores_rec", scores)
    oracle.check("loss_rec", step_loss(core, encoded.steps, inputs, mask))
    oracle.check("corr_rec", mean_of_others(encoded.differences()))


def test_oracle_unifiedssr_search():
    oracle = load("UnifiedSSR")
    core, inputs = core_of(oracle), oracle.inputs
    mask = inputs["products"] != 0
    padded = torch.full((len(mask),), mask.shape[1])
    products = F.pad(inputs["products"], (1, 0))
    masks = (F.pad(mask, (1, 0), value=first) for first in (False, True))  # only Q sees the first step

    both = core.search(inputs["user"] + 1, products, inputs["query_terms"], *masks)
    p, q = (core.with_sessions(steps[:, 1:], mask, padded) for steps in both)  # without the first step

    p_last, q_last = (last_step(encoded.steps, inputs["last"] + 1) for encoded in (p, q))
    oracle.check("scores_src", core.scores(core.mix(p_last, q_last), inputs["candidates"]))
    losses = (step_loss(core, encoded.steps, inputs, mask) for encoded in (p, q))
    oracle.check("loss_src", core.mix(*losses))
    apart = mean_of_others(p.differences()) + mean_of_others(q.differences())
    oracle.check("corr_src", apart - mean_of_others(p.agreement(q)))
