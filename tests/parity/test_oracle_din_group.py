"""DIN beside the form of the authors of SESRec and UniSAR, with items alone and with a history of search:
scores with running and with batch statistics, loss."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.oracles import ATOL, Oracle, load, renamed
from trainer.models.baselines.din import DinCore, DinSettings
from trainer.models.baselines.din_search import DinSearchCore, DinSearchSettings

UNIT = {
    "local_att.fc1.fc.0": "maps.0",
    "local_att.fc1.fc.1": "dice",
    "local_att.fc1.fc.2": "maps.1",
    "local_att.fc2": "output",
}
HEAD = {
    "fc_layer.fc.0": "head.maps.0",
    "fc_layer.fc.1": "head.norms.0",
    "fc_layer.fc.2": "head.maps.1",
    "fc_layer.fc.3": "head.norms.1",
    "fc_layer.fc.4": "head.output",
    ".bn.": ".norm.",
}


def load_state(core: nn.Module, oracle: Oracle, names: dict[str, str]) -> None:
    state = renamed(oracle.weights, {**names, **UNIT, **HEAD})
    if "words.words.weight" in state:
        # a query as a text of one word; the reference's padding has a vector that its norms see, so it is
        # one too
        state["words.words.weight"] = F.pad(state["words.words.weight"], (0, 0, 1, 0))
    core.load_state_dict({n: w[:, 0] if n.endswith(".alpha") else w for n, w in state.items()})


def check(oracle: Oracle, core: nn.Module, given: list[Tensor], atol: float) -> None:
    oracle.check("scores", core.eval()(*given).sigmoid(), atol)
    logits = core.train()(*given)
    oracle.check("train_scores", logits.sigmoid(), atol)
    oracle.check("loss", F.binary_cross_entropy_with_logits(logits, oracle.inputs["labels"]), atol)


def sizes(oracle: Oracle, table: str) -> dict[str, Any]:
    return {
        "dim": oracle.weights[table].shape[1],
        "attention_dims": tuple(oracle.hyper["attention_mlp"]),
        "head_dims": tuple(oracle.hyper["fc"][:-1]),
        "norm_over_padding": True,
    }


def test_oracle_din_group():
    oracle, table = load("DIN_iv4rec"), "photo_embedding_layer.weight"
    settings = DinSettings(variant="group", **sizes(oracle, table))
    core = DinCore(len(oracle.weights[table]) - 1, settings)
    load_state(core, oracle, {"photo_embedding_layer": "items", "attn.": "interest."})

    check(oracle, core, [oracle.inputs["browsed"], oracle.inputs["candidates"]], ATOL)


def test_oracle_din_search_history():
    oracle, table = load("DIN_search_history"), "item_embedding_layer.weight"
    num_queries = len(oracle.weights["query_embedding_layer.weight"])
    settings = DinSearchSettings(**sizes(oracle, table))
    core = DinSearchCore(len(oracle.weights[table]) - 1, num_queries, settings)
    names = {
        "item_embedding_layer": "items",
        "query_embedding_layer": "words.words",
        "attn1.": "of_queries.",
        "attn2.": "of_searches.",
        "attn3.": "of_browsed.",
    }
    load_state(core, oracle, names)
    queries, inputs = oracle.inputs["queries"], oracle.inputs
    given = [queries[..., None] + 1, queries != 0, inputs["search_clicks"], inputs["browsed"]]

    check(oracle, core, [*given, inputs["candidates"]], 5e-5)
