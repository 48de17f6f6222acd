"""Runs scenarios one after another in one launch: a launch costs more than all of them.

FOLDER holds scenarios.json; each rank writes FOLDER/results-RANK.json.

A scenario is {"name", "overrides", and optionally "deepspeed" (a JSON's name or path, absent = DDP),
"stop_at" (step), "resume", "poison" (rank), "states": true, "gradients": true}. With "gradients", those of
DDP are compared with those of the union batch, instead of training. With "states", a run that continues in
another layout also says whether weights and AdamW's state came over as they were when they were saved.
"""

import contextlib
import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import trainer.analysis.figures
import trainer.runs.checkpoint_convert
import trainer.runtime.distributed
import trainer.training.loop
from trainer.config import Config
from trainer.configs import load_config
from trainer.data.folder import PreparedFolder
from trainer.errors import GensrError
from trainer.runs.checkpoint import persistent_buffers
from trainer.runs.checkpoint_writer import CheckpointWriter
from trainer.runtime.stopping import StopSignal


@contextlib.contextmanager
def kept_group(accelerator: Any) -> Iterator[None]:
    """The process group outlives a scenario: the next one uses it again."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


trainer.training.loop.process_group = kept_group
trainer.analysis.figures.plot_run = lambda run_dir: []  # pictures of four steps, which nobody looks at


def full_states(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """NAME/fp32, NAME/exp_avg, … of what is trained, whole, through DeepSpeed's debugging interface, and
    buffers, which are counted; on all ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = {}
    inner = getattr(model, "basic_optimizer", None) or optimizer.optimizer
    sharded = hasattr(model, "zero_optimization") and model.zero_optimization()
    # stages 1 and 2 link the first group's state only
    if sharded and hasattr(model.optimizer, "_lazy_init_hp_params_optimizer_state"):
        model.optimizer._hp_optimizer_states_linked = False
        model.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in getattr(model, "module", model).named_parameters():
        if parameter.requires_grad:
            get = (
                (lambda key, p=parameter: safe_get_full_optimizer_state(p, key))
                if sharded
                else (lambda key, p=parameter: inner.state[p][key])
            )
            states[f"{name}/fp32"] = safe_get_full_fp32_param(parameter) if sharded else parameter
            states |= {f"{name}/{key}": get(key) for key in ("exp_avg", "exp_avg_sq")}
    steps = {float(state["step"]) for state in inner.state.values()}
    assert len(steps) == 1
    states |= persistent_buffers(getattr(model, "module", model))
    return {name: tensor.detach().float().clone() for name, tensor in states.items()} | {
        "step": torch.tensor(steps.pop())
    }


def saved_with_states(self: CheckpointWriter, progress: Any, *rest: Any) -> None:
    start_checkpoint(self, progress, *rest)
    if not with_states:
        return
    states = full_states(self._model, self._optimizer)
    if self._accelerator.is_main_process:
        save_file(states, f"{self._folder.parent}-step{progress.step}.states")


def loaded_with_states(
    accelerator: Any, model: Any, optimizer: Any, shapes: Any, found: Any, now: Any
) -> Any:
    progress = load_other_layout(accelerator, model, optimizer, shapes, found, now)
    if not with_states:
        return progress
    before = load_file(f"{found.path.parents[1]}-step{progress.step}.states")
    after = full_states(model, optimizer)
    converted.append(before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before))
    return progress


with_states = False  # gathering them takes longer than the training
converted: list[bool] = []
start_checkpoint, load_other_layout = CheckpointWriter.start, trainer.runs.checkpoint_convert.load
CheckpointWriter.start, trainer.runs.checkpoint_convert.load = saved_with_states, loaded_with_states  # type: ignore[method-assign,assignment]


def run(scenario: dict[str, Any], folder: Path) -> dict[str, Any]:
    global with_states
    with_states = scenario.get("states", False)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true" if "deepspeed" in scenario else "false"
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = scenario.get("deepspeed", "none")
    run_dir = folder / scenario.get("run", scenario["name"])
    config = load_config(None, [f"data.dir={folder / 'data'}", f"run.dir={run_dir}", *scenario["overrides"]])
    if scenario.get("gradients"):
        return gradients(config)
    converted.clear()
    with stop_at(scenario.get("stop_at", 0)), poisoned(scenario.get("poison")):
        result = trainer.training.loop.train(config, "auto" if scenario.get("resume") else "never")
    return {
        "status": result.status,
        "step": result.step,
        "exit_code": result.exit_code,
        **({"converted": converted[0]} if converted else {}),
    }


@contextlib.contextmanager
def stop_at(step: int) -> Iterator[None]:
    """Rank 1 alone is asked to stop during step `step` (0 = never)."""
    original, calls = StopSignal.poll, [0]

    def poll(self: StopSignal, busy: bool = False) -> bool:
        calls[0] += 1
        if calls[0] == step and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            self.received = "a test"
        return original(self, busy)

    StopSignal.poll = poll  # type: ignore[method-assign]
    yield
    StopSignal.poll = original  # type: ignore[method-assign]


@contextlib.contextmanager
def poisoned(rank: int | None) -> Iterator[None]:
    """The loss of `rank` becomes NaN in the third micro-batch."""
    from trainer.models.gensr.model import GenSR

    original, calls = GenSR.forward, [0]

    def forward(self: GenSR, batch: Any, mode: str = "loss") -> Any:
        out = original(self, batch, mode)
        calls[0] += mode == "loss"
        if mode == "loss" and calls[0] == 3:
            loss, parts = out
            return loss * float("nan"), {**parts, "loss": parts["loss"] * float("nan")}
        return out

    if rank == torch.distributed.get_rank():
        GenSR.forward = forward  # type: ignore[method-assign, assignment]
    yield
    GenSR.forward = original  # type: ignore[method-assign]


def gradients(config: Config) -> dict[str, Any]:
    """Largest difference between the gradients of two ranks with half a batch each and of one process with
    the whole batch."""
    from tests.contract.draws import RepeatingDraws
    from trainer.data import TrainStream
    from trainer.models.contract import Ranks
    from trainer.models.zoo import model_class
    from trainer.runs.weights import build_model

    folder, rank = PreparedFolder.at(config.data.dir), torch.distributed.get_rank()
    kind = model_class(config.model.name)
    size = config.optim.global_batch_size
    batch = next(iter(TrainStream(folder, config.data, 0, size, size, num_folds=2, tasks=kind.tasks)))
    tables = folder.tables(kind.needs, with_folds=True)
    found = []
    for ranks in (Ranks(), Ranks(2, trainer.runtime.distributed.gather_rows)):
        torch.manual_seed(0)
        model = build_model(config, folder, tables, ranks)
        model.fit()
        wrapped: torch.nn.Module = model
        events = batch
        if ranks.size > 1:
            wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
            events = batch.rows(rank * size // 2, (rank + 1) * size // 2)
        with RepeatingDraws():
            loss, _ = wrapped(model.prepare(events))
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    whole, halves = found
    worst = max(float((whole[name] - halves[name]).abs().max()) for name in whole)
    return {
        "same_names": set(whole) == set(halves),
        "worst": worst,
        "largest": max(float(g.abs().max()) for g in whole.values()),
    }


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    results = {}
    for scenario in json.loads((folder / "scenarios.json").read_text()):
        try:
            results[scenario["name"]] = run(scenario, folder)
        except GensrError as error:
            results[scenario["name"]] = {"error": type(error).__name__, "message": str(error)}
        except Exception:
            results[scenario["name"]] = {"error": "bug", "message": traceback.format_exc()}
        (folder / f"results-{os.environ['RANK']}.json").write_text(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()
