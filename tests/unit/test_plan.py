"""Batch arithmetic, learning rate, chance levels and the memory formulas."""

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.settings import to_yaml
from trainer.config import Config, DataConfig
from trainer.configs import load_config
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, RunError
from trainer.models.backbones.cost import BackboneSize, backbone_size
from trainer.models.contract import Cost
from trainer.models.gensr.cost import tokens_per_event
from trainer.models.gensr.model import GenSR
from trainer.models.zoo import model_class
from trainer.runs.checkpoint import check_settings
from trainer.runs.launch_config import load_launch_config
from trainer.runs.run_folder import RunFolder
from trainer.runs.world import sizes_only
from trainer.runtime.launch import Launch
from trainer.training import plan
from trainer.training.costs import (
    GB,
    DataSize,
    ModelSize,
    bytes_sent,
    efficiency,
    largest_micro_batch,
    measured_flops,
    memory,
)
from trainer.training.plan import (
    batch_arithmetic,
    data_size,
    dry_run,
    model_size,
    size_of,
    size_of_folder,
)
from trainer.training.schedule import above_chance, chance, grad_accum_steps, make_schedule


def schedule_of(*overrides: str, events: int = 6400, world_size: int = 1):
    return make_schedule(load_config(None, list(overrides)), events, world_size)


def test_a_small_model_is_told_in_megabytes_and_a_tiny_one_without_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = dry_run(load_config("demo", ["model.backbone=scratch:nano"]), "demo").lines
    large = dry_run(load_config("kuaisar_flan_t5_base"), "kuaisar_flan_t5_base").lines
    memory_of = [next(line for line in lines if line.startswith("memory")) for lines in (small, large)]
    assert " MB of tensors a process" in memory_of[0] and " GB of tensors a process" in memory_of[1]
    assert any("MB a GPU" in line for line in small) and any("GB a GPU" in line for line in large)
    monkeypatch.setattr(plan, "SMALL", 1e9)
    assert not any("ZeRO-3" in line for line in dry_run(load_config("demo"), "demo").lines)


def test_activations_that_nobody_has_calculated_are_not_said_to_be_none() -> None:
    """SASRec's softmax over the catalogue takes gigabytes where the batch is large."""
    config = load_config("sasrec", ["optim.global_batch_size=65536", "optim.micro_batch_size=65536"])
    found = dry_run(config, "sasrec", launch=Launch())
    memory, micro_batch = (
        next(line for line in found.lines if line.startswith(name)) for name in ("memory", "micro-batch")
    )
    assert "activations 0 B" not in memory and memory.endswith("not calculated for sasrec, on top")
    assert "fit" not in micro_batch and "gensr bench micro-batch" in micro_batch
    assert found.facts["memory_bytes"]["activations"] is None


def test_steps_follow_from_epochs_or_are_given() -> None:
    assert schedule_of("run.max_epochs=2.5").num_steps == 250
    assert schedule_of("run.max_steps=7").num_steps == 7
    assert schedule_of("run.max_epochs=0.001").num_steps == 1
    assert schedule_of(events=6400).validate_every_steps == 20  # five times over the run
    assert schedule_of("run.validate_every_steps=30").checkpoint_every_steps == 30


@pytest.mark.parametrize(
    ("num_steps", "every", "steps"),
    [
        (3873, 645, [645, 1290, 1935, 2580, 3225, 3873]),  # not at 3,870, too
        (12, 4, [4, 8, 12]),
        (14, 4, [4, 8, 12, 14]),  # half an interval is far enough
        (13, 4, [4, 8, 13]),
        (3, 1, [1, 2, 3]),
        (3, 100, [3]),
        (1, 1, [1]),
    ],
)
def test_the_last_validation_is_not_preceded_by_another(num_steps: int, every: int, steps: list[int]) -> None:
    s = schedule_of(f"run.max_steps={num_steps}", f"run.validate_every_steps={every}")
    assert [step for step in range(1, num_steps + 1) if s.is_validation_step(step)] == steps


def test_the_last_step_is_logged_and_saved_whatever_the_interval() -> None:
    s = schedule_of("run.max_steps=7", "run.log_every_steps=3", "run.checkpoint_every_steps=4")
    assert [step for step in range(1, 8) if s.is_log_step(step)] == [3, 6, 7]
    assert [step for step in range(1, 8) if s.is_checkpoint_step(step)] == [4, 7]


