"""Checkpoints of a run: written aside, checksummed, renamed, and `latest` moved last, so that a reader finds
a whole one or none.

    RUN/checkpoints/step-00000400/   accelerate's and DeepSpeed's files (weights, AdamW, random numbers of
                                     every rank)
                                     rows.safetensors (with optim.sparse_rows: its tables and their moments)
                                     state.json (where the run stood, and what it may be continued with)
                                     files.json (size and sha256 of every file)
    RUN/checkpoints/latest           text: step-00000400

DeepSpeed's own files are pickles, of which nothing but tensors, plain values and a few known classes is read
(runs/weights_only.py). What is passed on is RUN/model/ (safetensors).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from data_shards.checksum import pieces
from data_shards.schema import Manifest
from data_shards.settings import Change, changes, flat_as_json, to_dict
from trainer.config import Config
from trainer.configs import config_type
from trainer.errors import RunError
from trainer.runs.run_folder import RunFolder, read_json
from trainer.runs.weights_only import check_random_states, no_unpickling
from trainer.runtime.distributed import gather_objects, on_main, uses_deepspeed, without_ddp
from trainer.runtime.files import remove_temporaries, write_text, writing

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

FORMAT = 1
PARTIAL = ".partial-"
TAG = "pytorch_model"  # the folder of DeepSpeed's files
ROWS = "rows.safetensors"  # tables of optim.sparse_rows: weights and moments, whole, in every layout

# Settings that may change between a checkpoint and its continuation: none of them changes what is computed.
FREE_KEYS = {
    "data.dir",  # the manifest's hash is compared instead
    "data.cache_dir",
    "data.num_workers",
    "optim.preset_micro_batch_size",  # why optim.micro_batch_size is what it is
    "run.dir",
    "run.log_every_steps",
    "run.checkpoint_every_steps",
    "run.keep_checkpoints",
    "run.eval_batch_size",
    "run.timeout_s",
    "run.on_nan",
    "run.max_skipped_batches",
    "run.accept_changes",
    "run.threads",
}


@dataclass
class Progress:
    """Where a run stands at a step boundary."""

    step: int = 0  # optimizer steps done
    events_seen: int = 0  # the whole state of the data: the next event's position in the stream
    best_step: int = 0  # 0 = no validation yet
    best_value: float = 0.0
    best_metrics: dict[str, float] = field(default_factory=dict)
    above_chance: bool = False  # patience counts from the first validation that beats chance
    validations_without_gain: int = 0
    skipped_batches: int = 0  # micro-batches left out because a loss was not finite (run.on_nan=skip)
    train_s: float = 0.0  # seconds spent, over all parts of an interrupted run


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path
    progress: Progress
    identity: dict[str, Any]
    mlflow_run_id: str

    @property
    def world_size(self) -> int:
        return int(self.identity["world_size"])


def fixed_settings(config: Config) -> dict[str, Any]:
    """Dotted key → value of every setting that a continuation must share, as a checkpoint's JSON gives it
    back: lists, no tuples."""
    return {
        key: value
        for key, value in flat_as_json(to_dict(config)).items()
        if key not in FREE_KEYS and not key.startswith(("tracking.", "serving."))
    }


def identity_of(
    config: Config, manifest: Manifest, world_size: int, zero_stage: int | None, cf_digest: str
) -> dict[str, Any]:
    """What a continuation must share with the run that wrote the checkpoint. cf_digest: the
    CF table's."""
    return {
        "format": FORMAT,
        "manifest_hash": manifest.hash,
        "split_fingerprint": manifest.fingerprint,
        "cf_digest": cf_digest,
        "settings": fixed_settings(config),
        "world_size": world_size,
        "zero_stage": "none" if zero_stage is None else zero_stage,
    }


def check_settings(before: Config, now: Config, where: Path) -> None:
    """Raises RunError that shows every setting in which a run folder's configuration and the continuation's
    differ, run.accept_changes aside."""
    _refuse(changes(fixed_settings(before), fixed_settings(now)), now.run.accept_changes, where)


def check_identity(found: Checkpoint, now: dict[str, Any], accepted: str = "") -> None:
    """Raises RunError that shows every difference between the checkpoint and the run that wants to continue
    it. accepted: run.accept_changes."""
    plain = {"manifest_hash": "data", "cf_digest": "cf"}  # the prepared folder, its CF table
    old, new = (
        {meaning: identity[key] for key, meaning in plain.items()} for identity in (found.identity, now)
    )
    # Older files lack newer settings; treat a missing key as its default.
    defaults = fixed_settings(config_type(now["settings"]["model.name"])())
    settings = defaults | found.identity["settings"]
    _refuse(changes(settings, now["settings"]) + changes(old, new), accepted, found.path)


