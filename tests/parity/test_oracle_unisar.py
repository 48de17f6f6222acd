"""UniSAR beside its authors' code: vectors, both kinds of history, scores of both tasks and every term of
the loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.oracles import Oracle, load
from trainer.models.baselines.unisar import UniSarCore, UniSarSettings
from trainer.models.layers.attention import masked_mean
from trainer.models.layers.embedding import ItemTable, WordMean

TORCH_LAYERS = {  # the reference's modules → ours
    "rec_transformer.transformer_encoder": "within_rec",
    "src_transformer.transformer_encoder": "within_src",
    "global_transformer.transformer_encoder": "across",
    "rec_cross_fusion": "rec_fusion",
    "src_cross_fusion": "src_fusion",
}
SAME = {
    "session_embedding.query_feat.query_encoder.word_embedding.weight": "words.words.weight",
    "session_embedding.query_feat.query_trans": "text_map",
    "session_embedding.item_feat.item_id_emb.weight": "items.weight",
    "session_embedding.item_feat.item_trans": "item_map",
    "session_embedding.user_feat.user_trans": "user_map",
    "global_pos_emb.pe.weight": "positions.weight",
    "rec_pos.pe.weight": "rec_positions.weight",
    "src_pos.pe.weight": "src_positions.weight",
    "feature_alignment.infoNCE_loss.temp": "query_item.temperature",
    "feature_alignment.infoNCE_loss.weight_matrix": "query_item.weight",
    "rec_his_cl.infoNCE_temp": "rec_alignment.temperature",
    "rec_his_cl.weight_matrix": "rec_alignment.weight",
    "src_his_cl.infoNCE_temp": "src_alignment.temperature",
    "src_his_cl.weight_matrix": "src_alignment.weight",
    "rec_his_attn_pooling.W": "rec_pooling.weight",
    "src_his_attn_pooling.W": "src_pooling.weight",
    "rec_query": "no_query.weight",
    **{f"ple_layer.tower.{t}.mlp": f"mixture.towers.{t}" for t in range(2)},
    **{f"ple_layer.task_gates.0.{t}.0": f"mixture.gates.{t}" for t in range(2)},
    "rec_fc_layer.fc": "mixture.heads.0",
    "src_fc_layer.fc": "mixture.heads.1",
}


def torch_layer_names(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """nn.TransformerEncoderLayer's or DecoderLayer's tensor → PostNormLayer's."""
    decoder = "fusion" in name
    for old, new in {
        "self_attn": "attention",
        "multihead_attn": "cross",
        "out_proj": "output",
        "linear1": "inner",
        "linear2": "outer",
        "norm1": "attention_norm",
        "norm3": "norm",
        "norm2": "cross_norm" if decoder else "norm",
        "layers.": "",
    }.items():
        name = name.replace(old, new, 1)
    if "in_proj" not in name:
        return {name: tensor}
    names = [name.replace("in_proj_", f"{part}.") for part in ("query", "key", "value")]
    return dict(zip(names, tensor.chunk(3), strict=True))


def moved(name: str, prefixes: dict[str, str]) -> str | None:
    """The name with its first part replaced; None where no first part fits."""
    return next((new + name[len(old) :] for old, new in prefixes.items() if name.startswith(old)), None)


def state_of(oracle: Oracle, core: UniSarCore) -> dict[str, Tensor]:
    own = core.state_dict()
    state: dict[str, Tensor] = {}
    for name, tensor in oracle.weights.items():
        renamed, layer = moved(name, SAME), moved(name, TORCH_LAYERS)
        if renamed is not None:
            state[renamed] = tensor.reshape(own[renamed].shape)
        elif layer is not None:
            state |= torch_layer_names(layer, tensor)
    state |= {"users.weight": user_table(oracle), "categories.words.weight": category_table(oracle)}
    num_experts = oracle.hyper["ple"]["specific"]
    experts = [f"task_experts.0.{t}.{k}" for t in range(2) for k in range(num_experts)]
    experts += [f"share_experts.0.{k}" for k in range(num_experts)]
    for part in ("weight", "bias"):
        tensors = [oracle.weights[f"ple_layer.{expert}.mlp.0.{part}"] for expert in experts]
        state[f"mixture.experts.0.{part}"] = torch.cat(tensors)
    return state


def user_table(oracle: Oracle) -> Tensor:
    """The reference has a feature beside the user's id: both as one row. Row 0 is ours."""
    ids = oracle.weights["session_embedding.user_feat.user_id_emb.weight"]
    features = oracle.weights["session_embedding.user_feat.onehot_feat1_emb.weight"]
    rows = torch.cat([ids, features[oracle.inputs["user_feature"]]], 1)
    return torch.cat([torch.zeros_like(rows[:1]), rows])


def category_table(oracle: Oracle) -> Tensor:
    """The reference joins the vectors of two levels: rows with zeros for the other level, doubled because
    ours is the mean. Its category 0 is a row of zeros that counts."""
    first, second = (
        oracle.weights[f"session_embedding.item_feat.{level}_level_category_id_emb.weight"]
        for level in ("first", "second")
    )
    rows = 2 * torch.block_diag(first, second)
    return torch.cat([torch.zeros_like(rows[:1]), rows])


