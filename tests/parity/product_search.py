"""The oracles of the public code of TEM (QEM, TEM, AEM_multihead, ZAM_multihead), where padding is the last
row of a table; and their losses."""

from typing import Any

import torch
from torch import Tensor

from tests.parity.oracles import Oracle, renamed
from trainer.models.layers.nce import nce, sampled_bce

NAMES = {
    "word_embeddings.weight": "words.vectors.weight",
    "word_bias": "words.bias.weight",
    "product_emb": "items",
    "query_encoder.f_W": "query.projection",
    "linear_query": "query",
    "linear_keys": "key",
    "linear_values": "value",
    "final_linear": "output",
}
TABLES = ("words.vectors.weight", "words.bias.weight", "items.weight")


def sizes(oracle: Oracle) -> dict[str, int]:
    num_terms = len(oracle.weights["word_embeddings.weight"]) - 1
    num_items, dim = oracle.weights["product_emb.weight"].shape
    return {"num_items": num_items - 1, "num_words": num_terms, "dim": dim}


def state(oracle: Oracle, names: dict[str, str] | None = None) -> dict[str, Tensor]:
    """Weights by our names, padding in row 0."""
    weights = renamed(oracle.weights, {**NAMES, **(names or {})})
    weights["words.bias.weight"] = weights["words.bias.weight"][:, None].clone()
    weights["words.bias.weight"][-1] = 0  # never looked at
    return {name: tensor.roll(1, 0) if name in TABLES else tensor for name, tensor in weights.items()}


def inputs(oracle: Oracle) -> dict[str, Tensor]:
    """Ids by our count: padding 0, the first row 1."""
    num_words, num_items = (
        len(oracle.weights[name]) for name in ("word_embeddings.weight", "product_emb.weight")
    )
    return {
        name: (ids + 1) % (num_words if "words" in name else num_items) for name, ids in oracle.inputs.items()
    }


def check(oracle: Oracle, core: Any, question_BD: Tensor) -> None:
    """Scores and losses of a question [B, D]."""
    given = inputs(oracle)
    oracle.check("scores", core.scores(question_BD, given["candidates"]))
    items_BC = torch.cat([given["target"][:, None], given["neg_items"]], 1)
    labels_BC = (torch.arange(items_BC.shape[1]) == 0).float().expand(items_BC.shape)
    ranking = sampled_bce(core.scores(question_BD, items_BC), labels_BC).mean()
    noise_BWK = given["neg_words"].view(*given["item_words"].shape, -1)
    text = core.text_loss(given["target"], given["item_words"], noise_BWK).mean()
    oracle.check("loss_ps", ranking)
    oracle.check("loss_words", text)
    oracle.check("loss", ranking + text)


# ---- the oracles whose negatives are shared by the batch (HEM, AEM, ZAM): padding is row 0 -----------------

SHARED_NAMES = {
    "word_embedding_layer": "words.vectors",
    "word_bias": "words.bias",
    "item_embedding_layer": "items",
    "attention_layer.query_projection": "attention.projection",
    "attention_layer.reduce_projection": "attention.heads",
    "query_projection": "query.projection",
}


def check_shared(
    oracle: Oracle,
    core: Any,
    question_BD: Tensor,
    candidates_BC: Tensor,
    items_BX: Tensor,
    users_loss: Any = None,
) -> None:
    """M, scores of candidates, and the losses: items [B, 1 + K] are the clicked item and the negatives."""
    given = oracle.inputs
    oracle.check("M", question_BD)
    oracle.check("scores", core.scores(question_BD, candidates_BC))
    words_BW = given["review_words"][:, None]
    noise_BWK = given["neg_words"].expand(len(words_BW), 1, -1)
    scores_BX = core.scores(question_BD, items_BX)
    loss_B = nce(scores_BX[:, 0], scores_BX[:, 1:]) + core.text_loss(items_BX[:, 0], words_BW, noise_BWK)
    if users_loss is not None:
        loss_B = loss_B + users_loss(words_BW, noise_BWK)
    oracle.check("loss_without_l2", loss_B.mean())
    oracle.check("loss", loss_B.mean() + oracle.hyper["l2"] * torch.stack(core.norms()).sum())


def with_shared_negatives(items_B: Tensor, negatives_K: Tensor) -> Tensor:
    """[B, 1 + K]"""
    return torch.cat([items_B[:, None], negatives_K.expand(len(items_B), -1)], 1)