def check_shards(found: Checkpoint, left_out: list[str], accepted: str = "") -> None:
    """Raises RunError where another set of shards is left out than when the checkpoint was written
    (data.on_bad_shard=skip): the order of training data would be another, and events seen would name other
    events. Checkpoints of before it was noted are not compared."""
    before = found.identity.get("left_out", left_out)
    if before != left_out:
        was, now = (
            f"without {', '.join(each)}" if each else "with all shards" for each in (before, left_out)
        )
        _refuse([Change("data", was, now)], accepted, found.path)


def _refuse(differences: list[Change], accepted: str, where: Path) -> None:
    refused = [one for one in differences if one.key not in accepted.replace(" ", "").split(",")]
    if refused:
        width = max(len(one.key) for one in refused)
        lines = [f"  {one.key:<{width}}   was {one.was}, is {one.now} now" for one in refused]
        fix = (
            "Give the same settings and data to continue, choose another run.dir, or accept the change by "
            f"name: run.accept_changes={','.join(one.key for one in refused)}"
        )
        raise RunError(
            "\n".join([f"{where} cannot be continued: it belongs to a different run", *lines, fix])
        )


# ---- writing (runs/checkpoint_writer.py decides when) ------------------------------------------------------


def make_empty(folder: Path) -> None:
    """A new empty folder to write a checkpoint into; what an interrupted save left beside it is removed."""
    with writing(folder):
        for stale in folder.parent.glob(f"{PARTIAL}*"):
            shutil.rmtree(stale, ignore_errors=stale != folder)
        folder.mkdir(parents=True)


def publish(
    folder: Path, partial: Path, name: str, checksums: dict[str, list[Any]], keep: int, best_step: int
) -> None:
    """Rename a folder that is complete, announce it, and remove older ones: the `keep` newest and the best
    stay."""
    write_text(partial / "files.json", json.dumps(checksums, indent=1) + "\n")
    final = folder / name
    with writing(final):
        # a damaged one of the same step, or one whose run was continued from an earlier checkpoint
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
    write_text(folder / "latest", name + "\n")
    steps = sorted((int(path.name[5:]) for path in _step_folders(folder)), reverse=True)
    kept = {*[step for step in steps if step <= int(name[5:])][:keep], best_step}
    for step in steps:
        if step not in kept:  # a file that someone holds open is tried again with the next checkpoint
            shutil.rmtree(folder / f"step-{step:08d}", ignore_errors=True)


def _step_folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]


def checksum(path: Path, sync: bool = False) -> list[Any]:
    """[bytes, sha256] of a file; sync: once it is on the disk."""
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        for piece in pieces(file):
            digest.update(piece)
            num_bytes += len(piece)
        if sync:
            os.fsync(file.fileno())
    return [num_bytes, digest.hexdigest()]


# ---- reading -----------------------------------------------------------------------------------------------