class Reference:
    """The oracle's inputs as our core's."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.inputs, hyper = oracle, oracle.inputs, oracle.hyper
        weights = oracle.weights
        user_width, item_width = (
            sum(weights[f"session_embedding.{table}.weight"].shape[1] for table in tables)
            for tables in (
                ("user_feat.user_id_emb", "user_feat.onehot_feat1_emb"),
                (
                    "item_feat.first_level_category_id_emb",
                    "item_feat.second_level_category_id_emb",
                ),
            )
        )
        settings = UniSarSettings(
            id_dim=hyper["id_dim"],
            dim=hyper["d"],
            num_layers=hyper["layers"],
            num_heads=hyper["heads"],
            ffn_dim=hyper["ffn"],
            num_experts=hyper["ple"]["specific"],
            expert_dim=hyper["ple"]["expert"],
            tower_dims=tuple(hyper["ple"]["tower"]),
            head_dims=tuple(hyper["fc"][:-1]),
        )
        self.first_categories = len(weights["session_embedding.item_feat.first_level_category_id_emb.weight"])
        self.core = UniSarCore(
            num_users=len(weights["session_embedding.user_feat.user_id_emb.weight"]),
            num_items=len(weights["session_embedding.item_feat.item_id_emb.weight"]) - 1,
            num_words=len(weights["session_embedding.query_feat.query_encoder.word_embedding.weight"]) - 1,
            lengths=tuple(len(weights[f"{n}.pe.weight"]) for n in ("global_pos_emb", "rec_pos", "src_pos")),
            settings=settings,
            num_categories=len(category_table(oracle)) - 1,
        ).eval()
        # several tables side by side there, of widths of their own
        core, dim = self.core, hyper["d"]
        core.users, core.user_map = ItemTable(core.users.num_items, user_width), nn.Linear(user_width, dim)
        core.categories = WordMean(len(category_table(oracle)) - 1, item_width)
        core.item_map = nn.Linear(hyper["id_dim"] + dim + item_width, dim)
        self.core.load_state_dict(state_of(oracle, self.core))

    def items(self, ids: Tensor) -> Tensor:
        levels = [self.inputs["item_category1"][ids] + 1]
        levels.append(self.inputs["item_category2"][ids] + 1 + self.first_categories)
        return self.core.item_vectors(ids, self.inputs["item_caption"][ids], torch.stack(levels, -1))

    def history(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slots, which are sessions, which are real; and below, the pairs of query and item in them."""
        entries, search = self.inputs["history"], self.inputs["history_type"] == 2
        clicks, queries = self.session_parts(entries * search)
        sessions = queries + masked_mean(clicks, self.inputs["session_items"][entries * search] != 0)
        slots = torch.where(search[..., None], sessions, self.items(entries * ~search))
        return slots, search, entries != 0

    def session_parts(self, sessions: Tensor) -> tuple[Tensor, Tensor]:
        clicks = self.items(self.inputs["session_items"][sessions])
        return clicks, self.core.text_vectors(self.inputs["session_query"][sessions])

    def query_item_loss(self) -> Tensor:
        entries, search = self.inputs["history"], self.inputs["history_type"] == 2
        sessions = entries[search & (entries != 0)]
        clicks, queries = self.session_parts(sessions)
        real = self.inputs["session_items"][sessions] != 0
        pairs = (queries[:, None].expand_as(clicks)[real], clicks[real])
        others = (
            self.core.text_vectors(self.inputs["align_neg_query"]),
            self.items(self.inputs["align_neg_item"]),
        )
        return self.core.query_item(*pairs, *others).mean()


def test_oracle_unisar():
    oracle = load("UniSAR")
    reference, inputs, hyper = Reference(oracle), oracle.inputs, oracle.hyper
    core = reference.core
    candidates = torch.cat([inputs["item"][:, None], inputs["neg_items"]], 1)
    items = reference.items(candidates)
    labels = torch.zeros(candidates.shape)
    labels[:, 0] = 1

    histories = core.encode(*reference.history())

    oracle.check("item_vectors", items)
    for name, ours in {"src2rec": "s2r", "rec2rec": "r2r", "rec2src": "r2s", "src2src": "s2s"}.items():
        slots = oracle.outputs[name].shape[1]
        oracle.check(name, getattr(histories, ours)[:, :slots])
        assert not getattr(histories, ours)[:, slots:].any()
    for name, interest in zip(("rec", "src"), core.interests(histories, items), strict=True):
        oracle.check(f"{name}_interest", interest)
    alignment, query_item = core.alignment(histories).mean(), reference.query_item_loss()
    oracle.check("loss_history", alignment)
    oracle.check("loss_query_item", query_item)
    for task in ("rec", "src"):
        search = torch.full((len(candidates),), task == "src")
        query = core.query_vectors(inputs["query"], search)
        scores = core(histories, items, core.user_vectors(inputs["user"] + 1), query, search)
        oracle.check(f"scores_{task}", scores.sigmoid())
        click = F.binary_cross_entropy_with_logits(scores, labels)
        oracle.check(f"loss_{task}_click", click)
        total = click + hyper["q_i"]["weight"] * query_item + hyper["history"]["weight"] * alignment
        oracle.check(f"loss_{task}", total)