def test_the_global_batch_does_not_depend_on_the_number_of_processes() -> None:
    for world_size, steps in ((1, 8), (2, 4), (8, 1)):
        s = schedule_of("optim.micro_batch_size=8", world_size=world_size)
        assert (s.global_batch_size, s.grad_accum_steps, s.num_steps) == (64, steps, 100)
    assert (
        batch_arithmetic(schedule_of("optim.micro_batch_size=8", world_size=2))
        == "64 events a step = 8 micro-batch × 2 processes × 4 accumulation steps"
    )


@pytest.mark.parametrize(
    ("world_size", "fix"),
    [(4, "choose optim.micro_batch_size among 1, 2, 4, 8, 16"), (3, "divisible by 96, such as 96")],
)
def test_batches_that_do_not_fit_the_processes_are_refused_with_a_fix(world_size: int, fix: str) -> None:
    with pytest.raises(ConfigError) as error:
        grad_accum_steps(
            load_config(None, ["optim.global_batch_size=64", "optim.micro_batch_size=32"]), world_size
        )
    assert fix in str(error.value)


@pytest.mark.parametrize(
    ("preset", "overrides", "world_size", "size", "of_preset"),
    [
        ("two_tower", [], 1, 256, 0),
        ("two_tower", [], 2, 128, 256),
        ("sasrec", [], 4, 512, 0),  # of 2,048: two accumulation steps fewer, the same micro-batch
        ("sasrec", [], 8, 256, 512),
        ("demo", ["optim.global_batch_size=48"], 2, 24, 32),
        ("demo", ["optim.global_batch_size=48", "optim.micro_batch_size=8"], 2, 8, 0),
        (None, ["optim.global_batch_size=20"], 1, 20, 32),
        ("two_tower", [], 3, 256, 0),  # 256 events cannot be shared by three: left for the schedule to refuse
    ],
)
def test_a_presets_micro_batch_is_lowered_to_divide(
    preset: str | None, overrides: list[str], world_size: int, size: int, of_preset: int
) -> None:
    optim = load_config(preset, overrides, world_size).optim
    assert (optim.micro_batch_size, optim.preset_micro_batch_size) == (size, of_preset)


