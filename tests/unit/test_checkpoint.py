"""Checkpoints are whole or absent: order of writing, what is kept, what is found after any damage."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from data_shards.schema import Manifest
from tests.runs import checkpoints_of
from trainer.configs import load_config
from trainer.errors import EnvironmentProblem, RunError
from trainer.runs import checkpoint
from trainer.runs import checkpoint_convert as elastic
from trainer.runs.checkpoint import Progress
from trainer.runs.checkpoint_writer import CheckpointWriter, copied
from trainer.runs.weights_only import check_random_states, no_unpickling
from trainer.training.optimizer import trained_shapes
from trainer.training.window import check_weights

MANIFEST = Manifest(raw={"split": {"fingerprint": "f"}}, hash="h")


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def prepared(accelerator: Accelerator) -> tuple[Any, Any]:
    module = torch.nn.Linear(3, 2)
    return tuple(accelerator.prepare(module, torch.optim.AdamW(module.parameters())))


@pytest.fixture
def writer(accelerator: Accelerator, prepared: tuple[Any, Any], tmp_path: Path) -> CheckpointWriter:
    return CheckpointWriter(accelerator, *prepared, tmp_path, keep=2)


def start(writer: CheckpointWriter, step: int, best_step: int = 0) -> None:
    identity = checkpoint.identity_of(load_config(None), MANIFEST, 1, None, "c")
    writer.start(Progress(step=step, events_seen=64 * step, best_step=best_step), identity, "run")


def save(writer: CheckpointWriter, step: int, best_step: int = 0) -> Path:
    start(writer, step, best_step)
    writer.finish()
    return writer._folder / f"step-{step:08d}"


def test_a_checkpoint_comes_back(
    accelerator: Accelerator, prepared: tuple[Any, Any], writer: CheckpointWriter, tmp_path: Path
) -> None:
    model, optimizer = prepared
    before = model.weight.detach().clone()
    save(writer, 3)
    expected = torch.rand(2)
    torch.nn.init.zeros_(model.weight)
    found, skipped = checkpoint.newest_whole(accelerator, tmp_path)
    assert found is not None and skipped == [] and found.mlflow_run_id == "run"
    progress = checkpoint.load(accelerator, model, optimizer, found)
    assert progress == Progress(step=3, events_seen=192)
    assert torch.equal(model.weight, before) and torch.equal(torch.rand(2), expected), (
        "random numbers go on where they were"
    )
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000003\n"


def test_frozen_weights_are_not_saved_and_not_missed(accelerator: Accelerator, tmp_path: Path) -> None:
    """Adapters on a backbone of gigabytes: a checkpoint holds the adapters. Weights of another model are
    refused."""
    trained = torch.nn.Linear(3, 2)
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), trained)
    module[0].requires_grad_(False)
    model, optimizer = accelerator.prepare(module, torch.optim.AdamW(trained.parameters()))
    path = save(CheckpointWriter(accelerator, model, optimizer, tmp_path, keep=2), 3)
    assert set(load_file(path / "model.safetensors")) == {"1.weight", "1.bias"}
    before = [parameter.detach().clone() for parameter in module.parameters()]
    torch.nn.init.zeros_(trained.weight)
    found, _ = checkpoint.newest_whole(accelerator, tmp_path)
    assert found is not None
    checkpoint.load(accelerator, model, optimizer, found)
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), before, strict=True))
    with pytest.raises(RunError, match=r"another model: missing \['weight'\], unexpected \['1\.bias'"):
        checkpoint.put_back(torch.nn.Linear(3, 2, bias=False), checkpoint.whole_weights(path), path)
    with pytest.raises(RunError, match=r"another model: bias has shape \[2\] there and \[4\] here"):
        checkpoint.put_back(torch.nn.Linear(3, 4), torch.nn.Linear(3, 2).state_dict(), path)


class Counted(torch.nn.Module):
    """What is counted by fit() lies in a buffer beside frozen and trained weights, or trained ones alone."""

    clicks: torch.Tensor

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.frozen, self.trained = torch.nn.Linear(3, 3).requires_grad_(not frozen), torch.nn.Linear(3, 2)
        self.register_buffer("clicks", torch.zeros(4))
        self.register_buffer("tokens", torch.zeros(4), persistent=False)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("world_size", [1, 2], ids=["same layout", "another"])
def test_what_is_counted_comes_back(
    accelerator: Accelerator, tmp_path: Path, frozen: bool, world_size: int
) -> None:
    """It is counted once, for a new run: a continued one does not count again."""
    module = Counted(frozen)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(module, torch.optim.AdamW(trained))
    module.clicks.copy_(torch.arange(4))
    path = save(CheckpointWriter(accelerator, model, optimizer, tmp_path, keep=2), 3)
    held = load_file(path / "model.safetensors").keys()
    assert "clicks" in held and not held & {"tokens", *(["frozen.weight"] if frozen else [])}

    def load() -> None:
        module.clicks.zero_()
        found, _ = checkpoint.newest_whole(accelerator, tmp_path)
        assert found is not None
        now = found.identity | {"world_size": world_size}
        if world_size == 1:
            checkpoint.load(accelerator, model, optimizer, found)
        else:
            elastic.load(accelerator, model, optimizer, trained_shapes(module, optimizer), found, now)

    load()
    assert module.clicks.tolist() == [0, 1, 2, 3]
    found = checkpoint.read_checkpoint(path)
    assert not checkpoint.without_counted(found, module)
    old = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if name != "clicks"}
    save_file(old, path / "model.safetensors")
    expected = json.loads((path / "files.json").read_text())
    expected["model.safetensors"] = checkpoint.checksum(path / "model.safetensors")
    (path / "files.json").write_text(json.dumps(expected))
    assert checkpoint.without_counted(found, module) == frozen, "adapters alone, as it was once"
    if frozen:
        load()
    else:
        with pytest.raises(RunError, match="clicks"):
            load()


def test_newest_and_best_are_kept(writer: CheckpointWriter, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(writer, step, best_step=min(step, 2))
    assert list(checkpoints_of(tmp_path)) == ["step-00000005", "step-00000004", "step-00000002"]


def damage_truncate(path: Path) -> None:
    (path / "optimizer.bin").write_bytes((path / "optimizer.bin").read_bytes()[:-1])


def damage_missing(path: Path) -> None:
    (path / "model.safetensors").unlink()


def damage_list(path: Path) -> None:
    (path / "files.json").write_text("{")


def damage_state(path: Path) -> None:
    (path / "state.json").write_text("{}")


def damage_half(path: Path) -> None:
    """Killed while writing: there is only the partial folder."""
    path.rename(path.with_name(f"{checkpoint.PARTIAL}{path.name}"))


def test_what_cannot_be_removed_ends_no_run(
    writer: CheckpointWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system keeps a folder of which someone reads a file."""
    folder = tmp_path / "checkpoints"
    save(writer, 1), save(writer, 2)
    (folder / f"{checkpoint.PARTIAL}step-00000009").mkdir()  # of an interrupted save
    with monkeypatch.context() as busy:
        busy.setattr(os, "rmdir", lambda *_, **__: os.close(-1))  # OSError
        assert save(writer, 3).is_dir()
    assert (folder / "latest").read_text() == "step-00000003\n"
    save(writer, 4)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("damage", [damage_truncate, damage_missing, damage_list, damage_state, damage_half])
