"""Processes, devices and DeepSpeed: everything that depends on how the program was launched.

The same `train()` runs under `gensr train` (one process), `accelerate launch` (DeepSpeed or not) and `torchrun`. Whether DeepSpeed is used, and
with which JSON, comes from the launcher; every number in that JSON that the run owns is "auto" and filled in here.
"""

import contextlib
import copy
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

import ds_configs
from trainer.config import Config
from trainer.errors import ConfigError, EnvironmentProblem, GensrError, RunError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECOND_INTERRUPT_S = 3.0  # a Ctrl-C this long after the first one means: now, without saving (launchers repeat the first at once)


@dataclass(frozen=True)
class Launch:
    """What the launcher decided, known before anything is initialised."""

    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False  # by accelerate or torchrun: a process group exists even for one process
    deepspeed_file: str = ""  # path of the DeepSpeed JSON; "" = no DeepSpeed

    @property
    def num_nodes(self) -> int:
        return max(1, self.world_size // self.local_world_size)

    @property
    def zero_stage(self) -> int | None:
        """None without DeepSpeed. Raises ConfigError for an unreadable file."""
        return int(read_deepspeed_json(self.deepspeed_file)["zero_optimization"]["stage"]) if self.deepspeed_file else None


def read_launch() -> Launch:
    """The launch from the environment variables of accelerate and torchrun. Raises ConfigError for an unknown DeepSpeed file."""
    env = os.environ
    world_size = int(env.get("WORLD_SIZE", 1))
    return Launch(
        world_size=world_size,
        rank=int(env.get("RANK", 0)),
        local_rank=int(env.get("LOCAL_RANK", 0)),
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", world_size)),
        launched="LOCAL_RANK" in env,
        deepspeed_file=str(_deepspeed_file()) if env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" else "",
    )


def _deepspeed_file() -> Path:
    """The JSON named by the launcher: a path, a bare name in ds_configs/, or (--zero_stage N) zeroN.json with offload if asked."""
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if named in ("", "none", "None"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") not in ("none", "None", "")
        named = f"zero{stage}{'_offload' if offload else ''}.json"
    return deepspeed_path(named)


def deepspeed_path(named: str) -> Path:
    """A path, or a bare name in ds_configs/ → the file. Raises ConfigError that lists the names."""
    if Path(named).is_file():
        return Path(named)
    if Path(named).name in ds_configs.names():
        return ds_configs.path(Path(named).name)
    raise ConfigError(f"DeepSpeed configuration {named}: no such file, and none of ds_configs/: {', '.join(ds_configs.names())}")


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed JSON with a zero_optimization.stage. Raises ConfigError naming the file."""
    try:
        document: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"DeepSpeed configuration {path}: {error}") from error
    if "stage" not in document.get("zero_optimization", {}):
        raise ConfigError(
            f"DeepSpeed configuration {path}: zero_optimization.stage is missing. Start from one of {ds_configs.path('zero2.json').parent}"
        )
    return document


def filled_deepspeed_config(document: dict[str, Any], config: Config, grad_accum_steps: int, where: str) -> dict[str, Any]:
    """A copy of `document` with each "auto" replaced by the run's number.

    Raises ConfigError with both values of every number that the file sets differently: one number has one source.
    """
    owned: dict[str, tuple[Any, str]] = {
        "train_batch_size": (config.optim.global_batch_size, "optim.global_batch_size"),
        "train_micro_batch_size_per_gpu": (config.optim.micro_batch_size, "optim.micro_batch_size"),
        "gradient_accumulation_steps": (grad_accum_steps, "derived from the batch sizes and the number of processes"),
        "gradient_clipping": (config.optim.grad_clip, "optim.grad_clip"),
        "torch_autocast.enabled": (config.run.precision == "bf16", "run.precision"),
        "bf16.enabled": (False, "run.precision, through torch_autocast"),
        "fp16.enabled": (False, "T5 overflows in fp16; run.precision is fp32 or bf16"),
    }
    filled = copy.deepcopy(document)
    conflicts = []
    for key, (value, source) in owned.items():
        section, _, name = key.rpartition(".")
        node = filled.setdefault(section, {}) if section else filled
        if node.get(name, "auto") not in ("auto", value):
            conflicts.append(f"  {key}: {node[name]} in the file, {value} in the run ({source})")
        node[name] = value
    conflicts += [f"  {key}: given in the file, but the run makes its own (optim.*)" for key in ("optimizer", "scheduler") if key in document]
    if conflicts:
        raise ConfigError("\n".join([f'DeepSpeed configuration {where} and the run disagree; write "auto" there:', *conflicts]))
    return filled


def forced_cpu() -> bool:
    """True where the user asked for CPU on a machine that may have GPUs."""
    env = os.environ
    by_name = "cpu" in (env.get("DS_ACCELERATOR"), env.get("ACCELERATE_TORCH_DEVICE"))
    return by_name or env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def make_accelerator(config: Config, launch: Launch, grad_accum_steps: int) -> "Accelerator":
    """Start the process group and return the Accelerator.

    Raises EnvironmentProblem when DeepSpeed was asked for and is missing, or was dropped on the way.
    """
    if forced_cpu():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    on_cpu = not torch.cuda.is_available()
    use_deepspeed = bool(launch.deepspeed_file)
    if on_cpu:
        # accelerate's own CPU switches drop DeepSpeed silently; these two choose the device and nothing else.
        os.environ["DS_ACCELERATOR"] = os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        if use_deepspeed:
            os.environ.pop("ACCELERATE_USE_CPU", None)
    set_threads(config, launch)
    _quiet_libraries()

    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process (a notebook, a test) may have had another precision

    group = InitProcessGroupKwargs(timeout=timedelta(seconds=config.run.timeout_s), backend="gloo" if on_cpu and launch.launched else None)
    if use_deepspeed:
        _refuse_launcher_precision(config)
        _require_deepspeed()
        document = filled_deepspeed_config(read_deepspeed_json(launch.deepspeed_file), config, grad_accum_steps, launch.deepspeed_file)
        plugin = DeepSpeedPlugin(hf_ds_config=document, zero3_init_flag=False)
        accelerator = Accelerator(
            deepspeed_plugin=plugin, gradient_accumulation_steps=grad_accum_steps, mixed_precision="no", kwargs_handlers=[group]
        )
        # The model is built whole on every rank and partitioned by DeepSpeed afterwards: transformers must not partition while building.
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    else:
        precision = "bf16" if config.run.precision == "bf16" else "no"
        accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_steps=grad_accum_steps, mixed_precision=precision, kwargs_handlers=[group])
    if use_deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise EnvironmentProblem(
            f"DeepSpeed was asked for, but accelerate chose {accelerator.distributed_type}. Remove cpu or use_cpu from the launch configuration."
        )
    if accelerator.num_processes != launch.world_size:
        raise EnvironmentProblem(
            f"The launcher started {launch.world_size} processes, but this one sees {accelerator.num_processes}. "
            "Start with accelerate launch or torchrun."
        )
    return accelerator


def _refuse_launcher_precision(config: Config) -> None:
    asked = os.environ.pop("ACCELERATE_MIXED_PRECISION", "no")
    ours = "bf16" if config.run.precision == "bf16" else "no"
    if asked not in ("no", ours):
        raise ConfigError(
            f"The launcher says mixed_precision={asked}, the run says run.precision={config.run.precision}. Remove mixed_precision from the launcher."
        )


def _require_deepspeed() -> None:
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            f"The launcher asks for DeepSpeed, which cannot be imported ({error}). Install it (pip install deepspeed), or launch without it."
        ) from error


def _quiet_libraries() -> None:
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    for name in ("DeepSpeed", "deepspeed", "accelerate", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for noise in ("OMP_NUM_THREADS", "barrier\\(\\)", "all_gather_into_tensor", "reduce_scatter_tensor", "is_gradient_checkpointing"):
        warnings.filterwarnings("ignore", message=f".*{noise}.*")


def set_threads(config: Config, launch: Launch) -> int:
    """CPU threads of this process: run.threads, else the cores this node gives us shared out. Returns the number.

    Launchers export OMP_NUM_THREADS=1 whatever the machine has, so that variable counts only when no launcher ran.
    """
    if config.run.threads:
        num_threads = config.run.threads
    elif not launch.launched and os.environ.get("OMP_NUM_THREADS", "").isdigit():
        num_threads = int(os.environ["OMP_NUM_THREADS"])
    else:
        num_threads = max(1, num_cores() // launch.local_world_size)
    torch.set_num_threads(num_threads)
    return num_threads


def num_cores() -> int:
    """Cores this process may use (CPU affinity, as SLURM and containers set it)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(accelerator: "Accelerator") -> str:
    """`8 × NVIDIA H200`."""
    name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "CPU"
    return f"{accelerator.num_processes} × {name}"


def uses_deepspeed(accelerator: "Accelerator") -> bool:
    return str(accelerator.distributed_type.value) == "DEEPSPEED"


def full_state_dict(accelerator: "Accelerator", wrapped: torch.nn.Module, module: torch.nn.Module) -> dict[str, Tensor]:
    """All weights of `module`, whole, on rank 0 at least. To be called on all ranks: ZeRO-3 gathers the partitions."""
    state: dict[str, Tensor] | None = accelerator.get_state_dict(wrapped) if uses_deepspeed(accelerator) else module.state_dict()
    return state or {}


def on_main(accelerator: "Accelerator", function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and return its value on every rank. An error a user can act on is raised on every rank."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (GensrError, OSError) as error:
            outcome[1] = error if isinstance(error, GensrError) else RunError(str(error))
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    value: T = outcome[0]
    return value


def gather_objects(accelerator: "Accelerator", value: T) -> list[T]:
    """One value of each rank, in the order of ranks, on every rank. Small Python objects only."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def process_group(accelerator: "Accelerator") -> Iterator[None]:
    """Leave the process group when the block ends without an error (after one, the launcher ends the other ranks)."""
    yield
    if torch.distributed.is_initialized():
        accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()


class StopSignal:
    """SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 on any rank → all ranks stop at the same step boundary.

    `poll()` is called once a step on every rank. The ranks agree by an all-reduce over gloo on the CPU that runs beside the next step: nobody
    waits for it, and all ranks read the same answer one step later.
    """

    def __init__(self, accelerator: "Accelerator") -> None:
        self.received = ""  # name of the signal this rank got
        self._first_interrupt_s = 0.0
        self._group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        with contextlib.suppress(ValueError):  # not in the main thread (a test or a notebook): no signals to catch
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._work is not None:
            self._work.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._first_interrupt_s and now - self._first_interrupt_s > SECOND_INTERRUPT_S:
                raise KeyboardInterrupt
            self._first_interrupt_s = self._first_interrupt_s or now
        self.received = self.received or signal.Signals(number).name

    def request(self, reason: str) -> None:
        """Ask for a stop from inside the program, as a signal would."""
        self.received = self.received or reason

    def poll(self) -> bool:
        """True once any rank was asked to stop: the same answer at the same step on every rank."""
        if self._group is None:
            return bool(self.received)
        agreed = False
        if self._work is not None:
            self._work.wait()
            agreed = bool(self._flag.item())
        self._flag = torch.tensor([int(bool(self.received))], dtype=torch.int32)
        self._work = torch.distributed.all_reduce(self._flag, op=torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed


class _GatherRows(torch.autograd.Function):
    """all_gather whose backward sums the gradients that every rank has for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.first, ctx.size = torch.distributed.get_rank() * rows.shape[0], rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(total)
        return total[ctx.first : ctx.first + ctx.size]


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of this rank [n, …] → (rows of all ranks [R·n, …], index of this rank's first row). Every rank gives the same n.

    Differentiable. With ranks' gradients averaged, as DDP and ZeRO do, the gradient of the mean of the ranks' losses is that of the union batch.
    """
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered, torch.distributed.get_rank() * rows.shape[0]
