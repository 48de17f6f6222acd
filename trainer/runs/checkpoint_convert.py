"""A checkpoint read by another number of processes, under another ZeRO stage, with DeepSpeed or without.

Every layout is turned into DeepSpeed's universal one, which has a folder for each trained parameter, and read
from there:

    ZeRO 1–3, a share in each rank's file ──ds_to_universal──▶ U ──load_universal──▶ ZeRO 1–3
    ZeRO 0 and no DeepSpeed, all in one   ──_take_apart──────▶ U ──_put_together───▶ ZeRO 0, no DeepSpeed

    U = zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt

Weights, AdamW's moments and its step come over exactly. So do buffers, what is counted rather than trained:
every layout holds them whole, and load() copies them. What else a checkpoint holds needs no conversion: data
and schedule follow from the step. Only the random numbers of dropout are drawn anew, since there are other
ranks.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.errors import EnvironmentProblem, RunError
from trainer.runs.checkpoint import (
    PARTIAL,
    ROWS,
    TAG,
    Checkpoint,
    Progress,
    persistent_buffers,
    whole_weights,
    without_counted,
)
from trainer.runs.provenance import package_version
from trainer.runs.weights_only import no_unpickling
from trainer.runtime.distributed import on_main
from trainer.runtime.files import writing

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

Shapes = dict[str, torch.Size]  # of what is trained, in the optimizer's order
STATES = ("fp32", "exp_avg", "exp_avg_sq")
BUFFERS = "buffers.pt"  # beside U
# which one is read depends on the stage
HEADERS = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def is_another_layout(found: Checkpoint, now: dict[str, Any]) -> bool:
    """Whether the checkpoint was written by another number of processes or under another ZeRO stage than
    `now`, this run's identity."""
    return any(found.identity[key] != now[key] for key in ("world_size", "zero_stage"))


def expect(accelerator: "Accelerator", now: dict[str, Any]) -> None:
    """Tell DeepSpeed, before the model is prepared, that load() will come with a universal checkpoint."""
    if _sharded(now):
        accelerator.state.deepspeed_plugin.deepspeed_config.setdefault("checkpoint", {})["load_universal"] = (
            True
        )


def load(
    accelerator: "Accelerator",
    model: "nn.Module",
    optimizer: Any,
    shapes: Shapes,
    found: Checkpoint,
    now: dict[str, Any],
) -> Progress:
    """Put weights and optimizer state of `found` into a model prepared for this run's layout; on all ranks.
    Returns where the run stood.

    The universal copy lies beside the checkpoint, as large as it, until this returns. Raises
    EnvironmentProblem when it cannot be made.
    """
    folder = found.path.with_name(f"{PARTIAL}universal-{found.path.name}")
    module = getattr(model, "module", model)  # of DeepSpeed's engine, or DDP's
    # of an old checkpoint without them: what fit() has just counted
    buffers = {} if without_counted(found, module) else persistent_buffers(module)

    def write() -> None:
        with writing(folder), no_unpickling(found.path):
            _write_universal(found, folder / TAG, shapes, num_groups=len(optimizer.param_groups))
            torch.save(_buffers_in(found, list(buffers)), folder / BUFFERS)

    on_main(accelerator, write)
    with no_unpickling(folder):
        kept = torch.load(folder / BUFFERS, map_location="cpu", weights_only=True)
    for name, buffer in buffers.items():
        buffer.copy_(kept[name])
    # torch's AdamW inside DeepSpeed's engine or accelerate's wrapper
    inner = getattr(model, "basic_optimizer", None) or optimizer.optimizer
    if _sharded(now):
        with no_unpickling(folder):
            model.load_checkpoint(str(folder), TAG)  # type: ignore[operator]
    else:
        _put_together(folder / TAG / "zero", inner, shapes)
    for state in inner.state.values():  # DeepSpeed gives all groups one tensor to count in, on the CPU
        state["step"] = torch.tensor(float(found.progress.step), device=state["exp_avg"].device)
    accelerator.wait_for_everyone()
    on_main(accelerator, lambda: shutil.rmtree(folder))
    return found.progress


def describe(identity: dict[str, Any]) -> str:
    """`2 processes, ZeRO-2`."""
    world_size, stage = identity["world_size"], identity["zero_stage"]
    processes = "process" if world_size == 1 else "processes"
    return f"{world_size} {processes}, {'no DeepSpeed' if stage == 'none' else f'ZeRO-{stage}'}"


def _sharded(identity: dict[str, Any]) -> bool:
    return identity["zero_stage"] in (1, 2, 3)


# ---- to the universal layout -------------------------------------------------------------------------------


def _write_universal(found: Checkpoint, folder: Path, shapes: Shapes, num_groups: int) -> None:
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    step = torch.tensor(float(found.progress.step))
    if _sharded(found.identity):
        _convert(found, folder)
        for name, shape in shapes.items():
            for state in STATES:
                path = folder / "zero" / name / f"{state}.pt"
                # from ZeRO-3 the files come flat and bare
                torch.save({"param": _tensor_in(path, found).reshape(shape)}, path)
    else:
        for name, states in _take_apart(found, list(shapes)).items():
            (folder / "zero" / name).mkdir(parents=True)
            for state, tensor in states.items():
                torch.save({"param": tensor}, folder / "zero" / name / f"{state}.pt")
    for name in shapes:
        torch.save(step, folder / "zero" / name / "step.pt")
    # What stages 1–2 read, and what stage 3 reads. Empty groups: weight decay and the rest are this run's
    # own.
    for_stage_3 = {"state": {0: {"step": step}}, "param_groups": [{}]}
    common = {
        "ds_version": package_version("deepspeed"),  # "" without it: then nobody will read it
        "param_groups": [{}] * num_groups,
        "optimizer_state_dict": for_stage_3,
    }
    torch.save(common, folder / "zero" / "optimizer_state.pt")
    header = {
        "dp_world_size": found.world_size,
        "mp_world_size": 1,
        "global_steps": found.progress.step,
        "skipped_steps": 0,
    }
    for file in HEADERS:
        torch.save(header, folder / file)


