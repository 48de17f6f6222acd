"""How the program was launched: processes, device and DeepSpeed, and the Accelerator that follows from it.

The same `train()` runs under `gensr train` (one process), `accelerate launch` (DeepSpeed or not) and
`torchrun`. Whether DeepSpeed is used, and with which JSON, comes from the launcher; every number in that JSON
that the run owns is "auto" and filled in here.
"""

import copy
import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import ds_configs
from trainer.config import Config
from trainer.errors import ConfigError, EnvironmentProblem
from trainer.runtime import compiling
from trainer.runtime.device import forced_cpu
from trainer.runtime.memory import keep_freed_memory
from trainer.runtime.stopping import end_with_launcher

if TYPE_CHECKING:
    from accelerate import Accelerator

TORCHS_LINEAR = torch.nn.functional.linear


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
        return (
            int(read_deepspeed_json(self.deepspeed_file)["zero_optimization"]["stage"])
            if self.deepspeed_file
            else None
        )


def read_launch() -> Launch:
    """The launch from the environment variables of accelerate and torchrun. Raises ConfigError for an unknown
    DeepSpeed file."""
    env = os.environ
    world_size = int(env.get("WORLD_SIZE", 1))
    return Launch(
        world_size=world_size,
        rank=int(env.get("RANK", 0)),
        local_rank=int(env.get("LOCAL_RANK", 0)),
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", world_size)),
        launched="LOCAL_RANK" in env,
        deepspeed_file=str(_deepspeed_file())
        if env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        else "",
    )


def _deepspeed_file() -> Path:
    """The JSON named by the launcher: a path, a bare name in ds_configs/, or (--zero_stage N) zeroN.json with
    offload if asked."""
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if named in ("", "none", "None"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") not in (
            "none",
            "None",
            "",
        )
        named = f"zero{stage}{'_offload' if offload else ''}.json"
    return deepspeed_path(named)