def test_a_damaged_checkpoint_is_never_loaded(
    accelerator: Accelerator, writer: CheckpointWriter, tmp_path: Path, damage: Any
) -> None:
    save(writer, 1)
    damage(save(writer, 2))
    found, skipped = checkpoint.newest_whole(accelerator, tmp_path)
    assert found is not None and found.progress.step == 1
    assert len(skipped) == (0 if damage is damage_half else 1)
    assert all("step-00000002 is damaged" in text and "taking the one before" in text for text in skipped)
    save(writer, 2)  # the continued run comes by again
    again, skipped = checkpoint.newest_whole(accelerator, tmp_path)
    assert again is not None and again.progress.step == 2 and skipped == []
    assert not list((tmp_path / "checkpoints").glob(f"{checkpoint.PARTIAL}*"))


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(
    accelerator: Accelerator, writer: CheckpointWriter, tmp_path: Path
) -> None:
    for step in (1, 2):
        damage_truncate(save(writer, step))
    told = r"no whole checkpoint is left: .*step-00000002 is damaged .*step-00000001 is damaged .*run\.dir"
    with pytest.raises(RunError, match=f"{told}$"):
        checkpoint.newest_whole(accelerator, tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(RunError, match=rf"{told}, .*run\.init_from={tmp_path}$"):
        checkpoint.newest_whole(accelerator, tmp_path)


def test_a_gpu_goes_on_where_a_cpu_stopped(writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random numbers of a CPU's run are read, and there are none for the GPU."""
    path = save(writer, 1) / "random_states_0.pkl"
    states = torch.load(path, weights_only=False)
    states.pop("torch_cuda_manual_seed", None)
    torch.save(states, path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with no_unpickling(path):
        check_random_states(path)
        path.write_bytes(path.read_bytes()[:-99])
        with pytest.raises(RunError, match="random numbers of this process cannot be read"):
            check_random_states(path)


def test_killed_between_rename_and_latest(
    accelerator: Accelerator, writer: CheckpointWriter, tmp_path: Path
) -> None:
    save(writer, 1)
    save(writer, 2)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000001\n")
    found, _ = checkpoint.newest_whole(accelerator, tmp_path)
    assert found is not None and found.progress.step == 2


def test_nothing_to_find(accelerator: Accelerator, tmp_path: Path) -> None:
    assert checkpoint.newest_whole(accelerator, tmp_path) == (None, [])


def test_a_checkpoint_of_another_version_is_refused(
    accelerator: Accelerator, writer: CheckpointWriter, tmp_path: Path
) -> None:
    path = save(writer, 1)
    document = json.loads((path / "state.json").read_text())
    document["identity"]["format"] = 99
    shutil.rmtree(path)
    path.mkdir()
    (path / "state.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match="format 99"):
        checkpoint.read_checkpoint(path)


@pytest.mark.parametrize(
    ("overrides", "world_size", "stage", "expected"),
    [
        ([], 1, None, ""),
        (
            ["run.log_every_steps=7", "tracking.experiment=other", "data.num_workers=3", "run.dir=elsewhere"],
            1,
            None,
            "",
        ),
        (
            ["optim.lr=0.5", "data.num_negatives=9"],
            1,
            None,
            "data.num_negatives   was 4, is 9 now\n  optim.lr             was 0.001, is 0.5 now",
        ),
        ([], 2, 2, ""),
    ],
)
def test_what_may_change_and_what_not(
    writer: CheckpointWriter, overrides: list[str], world_size: int, stage: int | None, expected: str
) -> None:
    found = checkpoint.read_checkpoint(save(writer, 1))
    now = checkpoint.identity_of(load_config(None, overrides), MANIFEST, world_size, stage, "c")
    if expected:
        with pytest.raises(RunError) as error:
            checkpoint.check_identity(found, now)
        assert expected in str(error.value)
    else:
        checkpoint.check_identity(found, now)


@pytest.mark.parametrize(("model", "key"), [("gensr", "optim.sparse_rows"), ("idgenrec", "model.legal_only")])
def test_a_checkpoint_of_before_a_setting_was_made_is_continued_as_it_was(
    writer: CheckpointWriter, model: str, key: str
) -> None:
    path = save(writer, 1)
    document = json.loads((path / "state.json").read_text())
    now = checkpoint.identity_of(load_config(None, [f"model.name={model}"]), MANIFEST, 1, None, "c")
    document["identity"] = {**now, "settings": {k: v for k, v in now["settings"].items() if k != key}}
    (path / "state.json").write_text(json.dumps(document))
    found = checkpoint.read_checkpoint(path)
    checkpoint.check_identity(found, now)
    changed = {**now, "settings": {**now["settings"], key: 7}}
    with pytest.raises(RunError, match=rf"{key}   was (0|False), is 7 now"):
        checkpoint.check_identity(found, changed)


def test_training_goes_on_while_a_checkpoint_is_written(
    accelerator: Accelerator,
    prepared: tuple[Any, Any],
    writer: CheckpointWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk waits for us here, not we for the disk: and what is written is the state at start()."""
    model, optimizer = prepared
    disk = threading.Event()
    original = checkpoint.checksum
    monkeypatch.setattr(
        "trainer.runs.checkpoint_writer.checksum", lambda path, sync: (disk.wait(60), original(path, sync))[1]
    )
    before = model.weight.detach().clone()
    start(writer, 1)
    torch.nn.init.zeros_(model.weight)
    writer.poll(all_idle=not writer.is_writing)
    assert writer.is_writing and list(checkpoints_of(tmp_path)) == [], "half a checkpoint is none"
    disk.set()
    while not list(checkpoints_of(tmp_path)):
        writer.poll(all_idle=not writer.is_writing)
    found, _ = checkpoint.newest_whole(accelerator, tmp_path)
    assert found is not None
    checkpoint.load(accelerator, model, optimizer, found)
    assert torch.equal(model.weight, before)


def test_a_disk_that_is_full_is_reported_and_leaves_the_earlier_checkpoint(
    writer: CheckpointWriter, tmp_path: Path, monkeypatch: Any
) -> None:
    save(writer, 1)

    def full(path: Path, sync: bool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.runs.checkpoint_writer.checksum", full)
    start(writer, 2)
    with pytest.raises(EnvironmentProblem, match=r"No space left.*Earlier checkpoints are intact"):
        writer.finish()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]


def test_pieces_of_weights_are_not_looked_at(accelerator: Accelerator) -> None:
    """ZeRO-3's padding is memory that nobody has written."""
    piece, whole = torch.nn.Parameter(torch.empty(0)), torch.nn.Parameter(torch.ones(2))
    piece.ds_tensor = torch.tensor([1.0, torch.nan])  # type: ignore[attr-defined]
    check_weights(accelerator, {"piece": piece}, 3)
    check_weights(accelerator, {"piece": piece, "whole": whole}, 3)
    with torch.no_grad():
        whole[1] = torch.inf
    with pytest.raises(RunError, match="not finite after step 3: whole"):
        check_weights(accelerator, {"piece": piece, "whole": whole}, 3)


def test_a_copy_shares_no_memory() -> None:
    tensor = torch.arange(6.0)
    original = {"a": [tensor[:3], {"b": tensor}], "size": tensor.shape, "text": "x"}
    clone = copied(original)
    tensor.zero_()
    assert torch.equal(clone["a"][0], torch.tensor([0.0, 1.0, 2.0])) and float(clone["a"][1]["b"].sum()) == 15
    assert clone["size"] == torch.Size([6]) and clone["text"] == "x"