def newest_whole(accelerator: "Accelerator", run_dir: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a message for each newer one that was skipped. The same answer
    on every rank. Raises RunError where none of them is whole: a new start would write over the run."""
    folder = RunFolder(run_dir).checkpoints
    damaged: list[str] = []
    for name in on_main(accelerator, lambda: listed(run_dir)):
        path = folder / name
        problem = on_main(accelerator, lambda path=path: _expected_files(path)[1])  # type: ignore[misc]
        if not problem:
            problem = _compare(_expected_files(path)[0], _shared_checksums(accelerator, path))
        if not problem:
            return read_checkpoint(path), [f"{each}: taking the one before" for each in damaged]
        damaged.append(f"checkpoint {path} is damaged ({problem})")
    if damaged:
        fix = "Choose another run.dir"
        if on_main(accelerator, RunFolder(run_dir).model.exists):
            fix += f", and begin with the best weights so far: run.init_from={run_dir}"
        raise RunError(f"no whole checkpoint is left: {'; '.join(damaged)}. {fix}")
    return None, []


def _shared_checksums(accelerator: "Accelerator", folder: Path) -> dict[str, list[Any]]:
    """Relative path → [bytes, sha256] of every file; each rank reads its share of them."""
    files = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != "files.json"
    )
    mine = {
        name: checksum(folder / name)
        for name in files[accelerator.process_index :: accelerator.num_processes]
    }
    merged: dict[str, list[Any]] = {}
    for part in gather_objects(accelerator, mine):
        merged.update(part)
    return merged


def listed(run_dir: str | Path) -> list[str]:
    """Names of the checkpoints of a run, newest first. A folder newer than `latest` was renamed but not yet
    announced: whole as well."""
    return sorted((path.name for path in _step_folders(RunFolder(run_dir).checkpoints)), reverse=True)


def _expected_files(path: Path) -> tuple[dict[str, list[Any]], str]:
    """files.json and what is wrong with it ("" = nothing)."""
    expected: dict[str, list[Any]] = read_json(path / "files.json")
    if not all(isinstance(entry, list) and len(entry) == 2 for entry in expected.values()):
        return {}, "files.json is no list of files"
    return expected, "" if "state.json" in expected else "state.json is not in files.json"


def _compare(expected: dict[str, list[Any]], found: dict[str, list[Any]]) -> str:
    for name, (num_bytes, digest) in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != num_bytes:
            return f"{name} has {found[name][0]} bytes, expected {num_bytes}"
        if found[name][1] != digest:
            return f"{name} has another checksum"
    return ""


def read_checkpoint(path: Path) -> Checkpoint:
    """state.json of a checkpoint. Raises RunError when another version wrote it."""
    document = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if document["identity"].get("format") != FORMAT:
        raise RunError(
            f"{path} has checkpoint format {document['identity'].get('format')}, this gensr reads {FORMAT}. "
            "Start a new run.dir."
        )
    return Checkpoint(path, Progress(**document["progress"]), document["identity"], document["mlflow_run_id"])


def load(accelerator: "Accelerator", model: "nn.Module", optimizer: Any, found: Checkpoint) -> Progress:
    """Put weights, optimizer and random numbers of all ranks back, and return where the run stood. The model
    must have been prepared as before."""
    from accelerate.checkpointing import load_accelerator_state

    rank = accelerator.process_index
    with no_unpickling(found.path):
        if uses_deepspeed(accelerator):
            engine: Any = model
            engine.load_checkpoint(str(found.path), TAG, load_module_strict=not has_frozen(model))
        else:
            put_back(without_ddp(model), whole_weights(found.path), found.path)
            optimizer.load_state_dict(
                torch.load(found.path / "optimizer.bin", map_location=accelerator.device, weights_only=True)
            )
        check_random_states(found.path / f"random_states_{rank}.pkl")
        load_accelerator_state(str(found.path), [], [], [], [], rank)
        # accelerate counts micro-batches to know the last one of a step. At a step boundary none waits; a
        # count of micro-batches of another size (run.accept_changes=optim.micro_batch_size) would be off
        accelerator.step = 0
    return found.progress


def kept_weights(module: "nn.Module") -> dict[str, Tensor]:
    """What a checkpoint of a run without DeepSpeed holds of a model: everything, or (adapters) what is
    trained and what is counted."""
    if has_frozen(module):
        trained = {name: each.detach() for name, each in module.named_parameters() if each.requires_grad}
        return trained | persistent_buffers(module)
    weights: dict[str, Tensor] = module.state_dict()
    return weights


def persistent_buffers(module: "nn.Module") -> dict[str, Tensor]:
    """What fit() and running statistics leave in a model: counted, so no optimizer knows of it."""
    saved = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


def without_counted(found: Checkpoint, module: "nn.Module") -> bool:
    """Whether a checkpoint holds nothing of what fit() counts: one with adapters alone, of before that was
    kept. It must be counted again then."""
    if found.identity["zero_stage"] != "none" or not has_frozen(module):
        return False
    buffers = persistent_buffers(module)
    return bool(buffers) and not whole_weights(found.path, buffers)


def put_back(module: "nn.Module", weights: Mapping[str, Tensor], path: Path) -> None:
    """kept_weights() into a model that was built as before. Raises RunError when they are another model's."""
    here = module.state_dict()
    for name in sorted(weights.keys() & here.keys()):
        if weights[name].shape != here[name].shape:
            shapes = f"{list(weights[name].shape)} there and {list(here[name].shape)} here"
            raise RunError(f"{path} is of another model: {name} has shape {shapes}")
    fit = module.load_state_dict(weights, strict=False)
    missing = set(fit.missing_keys) & set(kept_weights(module))
    if has_frozen(module) and missing == set(persistent_buffers(module)):
        missing = set()  # see without_counted()
    if missing or fit.unexpected_keys:
        raise RunError(
            f"{path} is of another model: missing {sorted(missing)[:3]}, unexpected "
            f"{sorted(fit.unexpected_keys)[:3]}"
        )


def whole_weights(path: Path, names: Container[str] | None = None) -> dict[str, Tensor]:
    """The weights in a checkpoint of a run without DeepSpeed: all of them, or those of `names` that it
    holds."""
    with safe_open(path / "model.safetensors", framework="pt") as file:
        # module.: DDP's, once
        keys = {key.removeprefix("module."): key for key in file.keys()}  # noqa: SIM118 (it is no dict)
        return {name: file.get_tensor(key) for name, key in keys.items() if names is None or name in names}


def has_frozen(model: "nn.Module") -> bool:
    """With LoRA most weights never change: the backbone's are read from where they came from, checkpoints
    hold the others."""
    return any(not parameter.requires_grad for parameter in model.parameters())


def remove_partial(run_dir: str | Path) -> None:
    """Remove what an interrupted save left."""
    folder = RunFolder(run_dir).checkpoints
    for stale in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(stale, ignore_errors=True)
    remove_temporaries(folder, "latest")
