"""gensr train in one process on a tiny folder: what a run leaves, exact resume, refusals, damaged
checkpoints, bad losses, full disks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trainer.training.loop
from data_shards.checksum import file_sha256
from data_shards.schema import read_manifest
from data_shards.settings import read_yaml
from tests.runs import checkpoints_of
from tests.tiny_folder import WORDS, make_tiny_folder
from trainer.config import Config
from trainer.configs import config_from_dict, load_config
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, DataError, EnvironmentProblem, RunError
from trainer.evaluation.sampled import config_hash
from trainer.models.backbones.families import build_backbone
from trainer.models.backbones.language import check_own_tokenizer
from trainer.models.baselines.idgenrec import IdGenRec, IdGenRecSettings
from trainer.models.gensr.model import GenSR
from trainer.runs import checkpoint
from trainer.runs.run_folder import RunFolder
from trainer.runs.status import read_progress, write_status
from trainer.runs.weights import load_run_model
from trainer.runs.world import load_tokenizer
from trainer.training.loop import EXIT_RESUME_ME, train
from trainer.training.plan import dry_run
from trainer.training.setup import Run
from trainer.training.step import micro_step

ROOT = Path(__file__).parents[2]
BASE = [
    "model.backbone=scratch:nano",
    "model.dropout=0.1",  # whose random numbers a continued run needs, too
    "data.item_tokens=8",
    "data.history_tokens=4",
    "data.history_max=8",
    "data.num_negatives=2",
    "optim.global_batch_size=8",
    "optim.micro_batch_size=4",
    "optim.warmup_steps=2",
    "run.max_steps=8",
    "run.log_every_steps=1",
    "run.validate_every_steps=4",
    "run.valid_events=8",
    "run.eval_batch_size=8",
    "run.threads=1",
    "tracking.enabled=false",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny") / "data", num_train=48, num_valid=12)


def config_of(data: Path, run_dir: Path, *overrides: str) -> Config:
    return load_config(None, [f"data.dir={data}", f"run.dir={run_dir}", *BASE, *overrides])


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of eight steps; tests only read it."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    result = train(config_of(data, run_dir))
    assert (result.status, result.step, result.exit_code) == ("finished", 8, 0)
    return run_dir


def records(run_dir: Path) -> list[dict[str, Any]]:
    timed = ("events_per_s", "memory_gb", "train_s")
    return [
        {k: v for k, v in json.loads(line).items() if k not in timed}
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


def same_model(one: Path, other: Path) -> bool:
    a, b = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- what a run leaves -------------------------------------------------------------------------------------


def test_a_run_leaves_everything_the_interface_names(undisturbed: Path, data: Path) -> None:
    for name in (
        "config.yaml",
        "environment.json",
        "train.log",
        "metrics.jsonl",
        "status.json",
        "report/loss.png",
        "report/metrics.png",
    ):
        assert (undisturbed / name).stat().st_size > 0, name
    for picture in ("loss.png", "metrics.png"):
        assert (undisturbed / "report" / picture).read_bytes().startswith(b"\x89PNG")
    facts = json.loads((undisturbed / "environment.json").read_text())
    # wheels may add +cpu or +cu130
    assert torch.__version__.startswith(facts["packages"]["torch"]) and facts["parameters"]["trainable"] > 0
    assert config_from_dict(read_yaml(undisturbed / "config.yaml")) == config_of(data, undisturbed)
    assert json.loads((undisturbed / "status.json").read_text())["status"] == "finished"


def test_metrics_jsonl_has_every_step_and_validation(undisturbed: Path) -> None:
    train_records = [r for r in records(undisturbed) if r["kind"] == "train"]
    assert [r["step"] for r in train_records] == list(range(1, 9))
    assert {"loss", "answer_loss", "lr", "epoch"} <= train_records[0].keys()
    assert [r["lr"] for r in train_records] == pytest.approx(
        [5e-4, 1e-3, 1e-3, 5e-3 / 6, 4e-3 / 6, 3e-3 / 6, 2e-3 / 6, 1e-3 / 6]
    )
    assert [r["step"] for r in records(undisturbed) if r["kind"] == "valid"] == [4, 8]


def test_the_log_tells_the_story(undisturbed: Path) -> None:
    log = (undisturbed / "train.log").read_text()
    for words in (
        "48 training events",
        "8 events a step = 4 micro-batch × 1 process × 2 accumulation steps",
        "no DeepSpeed",
        "step 8/8",
        "gensr evaluate",
    ):
        assert words in log


def test_run_model_scores_as_the_best_validation_did(undisturbed: Path) -> None:
    from trainer.evaluation.ranking import validate

    model, config, _folder = load_run_model(undisturbed)
    stream = EvalStream(
        PreparedFolder.at(config.data.dir), "valid", config.data, 8, max_events=config.run.valid_events
    )
    metrics = validate(model.score, stream)
    best = json.loads((undisturbed / "status.json").read_text())["progress"]
    assert metrics == pytest.approx(best["best_metrics"])
    assert metrics["mean/ndcg@10"] == pytest.approx(best["best_value"])
    assert json.loads((undisturbed / "model" / "model.json").read_text())["step"] == best["best_step"]


def test_the_same_run_again_gives_the_same_numbers(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    train(config_of(data, tmp_path / "again"))
    assert records(tmp_path / "again") == records(undisturbed)
    assert same_model(tmp_path / "again", undisturbed)


# ---- interruption ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 5])
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    undisturbed: Path, data: Path, tmp_path: Path, stop_after: Any, step: int
) -> None:
    stop_after(step)
    stopped = train(config_of(data, tmp_path / "run"))
    assert (stopped.status, stopped.step, stopped.exit_code) == ("stopped", step, EXIT_RESUME_ME)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "stopped"
    torch.manual_seed(99)  # whatever the new process had done before
    assert train(config_of(data, tmp_path / "run"), resume="auto").status == "finished"
    assert records(tmp_path / "run") == records(undisturbed)
    assert same_model(tmp_path / "run", undisturbed)


def test_adapters_go_on_bit_for_bit_from_checkpoints_without_the_backbone(
    data: Path, tmp_path: Path, stop_after: Any
) -> None:
    settings = ("model.lora.rank=2", "model.evidence=true")  # whose counts are buffers
    train(config_of(data, tmp_path / "undisturbed", *settings))
    stop_after(5)
    assert train(config_of(data, tmp_path / "run", *settings)).status == "stopped"
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000005" / "model.safetensors")
    assert any("lora_A" in name for name in saved) and not any(
        name.endswith("base_layer.weight") for name in saved
    )
    train(config_of(data, tmp_path / "run", *settings), resume="auto")
    assert records(tmp_path / "run") == records(tmp_path / "undisturbed")
    assert same_model(tmp_path / "run", tmp_path / "undisturbed")


def test_records_after_the_checkpoint_are_made_again_not_kept_twice(
    undisturbed: Path, data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    (run_dir / "status.json").unlink()  # as if killed in step 8
    shutil.rmtree(run_dir / "checkpoints" / "step-00000008")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    for left in (run_dir / ".status.json.7.tmp", run_dir / "checkpoints" / ".latest.7.tmp"):
        left.touch()
    train(config_of(data, run_dir), resume="auto")
    assert records(run_dir) == records(undisturbed)
    assert not list(run_dir.rglob("*.tmp"))


def test_resume_auto_starts_a_new_run_and_leaves_a_finished_one_alone(data: Path, tmp_path: Path) -> None:
    config = config_of(data, tmp_path / "run", "run.max_steps=2")
    assert train(config, resume="auto").status == "finished"
    before = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and path.name != "train.log"
    }
    again = train(config, resume="auto")
    assert (again.status, again.step) == ("already_finished", 2)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_sigterm_saves_and_a_second_process_finishes(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "trainer",
        "train",
        str(undisturbed / "config.yaml"),
        f"run.dir={run_dir}",
        "run.max_steps=400",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        deadline = time.monotonic() + 120
        while "step 2/400" not in (tmp_path / "log").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == EXIT_RESUME_ME, (tmp_path / "log").read_text()
    assert "stopped by SIGTERM" in (run_dir / "train.log").read_text()
    name = (run_dir / "checkpoints" / "latest").read_text().strip()
    assert checkpoint.read_checkpoint(run_dir / "checkpoints" / name).progress.step >= 2


# ---- refusals ----------------------------------------------------------------------------------------------


def test_a_run_folder_is_never_overwritten(undisturbed: Path, data: Path) -> None:
    with pytest.raises(RunError, match=r"is not empty.*--resume auto"):
        train(config_of(data, undisturbed))


def test_changed_settings_are_refused_with_the_difference(undisturbed: Path, data: Path) -> None:
    with pytest.raises(
        RunError, match=r"(?s)different run.*optim\.lr +was 0\.001, is 0\.002 now.*Give the same settings"
    ):
        train(config_of(data, undisturbed, "optim.lr=0.002"), resume="auto")


def test_a_change_that_is_named_is_accepted(data: Path, tmp_path: Path, stop_after: Any) -> None:
    stop_after(3)
    train(config_of(data, tmp_path / "run"))
    with pytest.raises(
        RunError, match=r"optim\.lr +was 0\.001, is 0\.002 now.*\n.*run\.accept_changes=optim\.lr$"
    ):
        train(
            config_of(data, tmp_path / "run", "optim.lr=0.002", "run.accept_changes=optim.beta2"),
            resume="auto",
        )
    train(config_of(data, tmp_path / "run", "optim.lr=0.002", "run.accept_changes=optim.lr"), resume="auto")
    lrs = [r["lr"] for r in records(tmp_path / "run") if r["kind"] == "train"]
    assert lrs[2:4] == pytest.approx([1e-3, 2 * 5e-3 / 6])


def test_a_smaller_micro_batch_changes_no_step(data: Path, tmp_path: Path, stop_after: Any) -> None:
    """Stopped after three steps of one micro-batch: two of a half make the fourth, both before its update."""
    plain = ("model.dropout=0", "model.contrastive_weight=0", "optim.micro_batch_size=8", "run.max_steps=6")
    train(config_of(data, tmp_path / "undisturbed", *plain))
    stop_after(3)
    train(config_of(data, tmp_path / "run", *plain))
    assert read_progress(tmp_path / "run").step % 2  # else two to a step begin where one to a step does
    smaller = ("optim.micro_batch_size=4", "run.accept_changes=optim.micro_batch_size")
    train(config_of(data, tmp_path / "run", *plain, *smaller), resume="auto")
    expected, found = (
        [r["loss"] for r in records(tmp_path / name) if r["kind"] == "train"]
        for name in ("undisturbed", "run")
    )
    assert found == pytest.approx(expected, abs=1e-5)


def test_changed_data_is_refused(data: Path, tmp_path: Path, stop_after: Any) -> None:
    stop_after(1)
    train(config_of(data, tmp_path / "run"))
    other = make_tiny_folder(tmp_path / "other", num_train=48, num_valid=12, seed=1)
    with pytest.raises(RunError, match=r"data   was \w+, is \w+ now"):
        train(config_of(other, tmp_path / "run"), resume="auto")


def test_a_shard_that_was_mended_meanwhile_is_another_order(tmp_path: Path, stop_after: Any) -> None:
    """data.on_bad_shard=skip: events would be repeated and others left out, and the schedule be longer."""
    folder = make_tiny_folder(tmp_path / "data", train_blocks=((24,), (24,)), num_valid=12)
    shard = folder / read_manifest(folder).shards("train")[0].name
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + b"x")
    stop_after(2)
    skipping = (tmp_path / "run", "data.on_bad_shard=skip")
    with pytest.warns(UserWarning, match="skipped 24 training events"):
        train(config_of(folder, *skipping))
    shard.write_bytes(good)
    with pytest.raises(RunError, match=rf"data +was without {shard.relative_to(folder)}, is with all shards"):
        train(config_of(folder, *skipping), resume="auto")
    accepted = (*skipping, "run.accept_changes=data")
    assert train(config_of(folder, *accepted), resume="auto").status == "finished"


def test_a_folder_in_use_is_refused(data: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "train.log").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="in use"):
            train(config_of(data, tmp_path / "run"), resume="auto")


def test_a_run_that_cannot_start_leaves_no_folder(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "cf" / "lightgcn.safetensors").unlink()
    with pytest.raises(DataError, match="gensr cf"):
        train(config_of(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_must_be_given_and_what_must_fit(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.dir=OUT and run\.dir=RUN"):
        train(load_config(None))
    with pytest.raises(ConfigError, match=r"model\.cf_holdout=last.*cf\.holdout=crossfit"):
        train(config_of(data, tmp_path / "a", "model.cf_holdout=last"))
    with pytest.raises(ConfigError, match=r"run\.select_metric=mean/precision"):
        train(config_of(data, tmp_path / "b", "run.select_metric=mean/precision@5"))
    counted = ("model.name=popularity", "tracking.enabled=false", "run.select_metric=mean/ndcg@7")
    with pytest.raises(ConfigError, match=r"run\.select_metric=mean/ndcg@7 is not measured"):
        train(load_config(None, [f"data.dir={data}", f"run.dir={tmp_path / 'c'}", *counted]))


def test_a_run_without_a_step_is_the_model_as_it_begins(
    undisturbed: Path, data: Path, tmp_path: Path
) -> None:
    none = ("run.max_epochs=0", "run.max_steps=0", "tracking.enabled=false")
    config = config_of(data, tmp_path / "run", f"run.init_from={undisturbed}", *none)
    plan = dry_run(config)
    assert plan.facts["schedule"]["num_steps"] == 0 and "seconds" not in plan.facts
    assert plan.lines[-1].endswith(f"as it begins with the weights of {undisturbed}")
    result = train(config)
    assert (result.status, result.step) == ("finished", 0)
    then, now = (RunFolder(run).model / "model.safetensors" for run in (undisturbed, tmp_path / "run"))
    assert then.read_bytes() == now.read_bytes()
    facts = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert facts["begun_with"] == file_sha256(then)
    best = json.loads((undisturbed / "status.json").read_text())["progress"]["best_metrics"]
    assert result.metrics == pytest.approx(best, abs=1e-6)
    assert "init_from: " in (tmp_path / "run" / "train.log").read_text()
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["parameters"]["trainable"] > 1000
    assert train(config, resume="auto").status == "already_finished"
    untrained = train(config_of(data, tmp_path / "new", *none))
    assert untrained.status == "finished" and untrained.metrics != result.metrics


# ---- accidents ---------------------------------------------------------------------------------------------


def test_a_run_without_a_step_is_not_written_over_a_trained_one(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(config_of(data, run_dir, "run.max_steps=1"))
    before = file_sha256(run_dir / "model" / "model.safetensors")
    none = ("run.max_epochs=0", "run.max_steps=0", "run.accept_changes=run.max_epochs,run.max_steps")
    with pytest.raises(RunError, match="holds a trained run"):
        train(config_of(data, run_dir, *none), resume="auto")
    assert file_sha256(run_dir / "model" / "model.safetensors") == before
    assert RunFolder(run_dir).has_ended_well


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    undisturbed: Path, data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    (run_dir / "status.json").unlink()
    optimizer = run_dir / "checkpoints" / "step-00000008" / "optimizer.bin"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    train(config_of(data, run_dir), resume="auto")
    log = (run_dir / "train.log").read_text()
    assert "step-00000008 is damaged (optimizer.bin has another checksum): taking the one before" in log
    assert "continuing step-00000004: 4 of 8 steps are done" in log
    assert records(run_dir) == records(undisturbed)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """poison({10, …}): these training batches, counted from 1, have an infinite loss. Returns the event ids
    of every batch seen."""
    from trainer.models.gensr.model import GenSR

    original, seen = GenSR.forward, []

    def arrange(bad: Container[int]) -> list[list[int]]:
        def forward(self: GenSR, batch: Any, mode: str = "loss") -> Any:
            out = original(self, batch, mode)
            if mode == "loss":
                seen.append(batch.event_id.tolist())
                if len(seen) in bad:
                    return out[0] * float("inf"), {**out[1], "loss": out[1]["loss"] * float("inf")}
            return out

        monkeypatch.setattr(GenSR, "forward", forward)
        return seen

    return arrange


def test_a_loss_that_is_not_finite_names_its_events_and_keeps_what_was(
    undisturbed: Path, data: Path, tmp_path: Path, poison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = poison({10})  # the second half of step 5
    with pytest.raises(RunError) as error:
        train(config_of(data, tmp_path / "run", "run.log_every_steps=3"))
    assert f"step 5, rank 0, event ids {', '.join(map(str, seen[9]))}" in str(error.value)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    assert list(checkpoints_of(tmp_path / "run")) == ["step-00000004"]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    monkeypatch.undo()
    train(config_of(data, tmp_path / "run", "run.log_every_steps=1"), resume="auto")
    assert same_model(tmp_path / "run", undisturbed)


def test_weights_that_are_not_finite_are_never_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last gradient, of a step that is saved: no later loss shows it."""
    from trainer.models.gensr.model import GenSR

    original, calls = GenSR.forward, [0]

    def forward(self: GenSR, batch: Any, mode: str = "loss") -> Any:
        out = original(self, batch, mode)
        calls[0] += mode == "loss"
        if mode == "loss" and calls[0] == 16:  # √0 is 0, and its slope is not finite
            return out[0] + (0 * self.cf_projection.bias.sum()).sqrt(), out[1]
        return out

    monkeypatch.setattr(GenSR, "forward", forward)
    with pytest.raises(RunError, match=r"weights are not finite after step 8: backbone.*, …"):
        train(config_of(data, tmp_path / "run"))
    assert list(checkpoints_of(tmp_path / "run")) == ["step-00000004"]
    state = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