def _convert(found: Checkpoint, folder: Path) -> None:
    """DeepSpeed's own converter, in a process of its own: it forks, prints and reads nothing of ours."""
    command = [sys.executable, "-m", "trainer.runs.weights_only", "--inject_missing_state"]
    command += ["--input_folder", str(found.path / TAG), "--output_folder", str(folder)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentProblem(
            f"{found.path} was written by {describe(found.identity)}, and DeepSpeed's converter fails: "
            f"{last}. Continue with the number of processes "
            "and the ZeRO stage that wrote it, or free space beside it: the conversion needs as much again."
        )


def _tensor_in(path: Path, found: Checkpoint) -> Tensor:
    if not path.is_file():
        raise RunError(
            f"{found.path} does not hold {path.parent.name}: it cannot be continued by "
            f"{describe(found.identity)} or any other layout."
        )
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    tensor: Tensor = content["param"] if isinstance(content, dict) else content
    return tensor


def _take_apart(found: Checkpoint, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Name → fp32, exp_avg and exp_avg_sq, from files that hold everything. AdamW's state is numbered in the
    order of `names`."""
    if found.identity["zero_stage"] == "none":
        weights = whole_weights(found.path)
        moments = torch.load(found.path / "optimizer.bin", map_location="cpu", weights_only=True)["state"]
    else:
        whole = torch.load(found.path / TAG / HEADERS[0], map_location="cpu", weights_only=True)
        weights, moments = whole["module"], whole["optimizer"]["state"]
    _check_all_there(found, names, weights)
    apart = {}
    for index, name in enumerate(names):
        state, fp32 = moments.get(index, {}), weights[name].float()
        apart[name] = {"fp32": fp32, **{key: state.get(key, torch.zeros_like(fp32)) for key in STATES[1:]}}
    return apart


def _buffers_in(found: Checkpoint, names: list[str]) -> dict[str, Tensor]:
    """Copies of the buffers `names`; of a file with all the weights no more than they are read."""
    if found.identity["zero_stage"] == "none":
        held = whole_weights(found.path, names)
    else:
        header = next(path for name in HEADERS if (path := found.path / TAG / name).is_file())
        held = torch.load(header, map_location="cpu", weights_only=True, mmap=True)["module"]
    _check_all_there(found, names, held)
    return {name: held[name].clone() for name in names}


def _check_all_there(found: Checkpoint, names: list[str], held: Mapping[str, Tensor]) -> None:
    if missing := [name for name in names if name not in held]:
        raise RunError(
            f"{found.path} does not hold {', '.join(missing[:3])}: it cannot be continued by another number "
            "of processes or ZeRO stage."
        )


# ---- from the universal layout -----------------------------------------------------------------------------


@torch.no_grad()
def _put_together(folder: Path, optimizer: torch.optim.Optimizer, shapes: Shapes) -> None:
    """Weights and AdamW's state of every parameter, where each rank holds all of them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(shapes, parameters, strict=True):
        states = {
            state: torch.load(
                folder / name / f"{state}.pt", map_location=parameter.device, weights_only=True
            )["param"]
            for state in STATES
        }
        parameter.copy_(states.pop("fp32"))
        optimizer.state[parameter] = states


# ---- weights alone -----------------------------------------------------------------------------------------


def _deepspeed_weights(found: Checkpoint, shapes: Shapes) -> dict[str, Tensor]:
    if not _sharded(found.identity):
        header = torch.load(found.path / TAG / HEADERS[0], map_location="cpu", weights_only=True)
        weights: dict[str, Tensor] = header["module"]
        return weights
    with tempfile.TemporaryDirectory(prefix="gensr-weights-") as folder, writing(folder):
        _convert(found, Path(folder))
        paths = {name: Path(folder) / "zero" / name / "fp32.pt" for name in shapes}
        return {name: _tensor_in(path, found) for name, path in paths.items()}


def trained_weights(found: Checkpoint, shapes: Shapes) -> dict[str, Tensor]:
    """What a checkpoint of any layout holds of the trained parameters, float32, in this one process: for
    analyses. shapes: name → shape of each. A checkpoint of ZeRO 1–3 needs room for as much again in the
    temporary folder."""
    rows = load_file(found.path / ROWS) if (found.path / ROWS).is_file() else {}
    apart = {name: rows[name].reshape(shape) for name, shape in shapes.items() if name in rows}
    shapes = {name: shape for name, shape in shapes.items() if name not in rows}
    if found.identity["zero_stage"] == "none":
        weights = whole_weights(found.path)  # no pickles: what would read them imports DeepSpeed, which warns
    else:
        with no_unpickling(found.path):
            weights = _deepspeed_weights(found, shapes)
    if missing := [name for name in shapes if name not in weights]:
        raise RunError(f"{found.path} does not hold {', '.join(missing[:3])}: it is of another model")
    return apart | {name: weights[name].float().reshape(shape) for name, shape in shapes.items()}
