"""GRU4Rec beside RecBole's: hidden state, scores and the cross-entropy with its column for padding."""

from tests.parity.oracles import load, renamed, sizes_of
from tests.tiny_world import make_world
from trainer.models.baselines.gru4rec import Gru4Rec, Gru4RecSettings
from trainer.models.layers.sequence import last_step

NAMES = {"item_embedding.": "items.", "gru_layers.": "gru.", "dense.": "output."}


def test_oracle_gru4rec():
    oracle = load("GRU4Rec")
    sizes, hyper = sizes_of(oracle, "item_embedding.weight"), oracle.hyper
    settings = Gru4RecSettings(
        dim=sizes["dim"], hidden_dim=hyper["hidden"], num_layers=hyper["layers"], softmax_over_padding=True
    )
    model = Gru4Rec(settings, make_world(sizes["num_items"])).eval()
    model.core.load_state_dict(renamed(oracle.weights, NAMES))

    hidden = last_step(model.core(oracle.inputs["item_seq"]), oracle.inputs["item_length"])

    oracle.check("hidden", hidden)
    oracle.check("scores", model.core.items(scores_of=hidden, with_padding=True))
    oracle.check("loss", model.next_item(hidden, oracle.inputs["target"]))