def test_a_loss_that_is_not_finite_is_left_out_where_asked(
    undisturbed: Path, data: Path, tmp_path: Path, poison: Any
) -> None:
    seen = poison({10, 12})  # of step 5, then step 6 (batch 11 is the last good one again)
    train(
        config_of(
            data, tmp_path / "run", "run.on_nan=skip", "model.dropout=0", "run.checkpoint_every_steps=1"
        )
    )
    left_out = [r for r in records(tmp_path / "run") if r["kind"] == "skipped"]
    assert [(r["step"], r["event_ids"]) for r in left_out] == [(5, seen[9]), (6, seen[11])]
    assert seen[10] == seen[8], "the last good batch stands in, times 0"
    steps = [r for r in records(tmp_path / "run") if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(1, 9)) and [
        r.get("skipped_batches", 0) for r in steps
    ] == [0, 0, 0, 0, 1, 2, 2, 2]
    state = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    assert json.loads((tmp_path / "run" / "status.json").read_text())["progress"]["skipped_batches"] == 2


def test_a_continued_run_leaves_out_its_first_batch_too(
    data: Path, tmp_path: Path, poison: Any, stop_after: Any
) -> None:
    config = config_of(data, tmp_path / "run", "run.on_nan=skip", "model.dropout=0")
    seen = poison({9})
    stop_after(4)
    train(config)
    train(config, resume="auto")
    assert seen[9] == seen[6], "a batch of the step before the checkpoint stands in, times 0"
    assert [r["event_ids"] for r in records(tmp_path / "run") if r["kind"] == "skipped"] == [seen[8]]
    state = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def test_a_stand_in_that_is_not_finite_is_not_learned_from(data: Path, tmp_path: Path, poison: Any) -> None:
    """0 times infinity is no gradient of 0."""
    poison({10, 11})
    with pytest.raises(RunError, match=r"a batch and the one before.*event ids \d+"):
        train(config_of(data, tmp_path / "run", "run.on_nan=skip"))


