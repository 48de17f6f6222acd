"""USER beside its authors' code (repaired, without private features): cosines, scores and loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.oracles import Oracle, load, renamed
from trainer.models.baselines.user import UserCore, UserSettings

NAMES = {
    "user_embedding": "users",
    "embedding": "words",
    "word_attention.proj.0": "word_pool.projection",
    "word_attention.proj_v": "word_pool.query",
    "coattention.qd_linear": "co_attention.map",
    "coattention.W1": "co_attention.weight",
    "encoder_query.layer_stack.0": "word_layer",
    "encoder_session.layer_stack.0": "session_layer",
    "encoder_history.layer_stack.0": "history_layer",
    "slf_attn.w_qs": "query",
    "slf_attn.w_ks": "key",
    "slf_attn.w_vs": "value",
    "slf_attn.layer_norm": "attention_norm",
    "slf_attn.fc": "output",
    "pos_ffn.w_1": "inner",
    "pos_ffn.w_2": "outer",
    "pos_ffn.layer_norm": "norm",
    "joint_score_layer.0": "scorer",
}


def state_of(oracle: Oracle, core: UserCore) -> dict[str, Tensor]:
    own, state = core.state_dict(), renamed(oracle.weights, NAMES)
    del state["word_pool.query.bias"]  # the same for every word: a softmax does not see it
    # the reference has no row for an unknown user
    state["users.weight"] = torch.cat([torch.zeros_like(state["users.weight"][:1]), state["users.weight"]])
    return {name: tensor.reshape(own[name].shape) for name, tensor in state.items()}


def entries_of(core: UserCore, inputs: dict[str, Tensor]) -> Tensor:
    """Entries of the whole history; queries with a click stand at the places that the reference names."""
    texts = torch.cat([inputs["long_history"], inputs["short_history"]], 1)
    clicks = inputs["query_click_texts"]
    queries = texts.clone()
    searched = torch.zeros(texts.shape[:2], dtype=torch.bool)
    for row, places in enumerate(inputs["query_positions"].tolist()):
        for number, place in enumerate(places):
            queries[row, place], texts[row, place] = clicks[row, number]
            searched[row, place] = True
    return core.entries(core.encode_words(texts), texts, queries[searched], searched)


def test_oracle_user():
    oracle = load("USER")
    inputs, hyper = oracle.inputs, oracle.hyper
    settings = UserSettings(
        dim=hyper["d"],
        num_heads=hyper["heads"],
        head_dim=hyper["d_k"],
        ffn_dim=hyper["ffn"],
        padding_in_co_attention=True,
    )
    num_users = len(oracle.weights["user_embedding.weight"])
    core = UserCore(num_users, len(oracle.weights["embedding.weight"]) - 1, settings).eval()
    core.load_state_dict(state_of(oracle, core))
    entries, recent = entries_of(core, inputs), inputs["short_mask"].shape[1]
    session_length = recent + 1  # the question is the last entry of its session
    search = inputs["task"][:, None] == 1
    asked = torch.where(search, core.text_vectors(inputs["query"]), core.users(inputs["user"] + 1))

    question = core.question(
        asked,
        entries[:, :-recent].unflatten(1, (-1, session_length)),
        inputs["long_mask"].bool().unflatten(1, (-1, session_length)),
        entries[:, -recent:],
        inputs["short_mask"].bool(),
    )
    items = core.text_vectors(inputs["candidates"])
    scores = core(question, items)

    oracle.check("cosines", core.cosines(question, items))
    oracle.check("scores", scores.sigmoid())
    oracle.check("loss", F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64)))
