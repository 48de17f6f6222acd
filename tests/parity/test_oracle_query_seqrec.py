"""Query-SeqRec beside its authors' code, with their block: hidden state, scores and loss."""

import torch

from tests.parity.oracles import load, renamed
from tests.tiny_world import make_world
from trainer.models.baselines.query_seqrec import QuerySeqRec, QuerySeqRecSettings
from trainer.models.layers.sequence import last_step

ATOL = 1e-5  # the block without a residual amplifies rounding
NAMES = {
    "item_emb": "items",
    "type_emb": "kinds",
    "pos_emb": "positions",
    "attention_layernorms.": "blocks.{}.attention_norm.",
    "forward_layernorms.": "blocks.{}.ffn_norm.",
    "attention_layers.": "blocks.{}.attention.",
    "forward_layers.": "blocks.{}.",
    "linear_layers.0": "query",
    "linear_layers.1": "key",
    "linear_layers.2": "value",
    "output_linear": "output",
    "conv1": "inner",
    "conv2": "outer",
    "last_layernorm": "norm",
}


def our_name(name: str) -> str:
    """blocks.{}.attention.0.query → blocks.0.attention.query"""
    if "{}" not in name:
        return name
    parts = name.split(".")
    place = next(place for place, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:place] + parts[place + 1 :]).format(parts[place])


def test_oracle_query_seqrec():
    oracle = load("Query-SeqRec")
    inputs, hyper = oracle.inputs, oracle.hyper
    rows, num_items = len(oracle.weights["item_emb.weight"]), oracle.outputs["scores_all"].shape[1]
    settings = QuerySeqRecSettings(
        dim=hyper["d"],
        num_layers=hyper["layers"],
        num_heads=hyper["heads"],
        length=hyper["max_len"],
        published_block=True,
    )
    model = QuerySeqRec(settings, make_world(num_items, num_words=rows - 1 - num_items)).eval()
    state = {our_name(name): tensor for name, tensor in renamed(oracle.weights, NAMES).items()}
    state["items.weight"] = state["items.weight"].roll(1, 0)  # the reference's padding is its last row
    own = model.core.state_dict()
    model.core.load_state_dict({name: tensor.reshape(own[name].shape) for name, tensor in state.items()})
    ids, is_query, follows = (inputs["tokens"] + 1) % rows, inputs["types"] == 0, inputs["types"] < 2

    steps = model.core(ids, is_query)
    hidden = last_step(steps, inputs["last"] + 1)
    scores = model.core.items(scores_of=hidden)
    losses = model.step_losses(steps, (inputs["labels"] + 1) * follows)

    oracle.check("hidden", hidden, ATOL)
    oracle.check("scores_all", scores, ATOL)
    oracle.check("scores", scores.gather(1, inputs["candidates"]), ATOL)
    oracle.check("loss", losses.sum() / follows.sum(), ATOL)
    assert torch.equal((ids[..., 0] != 0).sum(1) - 1, inputs["last"])