def deepspeed_path(named: str) -> Path:
    """A path, or a bare name in ds_configs/ → the file. Raises ConfigError that lists the names."""
    if Path(named).is_file():
        return Path(named)
    if Path(named).name in ds_configs.names():
        return ds_configs.path(Path(named).name)
    raise ConfigError(
        f"DeepSpeed configuration {named}: no such file, and none of ds_configs/: "
        f"{', '.join(ds_configs.names())}"
    )


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed JSON with a zero_optimization.stage. Raises ConfigError naming the file."""
    try:
        document: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"DeepSpeed configuration {path}: {error}") from error
    zero = document.get("zero_optimization") if isinstance(document, dict) else None
    if not isinstance(zero, dict) or "stage" not in zero:
        raise ConfigError(
            f"DeepSpeed configuration {path}: zero_optimization.stage is missing. Start from one of "
            f"{ds_configs.path('zero2.json').parent}"
        )
    return document


def filled_deepspeed_config(
    document: dict[str, Any], config: Config, grad_accum_steps: int, where: str
) -> dict[str, Any]:
    """A copy of `document` with each "auto" replaced by the run's number.

    Raises ConfigError with both values of every number that the file sets differently: one number has one
    source.
    """
    owned: dict[str, tuple[Any, str]] = {
        "train_batch_size": (config.optim.global_batch_size, "optim.global_batch_size"),
        "train_micro_batch_size_per_gpu": (config.optim.micro_batch_size, "optim.micro_batch_size"),
        "gradient_accumulation_steps": (
            grad_accum_steps,
            "derived from the batch sizes and the number of processes",
        ),
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
    conflicts += [
        f"  {key}: given in the file, but the run makes its own (optim.*)"
        for key in ("optimizer", "scheduler")
        if key in document
    ]
    if conflicts:
        raise ConfigError(
            "\n".join(
                [f'DeepSpeed configuration {where} and the run disagree; write "auto" there:', *conflicts]
            )
        )
    return filled


def make_accelerator(config: Config, launch: Launch, grad_accum_steps: int) -> "Accelerator":
    """Start the process group and return the Accelerator.

    Raises EnvironmentProblem when there are fewer GPUs than processes, when these do not know of each other,
    and when DeepSpeed was asked for and is missing, or was dropped on the way.
    """
    if forced_cpu():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    on_cpu = not torch.cuda.is_available()
    if not on_cpu and launch.local_rank >= torch.cuda.device_count():
        raise EnvironmentProblem(
            f"Process {launch.local_rank} of this node has no GPU: {torch.cuda.device_count()} can be seen. "
            "Start as many processes as there are GPUs "
            "(--num_processes), or continue without them: CUDA_VISIBLE_DEVICES= before the command"
        )
    if on_cpu:
        # accelerate's own CPU switches drop DeepSpeed silently; these two choose the device and nothing else.
        os.environ["DS_ACCELERATOR"] = os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        if launch.deepspeed_file:
            os.environ.pop("ACCELERATE_USE_CPU", None)
    _refuse_other_engines()
    set_up_cpu(config, launch)
    _quiet_libraries()

    from accelerate import InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    # an earlier run of this process (a notebook, a test) may have had another precision, or ZeRO-3, which
    # leaves its own linear map: the same products, added up in another order
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.nn.functional.linear = TORCHS_LINEAR

    if launch.launched:
        end_with_launcher()
    group = InitProcessGroupKwargs(
        timeout=timedelta(seconds=config.run.timeout_s),
        backend="gloo" if on_cpu and launch.launched else None,
    )
    try:
        if launch.deepspeed_file:
            accelerator = _with_deepspeed(config, launch.deepspeed_file, grad_accum_steps, group)
        else:
            accelerator = _with_ddp(config, on_cpu, grad_accum_steps, group)
    except ValueError as error:
        if not any(sign in str(error) for sign in ("MASTER_ADDR", "env://")):
            raise
        raise EnvironmentProblem(
            "The environment is that of one of several processes (by mpirun, srun or hand: RANK, WORLD_SIZE, "
            "…), but does not say where they meet (MASTER_ADDR, MASTER_PORT). Start with accelerate launch "
            "or torchrun; or unset these variables, to train in this process alone"
        ) from error
    if accelerator.num_processes != launch.world_size:
        raise EnvironmentProblem(
            f"The launcher started {launch.world_size} processes, but this one sees "
            f"{accelerator.num_processes}. Start with accelerate launch or torchrun."
        )
    _refuse_environment(accelerator, config, grad_accum_steps, "cpu" if on_cpu else "cuda")
    return accelerator


def _with_deepspeed(config: Config, file: str, grad_accum_steps: int, group: Any) -> "Accelerator":
    _refuse_launcher_precision(config)
    _require_deepspeed()
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DistributedType

    document = filled_deepspeed_config(read_deepspeed_json(file), config, grad_accum_steps, file)
    plugin = DeepSpeedPlugin(hf_ds_config=document, zero3_init_flag=False)
    compiling.get_ready()
    with compiling.explained():
        accelerator = Accelerator(
            deepspeed_plugin=plugin,
            gradient_accumulation_steps=grad_accum_steps,
            mixed_precision="no",
            kwargs_handlers=[group],
        )
    # The model is built whole on every rank and partitioned by DeepSpeed afterwards: transformers must not
    # partition while building.
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise EnvironmentProblem(
            f"DeepSpeed was asked for, but accelerate chose {accelerator.distributed_type}. Remove cpu or "
            "use_cpu from the launch configuration."
        )
    return accelerator


def _with_ddp(config: Config, on_cpu: bool, grad_accum_steps: int, group: Any) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)  # they are constants
    return Accelerator(
        cpu=on_cpu,
        gradient_accumulation_steps=grad_accum_steps,
        mixed_precision="bf16" if config.run.precision == "bf16" else "no",
        kwargs_handlers=[group, ddp],
    )


# Of another launch or a site's script: each makes Accelerator() train in another way than the run says.
OTHER_ENGINES = tuple(
    f"ACCELERATE_USE_{name}" for name in ("FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")
)


def _refuse_other_engines() -> None:
    set_ones = [
        name for name in OTHER_ENGINES if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
    ]
    if set_ones:
        named = " and ".join(f"{name}={os.environ[name]}" for name in set_ones)
        raise ConfigError(
            f"The environment says {named}, but a run uses one process, DDP or DeepSpeed. Unset it, or "
            "remove it from the launch configuration"
        )


def _refuse_environment(
    accelerator: "Accelerator", config: Config, grad_accum_steps: int, device: str
) -> None:
    """accelerate lets its environment variables outrank arguments. Raises ConfigError with both values of
    whatever it took from there."""
    deepspeed = accelerator.state.deepspeed_plugin is not None  # its own JSON wins; accelerate launch sets 1
    precision = "bf16" if config.run.precision == "bf16" and not deepspeed else "no"
    accumulated = grad_accum_steps if deepspeed else accelerator.gradient_accumulation_steps
    dynamo = accelerator.state.dynamo_plugin.backend.value
    found = (
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            accumulated,
            grad_accum_steps,
            "accumulation steps, derived from the batch sizes and the number of processes",
        ),
        (
            "ACCELERATE_MIXED_PRECISION",
            accelerator.mixed_precision,
            precision,
            "mixed precision of run.precision",
        ),
        ("ACCELERATE_TORCH_DEVICE", accelerator.device.type, device, "the device"),
        ("ACCELERATE_DYNAMO_BACKEND", dynamo, "NO", "compiling backend (model.compile is the run's own)"),
    )
    conflicts = [
        f"  {name}={os.environ.get(name, theirs)}: {theirs} there, {ours} in the run ({meaning})"
        for name, theirs, ours, meaning in found
        if theirs != ours
    ]
    if conflicts:
        raise ConfigError(
            "\n".join(
                [
                    "The environment and the run disagree; unset these variables (of another launch?):",
                    *conflicts,
                ]
            )
        )


def _refuse_launcher_precision(config: Config) -> None:
    asked = os.environ.pop("ACCELERATE_MIXED_PRECISION", "no")
    ours = "bf16" if config.run.precision == "bf16" else "no"
    if asked not in ("no", ours):
        raise ConfigError(
            f"The launcher says mixed_precision={asked}, the run says run.precision={config.run.precision}. "
            "Remove mixed_precision from the launcher."
        )


def _require_deepspeed() -> None:
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            f"The launcher asks for DeepSpeed, which cannot be imported ({error}). Install it (pip install "
            "deepspeed), or launch without it."
        ) from error


def _quiet_libraries() -> None:
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    for name in ("DeepSpeed", "deepspeed", "accelerate", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for noise in (
        "OMP_NUM_THREADS",
        "barrier\\(\\)",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "is_gradient_checkpointing",
    ):
        warnings.filterwarnings("ignore", message=f".*{noise}.*")


def set_up_cpu(config: Config, launch: Launch) -> int:
    """CPU threads of this process: run.threads, else the cores this node gives us shared out. Returns the
    number. Freed memory is kept.

    Launchers export OMP_NUM_THREADS=1 whatever the machine has, so that variable counts only when no launcher
    ran.
    """
    if config.run.threads:
        num_threads = config.run.threads
    elif not launch.launched and os.environ.get("OMP_NUM_THREADS", "").isdigit():
        num_threads = int(os.environ["OMP_NUM_THREADS"])
    else:
        num_threads = max(1, num_cores() // launch.local_world_size)
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    return num_threads


def num_cores() -> int:
    """Cores this process may use (CPU affinity, as SLURM and containers set it)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(accelerator: "Accelerator") -> str:
    """`8 × NVIDIA H200`."""
    name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "CPU"
    return f"{accelerator.num_processes} × {name}"
