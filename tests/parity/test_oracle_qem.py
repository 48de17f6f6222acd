"""QEM beside the public code of TEM: scores and both losses."""

from tests.parity import product_search
from tests.parity.oracles import load
from tests.tiny_world import make_world
from trainer.models.baselines.qem import Qem, QemSettings


def test_oracle_qem():
    oracle = load("QEM")
    sizes = product_search.sizes(oracle)
    model = Qem(QemSettings(dim=sizes.pop("dim")), make_world(**sizes)).eval()
    model.core.load_state_dict(product_search.state(oracle))

    question = model.core(product_search.inputs(oracle)["query_words"])

    product_search.check(oracle, model.core, question)
