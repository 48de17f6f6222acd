"""What runs are estimated to take, by hand; nothing is trained or timed."""

from dataclasses import replace

import pytest

from data_shards.schema import REC, SRC
from trainer.configs import load_config
from trainer.experiments import costs
from trainer.experiments.costs import Machine, Size, cost_of, read_speeds, speed_of, wall_s
from trainer.models.zoo import model_class, model_names

ONE_CORE = Machine(cores=1, gpus=0)
SIZE = Size((2048, 1000), (300, 100), (600, 200), items=50, num_negatives=99, num_hard_negatives=49)
SASREC = {"events_per_s": 100, "candidates_per_s": 1000, "catalogue_events_per_s": 10}


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "start_s": 30,
        "fork_s": 10,
        "candidates_a_training_event": 15,
        "counted": {"candidates_per_s": 1000, "catalogue_events_per_s": 100},
        "default": {"events_per_s": 10},
        "models": {"sasrec": SASREC, "two_tower": {"events_per_s": 50}},
    }
    monkeypatch.setattr(costs, "read_speeds", lambda: made)


@pytest.mark.usefixtures("speeds")
def test_a_run_costs_training_validations_evaluations_and_starts() -> None:
    words = ["run.max_epochs=4", "optim.global_batch_size=512", "run.valid_events=200"]
    config = load_config("sasrec", [*words, "run.validate_every_steps=2"])
    cost = cost_of(config, SIZE, ONE_CORE, full_events=500)
    validation_s = 200 * 100 / 1000
    # recommendations only: 2,048 events are four steps, with a validation after two and after four of them
    assert cost.epochs == 4 and cost.epoch_s == pytest.approx(2048 / 100 + 2 * validation_s)
    assert cost.training_s(3) == pytest.approx(3 * cost.epoch_s)
    assert cost.validations_s == validation_s, "the last one, however short the run"
    assert cost.evaluation_s == {"sampled": 60, "hard": 30, "full": 50}
    assert cost.run_s(3, ("sampled", "full")) == pytest.approx(3 * 10 + 60 + 50 + 20 + 3 * cost.epoch_s)
    two = replace(cost, stages=2)  # two runs, ranked once
    assert two.run_s(3, ("full",)) == pytest.approx(cost.run_s(3) + cost.run_s(3, ("full",)))
    whole = cost_of(config, SIZE, ONE_CORE)
    assert whole.evaluation_s["full"] == 60, "0 events are all of the test split's recommendations"


@pytest.mark.usefixtures("speeds")
def test_five_validations_are_the_price_of_the_shortest_run() -> None:
    words = ["run.max_epochs=2", "run.valid_events=0", "run.validate_every_steps=0"]
    cost = cost_of(load_config("two_tower", words), SIZE, ONE_CORE)
    assert cost.epoch_s == pytest.approx(3048 / 50), "of both tasks"
    assert cost.validations_s == pytest.approx(5 * 400 * 100 / (50 * 15))
    # it has views: the catalogue of 50 items is shorter than what retrieval would find
    assert cost.evaluation_s["full"] == pytest.approx(800 / (50 * 15 / 50))


@pytest.mark.usefixtures("speeds")
def test_steps_of_a_preset_are_epochs_and_counting_has_none() -> None:
    words = ["run.max_steps=8", "optim.global_batch_size=512"]
    assert cost_of(load_config("sasrec", words), SIZE, ONE_CORE).epochs == 2
    counted = cost_of(load_config("popularity"), SIZE, ONE_CORE)
    assert not counted.trained and counted.run_s(7, ("sampled",)) == 10 + 10 + 600 * 100 / 1000
    on_a_gpu = cost_of(load_config("item_knn"), SIZE, Machine(cores=1, gpus=1))
    assert on_a_gpu.start_s == 30, "each process begins anew there"


