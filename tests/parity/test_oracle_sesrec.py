"""SESRec beside its authors' code: histories, how they are split, scores and every term of the loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.oracles import Oracle, load, renamed
from trainer.models.baselines.sesrec import SesRecCore, SesRecSettings
from trainer.models.layers.attention import masked_mean

NAMES = {
    "query_item_feat.item_feat.item_id_emb": "items",
    "query_item_feat.query_id_emb": "queries",
    "query_item_feat.query_word_segs_emb": "words.words",
    "query_item_feat.query_trans": "query_map",
    "query_item_feat.item_trans": "item_map",
    "user_feat.user_id_emb": "users",
    "rec_his_transformer_layer.layer": "rec_layers",
    "src_his_transformer_layer.layer": "src_layers",
    "multi_head_attention.LayerNorm": "attention_norm",
    "multi_head_attention.multi_head_attention": "attention",
    "attention.out_proj": "attention.output",
    "feed_forward.dense_1": "inner",
    "feed_forward.dense_2": "outer",
    "feed_forward.LayerNorm": "norm",
    "rec_pos_emb.pe": "rec_positions",
    "src_pos_emb.pe": "src_positions",
    "interest_contrast.co_att.W1": "co_attention.weight",
    "interest_contrast.co_att.Wq": "co_attention.rec_query",
    "interest_contrast.co_att.Wd": "co_attention.src_query",
    "rec_his_att_pooling.W": "rec_pooling.weight",
    "src_his_att_pooling.W": "src_pooling.weight",
    "fc_layer.fc": "head",
    "feature_alignment.infoNCE_loss.temp": "query_item.temperature",
    "feature_alignment.infoNCE_loss.weight_matrix": "query_item.weight",
}


SOURCES = "query_item_feat.query_search_source_emb.weight"  # of a query; our data does not know them


def state_of(oracle: Oracle, core: SesRecCore) -> dict[str, Tensor]:
    own = core.state_dict()
    state: dict[str, Tensor] = {}
    for name, tensor in renamed(oracle.weights, NAMES).items():
        if name == SOURCES:
            continue
        if "in_proj_" in name:
            parts = (name.replace("in_proj_", f"{part}.") for part in ("query", "key", "value"))
            state |= dict(zip(parts, tensor.chunk(3), strict=True))
        elif name == "users.weight":  # the reference has no row for an unknown user
            state[name] = torch.cat([torch.zeros_like(tensor[:1]), tensor])
        else:
            state[name] = tensor.reshape(own[name].shape)
    return state


def core_of(oracle: Oracle) -> SesRecCore:
    hyper = oracle.hyper
    rows = {name: len(tensor) for name, tensor in renamed(oracle.weights, NAMES).items() if tensor.dim()}
    width = {
        name: tensor.shape[-1] for name, tensor in renamed(oracle.weights, NAMES).items() if tensor.dim()
    }
    settings = SesRecSettings(
        dim=hyper["d"],
        query_dim=width["queries.weight"],
        word_dim=width["words.words.weight"],
        user_dim=width["users.weight"],
        num_layers=hyper["layers"],
        num_heads=hyper["heads"],
        head_dims=tuple(hyper["fc"][:-1]),
        margin=hyper["margin"],
        padding_in_co_attention=True,
    )
    core = SesRecCore(
        num_users=rows["users.weight"],
        num_items=rows["items.weight"] - 1,
        num_queries=rows["queries.weight"] - 1,
        num_words=rows["words.words.weight"] - 1,
        lengths=(rows["rec_positions.weight"], rows["src_positions.weight"]),
        settings=settings,
    ).eval()
    core.load_state_dict(state_of(oracle, core))
    return core


def test_oracle_sesrec():
    oracle = load("SESRec")
    core, inputs, hyper = core_of(oracle), oracle.inputs, oracle.hyper
    queries = core.query_vectors(inputs["query_id"], inputs["query_words"])
    clicks, real = core.item_vectors(inputs["query_items"]), inputs["query_items"] != 0
    candidates = torch.cat([inputs["positive"][:, None], inputs["negatives"]], 1)
    labels = torch.zeros(candidates.shape)
    labels[:, 0] = 1

    others = core.query_vectors(inputs["align_query_id"], inputs["align_query_words"])
    sources = oracle.weights[SOURCES]
    core.query_map.bias.data += sources[0]  # what padding is there: no query, of source 0
    rec, src = core.encode(
        core.item_vectors(inputs["rec_history"]),
        inputs["rec_history"] != 0,
        queries + sources[inputs["query_source"]] + masked_mean(clicks, real),
        inputs["query_id"] != 0,
    )
    scores = core(rec, src, core.item_vectors(candidates), core.users(inputs["user"] + 1))
    query_item = core.query_item(
        queries[:, :, None].expand_as(clicks)[real],
        clicks[real],
        others,
        core.item_vectors(inputs["align_items"]),
    ).mean()
    triplet = (rec.triplet(hyper["margin"]) + src.triplet(hyper["margin"])).mean()
    click = F.binary_cross_entropy_with_logits(scores, labels)

    for name, interests in {"rec": rec, "src": src}.items():
        oracle.check(f"{name}_encoded", interests.slots)
        oracle.check(f"coattention_{name}", interests.weights)
        assert torch.equal(interests.similar, oracle.outputs[f"similar_{name}"].bool())
        assert torch.equal(interests.dissimilar, oracle.outputs[f"dissimilar_{name}"].bool())
    oracle.check("scores", scores.sigmoid())
    oracle.check("loss_click", click)
    oracle.check("loss_query_item", query_item)
    oracle.check("loss_triplet", triplet)
    weights = hyper["weights"]
    oracle.check("loss", click + weights["query_item"] * query_item + weights["triplet"] * triplet)
