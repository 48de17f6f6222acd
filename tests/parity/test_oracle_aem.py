"""AEM and ZAM beside a public implementation, and the multi-head forms beside the public code of TEM."""

import pytest

from tests.parity import product_search
from tests.parity.oracles import load, renamed
from tests.tiny_world import make_world
from trainer.models.baselines.aem import Aem, AemSettings
from trainer.models.baselines.zam import Zam, ZamSettings

KINDS = {"AEM": (Aem, AemSettings), "ZAM": (Zam, ZamSettings)}


@pytest.mark.parametrize("name", ["AEM", "ZAM"])
def test_oracle_aem_and_zam(name):
    oracle, (kind, settings_kind) = load(name), KINDS[name]
    given, weights = oracle.inputs, renamed(oracle.weights, product_search.SHARED_NAMES)
    num_terms, dim = weights["words.vectors.weight"].shape
    settings = settings_kind(dim=dim, num_heads=oracle.hyper["heads"], count_query_padding=True)
    world = make_world(len(weights["items.weight"]) - 1, num_words=num_terms - 1)
    core = kind(settings, world).eval().core
    core.load_state_dict(weights)

    question = core(given["query_words"], given["history"])

    oracle.check("user", core.user(core.encode_query(given["query_words"]), given["history"]))
    items = product_search.with_shared_negatives(given["items"], given["neg_items"])
    product_search.check_shared(oracle, core, question, given["candidates"], items)


@pytest.mark.parametrize("name", ["AEM", "ZAM"])
def test_oracle_multihead_forms(name):
    oracle, (kind, settings_kind) = load(f"{name}_multihead"), KINDS[name]
    sizes = product_search.sizes(oracle)
    settings = settings_kind(dim=sizes.pop("dim"), form="multihead", num_heads=oracle.hyper["heads"])
    core = kind(settings, make_world(**sizes)).eval().core
    core.load_state_dict(product_search.state(oracle, {"attention_encoder": "attention.attention"}))
    given = product_search.inputs(oracle)

    question = core(given["query_words"], given["history"])

    product_search.check(oracle, core, question)