def test_a_micro_batch_that_the_user_gave_stays(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {global_batch_size: 64, micro_batch_size: 64}")
    for config in (
        load_config(str(file), [], 2),
        load_config("two_tower", ["optim.micro_batch_size=256"], 2),
    ):
        with pytest.raises(ConfigError, match=r"choose optim\.micro_batch_size among"):
            grad_accum_steps(config, 2)
    file.write_text("optim: {global_batch_size: 64}")
    assert load_config(str(file), [], 4).optim.micro_batch_size == 16


def test_a_lowered_micro_batch_is_said_with_what_depends_on_it() -> None:
    said = {
        preset: "\n".join(dry_run(load_config(preset, [], world_size), preset, launch).lines)
        for preset, world_size in (("two_tower", 2), ("bsr", 2), ("demo", 2))
        if (launch := Launch(world_size=world_size, local_world_size=world_size))
    }
    assert "256 events a step = 128 micro-batch × 2 processes × 1 accumulation step" in said["two_tower"]
    assert "lowered from the preset's 256" in said["two_tower"] and "one forward pass" in said["two_tower"]
    assert "lowered from the preset's 128" in said["bsr"] and "one forward pass" not in said["bsr"]
    assert "lowered" not in said["demo"]


def test_a_continued_run_keeps_its_lowered_micro_batch(tmp_path: Path) -> None:
    words = [f"run.dir={tmp_path}"]

    def continued(world_size: int, *more: str) -> Config:
        return load_launch_config("two_tower", [*words, *more], world_size, resume=True)

    before = continued(4)
    assert before.optim.micro_batch_size == 64
    path = RunFolder(tmp_path).config
    path.write_text(to_yaml(before))
    for world_size in (1, 2, 4):  # any number of processes that 64 fits continues the run
        assert continued(world_size).optim.micro_batch_size == 64
        check_settings(before, continued(world_size), path)
    with pytest.raises(RunError, match=r"was 64, is 32 now.*\n.*run.accept_changes=optim.micro_batch_size"):
        check_settings(before, continued(8), path)
    with pytest.raises(RunError, match="was 64, is 128 now"):
        check_settings(before, continued(1, "optim.micro_batch_size=128"), path)
    assert load_launch_config("two_tower", words, 1, resume=False).optim.micro_batch_size == 256


def test_lr_warms_up_and_decays_to_nothing_after_the_last_step() -> None:
    s = schedule_of("optim.warmup_steps=10", "run.max_steps=100")
    factors = [s.lr_factor(step) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0 and factors[-1] == pytest.approx(1 / 90)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert s.lr_factor(100) == 0.0
    short = schedule_of("optim.warmup_steps=200", "run.max_steps=5")
    assert max(short.lr_factor(step) for step in range(5)) == 1.0, (
        "a run shorter than its warm-up reaches its peak, too"
    )


def test_a_run_is_continued_where_its_configuration_lies(tmp_path: Path) -> None:
    """Its run.dir is that of before it moved, or is meant from another folder."""
    moved = tmp_path / "moved: here"
    moved.mkdir()
    file = moved / "config.yaml"
    file.write_text(to_yaml(load_config("two_tower", ["data.dir=OUT", "run.dir=runs/old"])))

    def run_dir(*words: str, resume: bool = True) -> str:
        return load_launch_config(str(file), words, 1, resume).run.dir

    assert run_dir() == "runs/old"  # a file that is no run's
    (moved / "status.json").write_text("{}")
    assert run_dir() == str(moved)
    assert run_dir("run.dir=other") == "other"
    assert run_dir(resume=False) == "runs/old"


@pytest.mark.parametrize(
    ("metric", "value"),
    [("mean/recall@10", 0.1), ("rec/ndcg@10", 0.0454), ("src/mrr", 0.0519), ("mean/recall@5", 0.05)],
)
def test_chance_among_one_and_ninety_nine(metric: str, value: float) -> None:
    mean, deviation = chance(metric, 100)
    assert mean == pytest.approx(value, abs=1e-4)
    assert above_chance(metric, 100, 400) == pytest.approx(mean + 3 * deviation / 20)


def test_an_unknown_metric_is_refused() -> None:
    for name in ("mean/precision@10", "recall", "ndcg@x", "mean/ndcg@7", "ndcg@10", "all/mrr"):
        with pytest.raises(ConfigError, match=r"run\.select_metric"):
            chance(name, 100)


# ---- memory ------------------------------------------------------------------------------------------------

DATA = DataSize(train_events=1000, valid_events=100, items=0, queries=0)
BILLION = ModelSize(total=10**9, trainable=10**9, cost=Cost(flops=1.0, activation_bytes=0.0))


@pytest.mark.parametrize(
    ("stage", "world_size", "bytes_each"),
    [(None, 1, 16), (None, 8, 16), (1, 8, 8 + 12 / 8), (2, 8, 4 + 16 / 8), (3, 8, 20 / 8), (2, 1, 20)],
)
def test_bytes_a_parameter_by_zero_stage(stage: int | None, world_size: int, bytes_each: float) -> None:
    need = memory(load_config(None), BILLION, DATA, stage, world_size)
    assert (need.weights + need.gradients + need.optimizer) / GB == pytest.approx(bytes_each)


def test_frozen_weights_cost_four_bytes() -> None:
    frozen = replace(BILLION, trainable=0)
    need = memory(load_config(None), frozen, DATA, None, 1)
    assert (need.weights / GB, need.gradients, need.optimizer) == (4.0, 0.0, 0.0)


def gensr_on_meta(*overrides: str) -> GenSR:
    """A GenSR without weights, to ask it what it costs."""
    config = load_config(None, list(overrides))
    with torch.device("meta"):
        model = model_class("gensr")(
            config.model, sizes_only(config, replace(DATA, vocab_size=100), cf_dim=64)
        )
    assert isinstance(model, GenSR)
    return model


def test_activations_follow_prompt_candidates_precision_and_checkpointing() -> None:
    def activations(*overrides: str) -> float:
        shape = ("run.precision=bf16", "model.backbone=scratch:flan_t5_base", *overrides)
        return gensr_on_meta(*shape).cost().activation_bytes

    size = backbone_size(gensr_on_meta("model.backbone=scratch:flan_t5_base").backbone)
    by_hand = 7.0 * 2 * 85 * size.encoder / 768
    assert activations("data.num_negatives=1", "model.prompt=paper") == pytest.approx(by_hand)
    assert activations("run.precision=fp32") == pytest.approx(2 * activations())
    assert activations("model.activation_checkpointing=true") < 0.3 * activations()


def test_memory_counts_activations_by_the_micro_batch_and_tables_by_need() -> None:
    model = replace(BILLION, cost=Cost(flops=1.0, activation_bytes=2.0 * GB, cast_bytes=1.0 * GB))
    config = load_config(None, ["optim.micro_batch_size=8"])
    need = memory(config, model, replace(DATA, items=10**6), None, 1)
    assert (need.activations, need.weights, need.tables) == (16 * GB, 5 * GB, 0.0)
    with_cf = memory(config, replace(model, needs=frozenset({"cf"})), replace(DATA, items=10**6), None, 1)
    assert with_cf.tables == 10**6 * 64 * 4 * 5


# ---- several GPUs ------------------------------------------------------------------------------------------


def test_bytes_between_gpus_by_zero_stage() -> None:
    config = load_config(None)
    sent = {
        stage: bytes_sent(config, BILLION, stage, 2, grad_accum_steps=2) / GB for stage in (None, 1, 2, 3)
    }
    # of 10⁹ float32 parameters, two micro-batches, half of everything on each of two ranks
    assert sent == {None: 4.0, 1: 6.0, 2: 10.0, 3: 12.0}
    assert bytes_sent(config, BILLION, None, 1) == 0
    adapters = replace(BILLION, trainable=10**6)
    assert bytes_sent(config, adapters, 2, 8) / GB < 0.02 and bytes_sent(config, adapters, 3, 8) / GB > 6


KUAISAR = DataSize(train_events=5_000_000, valid_events=150_000, items=6_890_707, queries=453_667)


def sasrec_at_kuaisar(*overrides: str) -> tuple[Config, ModelSize]:
    """Counted on the meta device: nothing is allocated."""
    config = load_config("sasrec", ["optim.global_batch_size=512", "optim.micro_batch_size=64", *overrides])
    return config, model_size(config, KUAISAR)


def test_a_table_of_kuaisars_items_is_in_the_memory_table() -> None:
    config, size = sasrec_at_kuaisar()
    table = 6_890_708 * 64
    assert 0 < size.trainable - table < 200_000
    alone = memory(config, size, KUAISAR, None, 1)
    assert alone.total == pytest.approx(16 * table, rel=0.02)  # weights, gradient, two moments
    assert memory(config, size, KUAISAR, 3, 8).total == pytest.approx((4 + 4 + 12) * table / 8, rel=0.05)
    lines = plan._memory_table(config, size, KUAISAR)
    assert "GB a GPU" in lines[0] and any(line.startswith("ZeRO-3 ") for line in lines)
    assert lines[1].split()[2] == f"{alone.total / 1e9:.1f}"


def test_the_dry_run_says_where_sparse_rows_pay() -> None:
    config, size = sasrec_at_kuaisar()
    assert size.largest_table == (6_890_708, 64)
    (line,) = plan._large_table(config, size, 8)
    read = 64 * (config.data.history_max + 1 + config.data.num_negatives)
    assert line.startswith(f"6,890,708 rows × 64; a step of one process reads at most {read:,} of them")
    assert "gradient of 1.8 GB. optim.sparse_rows=100000 sends" in line
    assert plan._large_table(config, size_of_small_table(), 8) == []


def size_of_small_table() -> ModelSize:
    return ModelSize(10, 10, Cost(0.0, 0.0), largest_table=(100_000, 64))


def test_sparse_rows_save_the_gradient_and_the_communication_of_a_table() -> None:
    config, dense = sasrec_at_kuaisar()
    config, rows = sasrec_at_kuaisar("optim.sparse_rows=100000", "model.loss=bce")
    assert rows.by_rows == ((6_890_708, 64),) and rows.trainable == dense.trainable
    table = 4 * 6_890_708 * 64
    small = memory(config, rows, KUAISAR, None, 1)
    assert memory(config, dense, KUAISAR, None, 1).total - small.total == pytest.approx(table)
    for stage in (None, 1, 3):  # on every rank, whatever the stage
        assert memory(config, rows, KUAISAR, stage, 8).total > 3 * table
    num_others = rows.total - rows.num_by_rows
    rest = replace(rows, total=num_others, trainable=num_others, by_rows=())
    few = 7 * 64 * (config.data.history_max + 1 + config.data.num_negatives) * 4 * 65
    for stage in (None, 1, 2, 3):
        assert bytes_sent(config, rows, stage, 8) == pytest.approx(bytes_sent(config, rest, stage, 8) + few)
        assert bytes_sent(config, dense, stage, 8) > 50 * bytes_sent(config, rows, stage, 8)
    (line,) = plan._large_table(config, rows, 8)
    assert "sparse rows, " in line and line.endswith("instead of 1.8 GB")
    with pytest.raises(ConfigError, match="no table of that many items"):
        sasrec_at_kuaisar("optim.sparse_rows=7000000")


def test_sparse_rows_do_not_pay_where_a_step_reads_much_of_the_table() -> None:
    config = load_config("sasrec", ["optim.global_batch_size=8192", "optim.micro_batch_size=64"])
    size = replace(size_of_small_table(), largest_table=(400_000, 64))
    assert "would save nothing" in plan._large_table(config, size, 8)[0]


def test_efficiency_falls_with_communication_and_rises_with_the_micro_batch() -> None:
    model = replace(BILLION, cost=Cost(flops=6.0 * 5 * 20 * 10**9, activation_bytes=0.0))
    small, large = (
        load_config(None, [f"optim.micro_batch_size={n}", f"optim.global_batch_size={n}"]) for n in (1, 64)
    )
    for world_size in (8, 64):
        (worst, best), (worst_large, best_large) = (
            efficiency(config, model, 2, world_size) for config in (small, large)
        )
        assert 0 < worst < worst_large < 1 and worst <= best <= 1 and best_large == 1
    assert efficiency(small, model, 2, 1) == (1, 1)


def test_the_largest_micro_batch_divides_the_batch_and_fits() -> None:
    config = load_config(
        None, ["optim.global_batch_size=96", "optim.micro_batch_size=1", "run.precision=bf16"]
    )
    model = replace(BILLION, cost=Cost(flops=1.0, activation_bytes=0.15 * GB))
    sizes = [
        largest_micro_batch(config, model, DATA, None, 2, gigabytes * GB) for gigabytes in (16, 20, 40, 1000)
    ]
    assert (
        sizes[0] == 0
        and sizes[-1] == 48
        and sizes == sorted(sizes)
        and all(48 % size == 0 for size in sizes if size)
    )


# ---- sizes -------------------------------------------------------------------------------------------------


def test_known_backbones_have_their_published_sizes() -> None:
    model = gensr_on_meta("model.backbone=google/flan-t5-base")
    size, total = backbone_size(model.backbone), size_of(model).total
    published = 247_577_856
    assert size.encoder + size.decoder + 2 * 32128 * 768 == published, (
        "two tables: flan-t5's output table is not its input table"
    )
    assert 0 < total - published < 10e6, "GenSR's own layers"


@pytest.mark.parametrize(
    ("name", "vocabulary", "published"),
    [
        ("Qwen/Qwen2.5-0.5B", 151936, 494_032_768),
        ("Qwen/Qwen3-0.6B", 151936, 596_049_920),
        ("meta-llama/Llama-3.2-1B", 128256, 1_235_814_400),
        ("HuggingFaceTB/SmolLM2-135M", 49152, 134_515_008),
    ],
)
def test_known_decoders_have_their_published_sizes(name: str, vocabulary: int, published: int) -> None:
    size = backbone_size(gensr_on_meta(f"model.backbone={name}").backbone)
    assert size.encoder + vocabulary * size.width == published and size.decoder == 0


def test_a_decoder_reads_what_candidates_share_once_an_event() -> None:
    settings: Any = load_config(None, ["model.prompt=paper"]).model
    t5 = BackboneSize(width=1, layers=1, encoder=1, decoder=0)
    assert tokens_per_event(settings, t5, num_candidates=5) == 5 * 85
    assert tokens_per_event(settings, replace(t5, shared_first=True), num_candidates=5) == 5 * 54 + 56


def test_model_size_is_the_real_one(tmp_path: Path) -> None:
    from tests.tiny_folder import make_tiny_folder
    from trainer.runs.weights import build_model

    folder = PreparedFolder.at(make_tiny_folder(tmp_path))
    for overrides in (
        [],
        ["model.variant=paper"],
        ["model.lora.rank=4"],
        ["model.backbone=scratch:llama_nano"],
    ):
        config = load_config(None, ["model.backbone=scratch:nano", *overrides])
        real = build_model(config, folder, folder.tables(GenSR.needs, with_folds=True))
        assert model_size(config, size_of_folder(folder), cf_dim=16) == size_of(real)


@pytest.mark.parametrize("name", ["bpr_mf", "gensr"])
def test_an_epoch_of_the_dry_run_is_that_of_the_training(tmp_path: Path, name: str) -> None:
    """Of a model of one task: its events alone."""
    from tests.tiny_folder import make_tiny_folder
    from trainer.data import TrainStream

    folder = make_tiny_folder(tmp_path, num_train=48)
    words = [f"data.dir={folder}", f"model.name={name}", "data.history_max=8", "run.max_epochs=3"]
    config = load_config(None, [*words, "optim.global_batch_size=8", "optim.micro_batch_size=8"])
    tasks = model_class(name).tasks
    stream = TrainStream(PreparedFolder.at(folder), config.data, 0, 8, 8, tasks=tasks)
    assert stream.num_events == 24 * len(tasks)
    num_steps = make_schedule(config, stream.num_events, 1).num_steps
    assert dry_run(config).facts["schedule"]["num_steps"] == num_steps


def test_a_dry_run_opens_the_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a URL it would be asked about each time."""
    from tests.tiny_folder import make_tiny_folder
    from trainer.data import folder as module

    opened: list[str] = []
    local_folder = module.local_folder

    def noted(data: DataConfig) -> Any:
        opened.append(data.dir)
        return local_folder(data)

    monkeypatch.setattr(module, "local_folder", noted)
    folder = make_tiny_folder(tmp_path, num_train=48)
    words = [f"data.dir={folder}", "model.name=bpr_mf", "data.history_max=8"]
    dry_run(load_config(None, [*words, "optim.global_batch_size=8", "optim.micro_batch_size=8"]))
    assert opened == [str(folder)]


def test_a_local_folder_is_counted_from_its_config(tmp_path: Path) -> None:
    shape = dict(
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_heads=4,
        num_layers=1,
        num_decoder_layers=1,
        vocab_size=50,
        feed_forward_proj="gated-gelu",
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "t5", "decoder_start_token_id": 0, **shape})
    )
    assert gensr_on_meta(f"model.backbone={tmp_path}").backbone.width == 32


@pytest.mark.parametrize(
    ("words", "said"), [([], "not open yet, points are kept"), (["tracking.enabled=false"], "off")]
)
def test_a_run_that_mlflow_has_not_opened_yet_is_not_off(words: list[str], said: str) -> None:
    config = load_config(None, words)
    schedule = make_schedule(config, DATA.train_events, 1)
    rows = plan.banner_rows(config, DATA, BILLION, schedule, Launch(), 9, "1 × CPU", "")
    assert ("MLflow", said) in rows


def test_what_dry_run_cannot_know_is_an_error_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.dir=OUT"):
        data_size(load_config(None), None)
    with pytest.raises(ConfigError, match=r"model\.backbone=nobody/nothing.*google/flan-t5-base"):
        dry_run(load_config("demo", ["model.backbone=nobody/nothing"]), "demo")
    with pytest.raises(ConfigError, match=r"run\.select_metric"):
        dry_run(load_config("demo", ["run.select_metric=loss"]), "demo")


def test_the_rate_of_products_is_not_that_of_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    monkeypatch.setattr("trainer.runtime.device.wait_for", waits.append)
    started_s = time.perf_counter()
    rate = measured_flops(0.05)
    products = rate * (time.perf_counter() - started_s) / (2 * 512**3)
    assert products > 9 * (len(waits) - 1) > 0