@pytest.mark.usefixtures("speeds")
def test_cores_and_gpus_are_faster_and_unknown_models_have_the_default() -> None:
    config = load_config("sasrec")
    one, two = (speed_of(config, 50, Machine(cores, 0)).events_per_s for cores in (1, 2))
    assert (one, two) == (100, 160)
    assert speed_of(config, 50, Machine(2, 1)).events_per_s == 100 * costs.GPU_SPEED
    assert speed_of(load_config("fmlp"), 50, ONE_CORE).events_per_s == 10
    assert Machine(1, 0).title == "1 CPU core" and Machine(8, 2).title == "2 GPUs"


def test_jobs_wait_for_the_longest_chain() -> None:
    parts = [(10.0, 4.0), (6.0, 6.0)]
    assert [wall_s(parts, jobs) for jobs in (1, 2, 4)] == [16, (16 + 6) / 2, (16 + 3 * 6) / 4]
    assert wall_s([], 3) == 0


def test_events_are_counted_by_task() -> None:
    assert SIZE.events("train", (SRC,)) == 1000 and SIZE.events("test", (REC, SRC)) == 800
    halves = Size.of_halves(101, 11, items=5)
    assert halves.events("train", (REC, SRC)) == 101 and halves.events("test", (REC,)) == 6


def test_a_larger_backbone_is_slower_than_the_measured_one() -> None:
    measured = load_config("scientific_small")
    size = 4_344
    small = speed_of(measured, size, ONE_CORE, "scientific_small")
    assert small.events_per_s == read_speeds()["models"]["gensr"]["events_per_s"]
    larger = load_config("scientific_small", ["model.backbone=scratch:mini"])
    slow = speed_of(larger, size, ONE_CORE, "scientific_small")
    assert slow.events_per_s < 0.7 * small.events_per_s
    ratio = slow.events_per_s / small.events_per_s
    assert slow.candidates_per_s == pytest.approx(ratio * small.candidates_per_s)


@pytest.mark.parametrize("model", ["bsr", "idgenrec"])
def test_a_backbone_that_was_measured_beside_is_as_fast_as_measured(model: str) -> None:
    factor = read_speeds()["models"][model]["backbones"]["scratch:nano"]
    mini, nano = (
        speed_of(load_config(model, [f"model.backbone=scratch:{size}"]), 4_344, ONE_CORE, model)
        for size in ("mini", "nano")
    )
    assert factor > 1 and nano.events_per_s == pytest.approx(factor * mini.events_per_s)
    assert mini.events_per_s == read_speeds()["models"][model]["events_per_s"]
    small = load_config(model, ["model.backbone=scratch:small"])
    assert speed_of(small, 4_344, ONE_CORE, model).events_per_s < 0.8 * mini.events_per_s, "by its operations"


def test_prompts_take_the_time_of_their_tokens() -> None:
    words = ["data.history_max=10", "data.history_tokens=3", "data.item_tokens=12", "data.num_negatives=4"]
    both = [load_config("collm", [*words, f"model.prompt={prompt}"]) for prompt in ("paper", "compact")]
    paper, compact = (speed_of(config, 4_344, ONE_CORE, "collm") for config in both)
    assert compact.events_per_s / paper.events_per_s == pytest.approx(
        (10 * 3 + 20 + 5 * (12 + 23)) / (10 * 3 + 3 + 5 * (12 + 4))
    )
    # BSR counts no tokens: of fewer items it knows fewer parameters alone
    bsr = load_config("bsr", ["data.history_max=5"])
    ratio = costs._flops(load_config("bsr"), "bsr") / costs._flops(bsr, "demo")
    assert ratio > 1.01
    measured = read_speeds()["models"]["bsr"]["events_per_s"]
    faster = speed_of(bsr, 4_344, ONE_CORE, "demo")
    assert faster.events_per_s / measured == pytest.approx(ratio**0.5)


def test_speeds_are_those_of_models_that_are_trained() -> None:
    for name in read_speeds()["models"]:
        assert name in model_names() and model_class(name).trained
    for name in model_names():
        speed = costs.core_speed(name, 4_344)
        assert speed.candidates_per_s > 0 and speed.catalogue_events_per_s > 0
        assert bool(speed.events_per_s) == model_class(name).trained
