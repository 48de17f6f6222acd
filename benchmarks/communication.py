"""Bytes that training sends between processes, counted, beside those that trainer/training/costs.py
calculates. For every ZeRO stage:

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.communication PREPARED STAGE
    [key=value …]

STAGE: none (DDP), 0, 1, 2 or 3. Every collective that starts inside an optimizer step is counted by the bytes
a ring algorithm sends for it: whatever the network, and however busy the machine. Prints one JSON object.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ds_configs

STEPS, WARMUP = 4, 2
# the argument whose size counts, and how often a ring of n ranks sends it, in units of (n − 1) / n
COLLECTIVES = {
    "all_reduce": (0, 2),
    "reduce": (0, 1),
    "broadcast": (0, 1),
    "all_gather_into_tensor": (0, 1),
    "_all_gather_base": (0, 1),
    "reduce_scatter_tensor": (1, 1),
    "_reduce_scatter_base": (1, 1),
}
COUNTED: Counter[str] = Counter()
COUNTING = [False]


def count(name: str, num_bytes: float) -> None:
    if COUNTING[0]:
        COUNTED[name] += int(num_bytes * (dist.get_world_size() - 1) / dist.get_world_size())


def counted(name: str, original: Callable[..., Any], position: int, times: int) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
        if tensors and tensors[0].numel() > 1:  # not the flags that agree on stopping or overflow
            count(name, times * tensors[min(position, len(tensors) - 1)].nbytes)
        return original(*arguments, **named)

    return call


def main(folder: str, stage: str, overrides: list[str]) -> None:
    for name, (position, times) in COLLECTIVES.items():
        if hasattr(dist, name):
            setattr(dist, name, counted(name, getattr(dist, name), position, times))
    work = tempfile.mkdtemp(prefix="gensr-bytes-")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false" if stage == "none" else "true"
    if stage != "none":
        document = json.loads(ds_configs.path(f"zero{stage}.json").read_text())
        if stage == "3":  # also partition what is small
            document["zero_optimization"] |= dict.fromkeys(
                (
                    "stage3_param_persistence_threshold",
                    "stage3_max_live_parameters",
                    "stage3_max_reuse_distance",
                ),
                0,
            )
        path = Path(work) / "deepspeed.json"
        path.write_text(json.dumps(document))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    import trainer.training.loop as training
    from trainer.configs import load_config
    from trainer.training.costs import bytes_sent
    from trainer.training.plan import size_of

    one_step = training.one_step
    facts: dict[str, Any] = {}

    def step(run: Any, *arguments: Any) -> None:
        if run.progress.step == 0 and stage == "none":
            run.model.register_comm_hook(None, _through_python)
        facts["model"], facts["accum"] = size_of(run.module), run.schedule.grad_accum_steps
        COUNTING[0] = run.progress.step >= WARMUP
        one_step(run, *arguments)
        COUNTING[0] = False

    training.one_step = step  # type: ignore[assignment]
    config = load_config(
        None,
        [
            f"data.dir={folder}",
            f"run.dir={_shared()}/run",
            f"run.max_steps={WARMUP + STEPS}",
            "tracking.enabled=false",
            "run.valid_events=4",
            "run.eval_batch_size=2",
            "model.contrastive_weight=0.01",
            *overrides,
        ],
    )
    training.train(config)
    if os.environ["RANK"] == "0":
        number = None if stage == "none" else int(stage)
        calculated = bytes_sent(config, facts["model"], number, int(os.environ["WORLD_SIZE"]), facts["accum"])
        measured = sum(COUNTED.values()) / STEPS
        row = {
            "stage": stage,
            "measured_bytes": measured,
            "calculated_bytes": calculated,
            "ratio": round(measured / calculated, 3),
            "by_collective": {k: v / STEPS for k, v in COUNTED.items()},
            "parameters": facts["model"].total,
            "trainable": facts["model"].trainable,
            "grad_accum_steps": facts["accum"],
        }
        print(json.dumps(row))


def _shared() -> str:
    """Rank 0's folder, on every rank: by the launcher's id."""
    launch_id = f"{os.environ.get('TORCHELASTIC_RUN_ID', '0')}-{os.environ['MASTER_PORT']}"
    return f"{tempfile.gettempdir()}/gensr-bytes-{launch_id}"


def _through_python(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does by itself, by the all_reduce that is counted."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    return allreduce_hook(group, bucket)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