def test_too_many_in_a_row_end_the_run(data: Path, tmp_path: Path, poison: Any) -> None:
    poison(range(4, 100, 2))  # every batch after the third: its stand-in is counted, too
    with pytest.raises(RunError, match=r"3 batches in a row.*event ids \d+"):
        train(config_of(data, tmp_path / "run", "run.on_nan=skip", "run.max_skipped_batches=2"))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


def test_an_error_that_is_not_the_users_says_crashed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(trainer.training.loop, "log", lost)
    with pytest.raises(RuntimeError, match="closed by peer"):
        train(config_of(data, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "crashed"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_for_the_user_to_mend(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The same command would run out of it again, so no job script may give it; with a smaller micro-batch
    the run goes on behind its checkpoint."""
    steps = iter(range(100))

    def too_large(*arguments: Any, **named: Any) -> Any:
        if next(steps) == 9:  # in the fifth step
            raise error
        return micro_step(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.training.loop, "micro_step", too_large)
        with pytest.raises(EnvironmentProblem, match=r"memory ran out.*optim\.micro_batch_size"):
            train(config_of(data, tmp_path / "run", "run.checkpoint_every_steps=2"))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    smaller = ("optim.micro_batch_size=2", "run.accept_changes=optim.micro_batch_size")
    result = train(config_of(data, tmp_path / "run", *smaller), resume="auto")
    assert result.status == "finished" and result.step == 8


def test_what_another_rank_than_the_first_meets_is_failed_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peers, rank 0 among them, learn only that it is gone: they must not make it crashed. The next
    attempt is another matter."""
    folder = tmp_path / "run"
    steps = iter(range(100))

    def too_large(*arguments: Any, **named: Any) -> Any:
        if next(steps) == 9:  # in the fifth step
            raise MemoryError
        return micro_step(*arguments, **named)

    def lost(*_: Any) -> None:
        raise RuntimeError("connection closed by peer")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "is_main", False)
        patch.setattr(trainer.training.loop, "micro_step", too_large)
        with pytest.raises(EnvironmentProblem, match="memory ran out"):
            train(config_of(data, folder, "run.checkpoint_every_steps=2"))
    write_status(folder, "running", read_progress(folder))  # rank 0, which saves a checkpoint meanwhile
    write_status(folder, "crashed", read_progress(folder))  # and then notices
    assert RunFolder(folder).read_status()["status"] == "failed"
    with monkeypatch.context() as patch:
        patch.setattr(trainer.training.loop, "log", lost)
        with pytest.raises(RuntimeError, match="closed by peer"):
            train(config_of(data, folder, "run.checkpoint_every_steps=2"), resume="auto")
    assert RunFolder(folder).read_status()["status"] == "crashed"


def test_a_full_disk_leaves_the_earlier_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.runs.checkpoint_writer import CheckpointWriter

    original, calls = CheckpointWriter._capture, [0]

    def capture(self: CheckpointWriter, writes: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        original(self, writes)

    monkeypatch.setattr(CheckpointWriter, "_capture", capture)
    with pytest.raises(EnvironmentProblem, match=r"No space left.*Earlier checkpoints are intact"):
        train(config_of(data, tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "latest",
        "step-00000004",
    ]


# ---- early stop, best checkpoint, tracker ------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Validation n gives values[n]."""
    left = iter(values)
    monkeypatch.setattr(trainer.training.loop, "validate", lambda *_: {"mean/ndcg@10": next(left)})


def test_patience_counts_only_after_the_first_gain_over_chance(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        "run.validate_every_steps=1",
        "run.early_stop_patience=2",
        "run.max_steps=20",
        "run.keep_checkpoints=1",
    ]
    scripted(monkeypatch, [0.045, 0.04, 0.04, 0.04, 0.5, 0.4, 0.4, 0.9])
    result = train(config_of(data, tmp_path / "run", *overrides))
    assert (result.status, result.step, result.best_step, result.metrics) == (
        "early_stopped",
        7,
        5,
        {"mean/ndcg@10": 0.5},
    )
    # the newest and the best
    assert list(checkpoints_of(tmp_path / "run")) == ["step-00000007", "step-00000005"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"


def test_an_early_stop_is_not_forgotten(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: Any
) -> None:
    """Neither by a process that dies before it has said so, nor for a signal in the same step."""
    config = config_of(data, tmp_path / "run", "run.validate_every_steps=1", "run.early_stop_patience=1")
    scripted(monkeypatch, [0.9, 0.5])
    stop_after(2)

    def lost(run: Run, status: str) -> None:
        run.writer.finish()
        raise RuntimeError("connection closed by peer")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.training.loop, "conclude", lost)
        with pytest.raises(RuntimeError, match="closed by peer"):
            train(config)
    result = train(config, resume="auto")
    assert (result.status, result.step, result.best_step) == ("early_stopped", 2, 1)


def test_more_steps_begin_patience_anew(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that has stopped early: else it would stop again before its first step."""
    overrides = ("run.validate_every_steps=1", "run.early_stop_patience=2")
    scripted(monkeypatch, [0.9, 0.5, 0.5, 0.6, 0.95, 0.5, 0.5])
    first = train(config_of(data, tmp_path / "run", *overrides))
    assert (first.status, first.step, first.best_step) == ("early_stopped", 3, 1)
    more = (*overrides, "run.max_steps=9", "run.accept_changes=run.max_steps")
    longer = config_of(data, tmp_path / "run", *more)
    result = train(longer, resume="auto")
    assert (result.status, result.step, result.best_step) == ("early_stopped", 7, 5)


@pytest.mark.pictures
def test_one_mlflow_run_over_an_interruption(data: Path, tmp_path: Path, stop_after: Any) -> None:
    from trainer.tracking.store import connect

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    overrides = ["tracking.enabled=true", f"tracking.uri={uri}"]
    stop_after(3)
    train(config_of(data, tmp_path / "run", *overrides))
    run_id = json.loads((tmp_path / "run" / "tracking.json").read_text())["run_id"]
    client = connect(uri)
    assert client.get_run(run_id).info.status == "KILLED"
    train(config_of(data, tmp_path / "run", *overrides), resume="auto")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.tags["manifest_hash"] == read_manifest(data).hash
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == list(range(1, 9))
    assert "valid/mean/ndcg_at_10" in run.data.metrics and run.data.metrics["train/events_per_s"] > 0
    assert {file.path for file in client.list_artifacts(run_id, "report")} == {
        "report/loss.png",
        "report/metrics.png",
    }


# ---- backbones ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local stand-in for google/flan-t5-*: a pretrained folder whose lm_head is a table of its own."""
    from transformers import T5Config, T5ForConditionalGeneration

    shape = dict(
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_heads=4,
        num_layers=1,
        num_decoder_layers=1,
        feed_forward_proj="gated-gelu",
    )
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=len(WORDS), tie_word_embeddings=False, decoder_start_token_id=0, **shape)
    )
    model.lm_head.weight = torch.nn.Parameter(
        torch.randn(len(WORDS), 32, generator=torch.Generator().manual_seed(0))
    )
    folder = tmp_path_factory.mktemp("flan")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [0, 2])
def test_a_pretrained_folder_trains_saves_and_loads(
    data: Path, flan: Path, tmp_path: Path, lora: int
) -> None:
    from trainer.evaluation.ranking import validate

    config = config_of(
        data,
        tmp_path / "run",
        f"model.backbone={flan}",
        f"model.lora.rank={lora}",
        "run.max_steps=2",
        "run.precision=bf16",
    )
    result = train(config)
    model, _, _ = load_run_model(tmp_path / "run")
    assert isinstance(model, GenSR)
    assert model.backbone.base.lm_head.weight is not model.backbone.base.get_input_embeddings().weight
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert any("lora" in name for name in saved) == bool(lora)
    if lora:
        assert not any(name.endswith("shared.weight") or "wo.weight" in name for name in saved), (
            "frozen weights stay out"
        )
    stream = EvalStream(
        PreparedFolder.at(config.data.dir), "valid", config.data, 8, max_events=config.run.valid_events
    )
    # fp32 now, bf16 there
    assert validate(model.score, stream)["mean/mrr"] == pytest.approx(result.metrics["mean/mrr"], abs=0.2)


def test_a_folder_with_another_tokenizer_than_the_backbones_is_refused(
    data: Path, flan: Path, tmp_path: Path
) -> None:
    """Also one of the same size, which would be read without a word."""
    backbone = tmp_path / "backbone"
    shutil.copytree(flan, backbone)
    tokenizer = json.loads((data / "tokenizer" / "tokenizer.json").read_text())
    (backbone / "tokenizer.json").write_text(json.dumps(tokenizer))
    own = config_of(data, tmp_path / "run", f"model.backbone={backbone}")
    dry_run(own)
    words = tokenizer["model"]["vocab"]
    first, last = min(words, key=words.get), max(words, key=words.get)
    words[first], words[last] = words[last], words[first]
    (backbone / "tokenizer.json").write_text(json.dumps(tokenizer))
    for start in (train, dry_run):
        with pytest.raises(DataError, match=f"tokenizer={backbone}"):
            start(own)


def test_a_backbone_of_the_hub_has_not_read_texts_with_a_tokenizer_made_here(data: Path) -> None:
    tokenizer = load_tokenizer(data / "tokenizer")
    with pytest.raises(DataError, match="tokenizer=google/flan-t5-base"):
        check_own_tokenizer("google/flan-t5-base", tokenizer, is_trained=True)
    check_own_tokenizer("google/flan-t5-base", tokenizer, is_trained=False)
    check_own_tokenizer("scratch:mini", tokenizer, is_trained=True)


def test_idgenrecs_writer_of_ids_reads_with_the_folders_tokenizer_too(data: Path) -> None:
    tokenizer, writer = load_tokenizer(data / "tokenizer"), "google/flan-t5-base"
    IdGenRec.check_tokenizer(tokenizer, IdGenRecSettings(generator=writer), is_trained=True)  # ids=words
    settings = IdGenRecSettings(generator=writer, ids="generator")
    with pytest.raises(DataError, match=rf"not that of model\.generator={writer}"):
        IdGenRec.check_tokenizer(tokenizer, settings, is_trained=True)


# ---- what the folder holds ---------------------------------------------------------------------------------


def test_a_longer_history_than_the_folders_is_refused(data: Path, tmp_path: Path) -> None:
    config = config_of(data, tmp_path / "run", "data.history_max=21")
    for start in (train, dry_run):
        with pytest.raises(ConfigError, match=r"data\.history_max=21.*history_max=20"):
            start(config)
    assert not (tmp_path / "run").exists()


def test_a_run_of_relative_folders_is_used_from_elsewhere(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a backbone's: with adapters, its frozen weights are read from there again."""
    monkeypatch.chdir(data.parent)
    pretrained = build_backbone("scratch:nano", vocab_size=len(WORDS), dropout=0.0)
    pretrained.base.save_pretrained("backbone")
    adapters = ("model.backbone=backbone", "model.lora.rank=2")
    config = config_of(Path(data.name), tmp_path / "run", "run.max_steps=1", *adapters)
    train(config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    _, stored, folder = load_run_model(tmp_path / "run")
    assert stored.data.dir == str(folder.path) == str(data.resolve())
    assert config_hash(stored) == config_hash(config)
