"""What a training step and scoring would take on an H200, operation by operation, calculated on a machine
without one.

    python -m benchmarks.roofline FOLDER [--events 64 256] [--top 0] [setting=value …]

FOLDER is a prepared folder with natural text and a CF table; settings are those of `gensr train`, on top of
flan-t5-base's shape. Every operation of a real step is seen with fake tensors (shapes, no values) and takes
the longest of: its arithmetic, its bytes from and to memory, and a kernel's shortest time. All kernels of one
process must also be launched, at the same time: a step takes the longer of the two. What is not there is
the time of several GPUs for each other. Where a GPU is at hand, measure: gensr bench train.
"""

import argparse
import collections
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.measuring import open_folder
from trainer.data import EvalStream, TrainStream
from trainer.models.backbones import t5_layers
from trainer.models.gensr import grouping
from trainer.models.layers import dropout, norm
from trainer.runs.provenance import git_commit
from trainer.runs.weights import build_model
from trainer.runtime.device import autocast
from trainer.training.costs import GB, H200_FLOPS

MEMORY_BYTES_PER_S = 4.8e12  # its data sheet
REACHED_FLOPS, REACHED_BYTES = 0.75, 0.8  # shares of the two that large kernels reach: assumed
KERNEL_S = 2e-6  # the shortest kernel: assumed
LAUNCH_S = 6e-6  # of a kernel from Python, forward and backward together: assumed
NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "_sparse_coo_tensor", "lift_fresh", "_local_scalar_dense")
DEFAULTS = ["model.backbone=scratch:flan_t5_base", "run.precision=bf16"]


def num_bytes(tensor: Tensor) -> int:
    """Of memory: an expanded tensor counts once."""
    if tensor.layout != torch.strided:
        return 0
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


class Kernels(TorchDispatchMode):
    """Counts what each kind of operation costs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()
        self.flops: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.seconds: collections.Counter[str] = collections.Counter()

    def add(self, kind: str, flops: float, moved: float) -> None:
        self.count[kind] += 1
        self.flops[kind] += flops  # type: ignore[assignment]
        self.bytes[kind] += moved  # type: ignore[assignment]
        self.seconds[kind] += max(
            flops / (H200_FLOPS * REACHED_FLOPS), moved / (MEMORY_BYTES_PER_S * REACHED_BYTES), KERNEL_S
        )  # type: ignore[assignment]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or func.namespace == "prim" or name.startswith(NO_KERNEL):
            return out
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and not written:
                written = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        moved = sum(map(num_bytes, read + written))
        if name in ("embedding", "index_select", "index", "gather"):
            # reads what it writes, not the whole table
            moved = 2 * sum(map(num_bytes, written))
        count_flops = flop_registry.get(func._overloadpacket)
        flops = count_flops(*args, **kwargs, out_val=out) if count_flops else 0
        self.add(f"{name} {str(written[0].dtype).removeprefix('torch.') if written else ''}", flops, moved)
        return out


@contextlib.contextmanager
def as_on_a_gpu(kernels: Kernels) -> Iterator[None]:
    """Operations that are one kernel on a GPU and several on a CPU, where the fake tensors pretend to be."""

    class RmsNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            kernels.add("rms_norm", 0, 2 * num_bytes(x))
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            kernels.add("rms_norm backward", 0, 3 * num_bytes(x))
            kernels.add("rms_norm backward", 0, 2 * num_bytes(x))  # of its weight
            return torch.empty_like(x), torch.empty_like(weight)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
            ctx.save_for_backward(query, key, value, bias)
            products = query.numel() * key.shape[2]
            kernels.add("attention", 4 * products, sum(map(num_bytes, (query, key, value, query, bias))))
            return torch.empty_like(query)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
            query, key, value, bias = ctx.saved_tensors
            products = query.numel() * key.shape[2]
            scores = query.shape[:3].numel() * key.shape[2] * query.element_size()
            # the bias is trained: its gradient is as large as the scores
            kernels.add("attention backward", 10 * products, 8 * num_bytes(query) + 2 * scores)
            return tuple(torch.empty_like(tensor) for tensor in (query, key, value, bias))

    def one_kernel_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result: Tensor = RmsNorm.apply(x, weight)
        return result

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        bias = torch.empty(1, 1, query.shape[2], key.shape[2]) if attn_mask is None else attn_mask
        lower = torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype
        result: Tensor = Attention.apply(*(tensor.to(lower) for tensor in (query, key, value, bias)))
        return result

    def one_kernel_dropout(x: Tensor, p: float, training: bool) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p else x

    with contextlib.ExitStack() as patches:
        for where, name, new in (
            (norm, "rms_norm", one_kernel_norm),
            (F, "scaled_dot_product_attention", attention),
            (t5_layers, "lacks_dropout", lambda query: False),
            (t5_layers, "dropout", one_kernel_dropout),
            (dropout, "dropout", one_kernel_dropout),
            (grouping, "PROMPTS_A_GROUP_ON_CPU", grouping.PROMPTS_A_GROUP),
            (grouping, "ONE_PASS_TOKENS_ON_CPU", grouping.ONE_PASS_TOKENS),
        ):
            patches.enter_context(mock.patch.object(where, name, new))
        yield


def calculated(folder: str, settings: list[str], events: int, training: bool) -> tuple[Kernels, float, int]:
    """→ (kernels of one step, GB that the forward pass keeps for the backward one, prompts)."""
    config, opened, tables, _, _ = open_folder(
        {"preset": None, "overrides": [*DEFAULTS, *settings], "folder": folder}, "cpu"
    )
    model = build_model(config, opened, tables).train(training)
    stream: Any = (
        TrainStream(opened, config.data, 0, events, events)
        if training
        else EvalStream(opened, "test", config.data, events)
    )
    fake, kernels = FakeTensorMode(allow_non_fake_inputs=True), Kernels()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    parameters: dict[str, Tensor] = {
        name: fake.from_tensor(parameter) for name, parameter in model.named_parameters()
    }
    weights = {parameter.untyped_storage()._cdata for parameter in parameters.values()}
    with as_on_a_gpu(kernels):
        batch = model.prepare(next(iter(stream)))  # needs values
    with as_on_a_gpu(kernels), fake:
        if not training:
            with autocast("cpu", config.run.precision), kernels, torch.no_grad():
                torch.func.functional_call(model, parameters, (batch, "score"))
            return kernels, 0.0, batch.candidates.numel()
        with kernels, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with autocast("cpu", config.run.precision):
                loss, _ = torch.func.functional_call(model, parameters, (batch,))
            loss.backward()
        trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        optimizer.step()  # makes its state
        with kernels:
            torch.nn.utils.clip_grad_norm_(trained, config.optim.grad_clip, foreach=True)
            optimizer.step()
    return kernels, sum(kept.values()) / GB, batch.candidates.numel()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("settings", nargs="*", help="such as model.variant=paper")
    parser.add_argument(
        "--events",
        type=int,
        nargs="+",
        default=[64, 256],
        help="of a micro-batch in training; scoring ranks a tenth of them, 100 candidates each",
    )
    parser.add_argument(
        "--top", type=int, default=0, help="also show so many kinds of kernels, the slowest first"
    )
    arguments = parser.parse_args()
    print(
        "| | prompt | events | kernels | their time, ms | launching them, ms | products' share | kept, GB | "
        "a second | MFU |\n" + "|---" * 10 + "|"
    )
    for training in (True, False):
        for prompt in ("paper", "compact"):
            for events in arguments.events:
                events = events if training else max(events // 10, 1)
                kernels, kept_gb, prompts = calculated(
                    arguments.folder, [f"model.prompt={prompt}", *arguments.settings], events, training
                )
                busy_s, launch_s = sum(kernels.seconds.values()), sum(kernels.count.values()) * LAUNCH_S
                products_s = sum(seconds for kind, seconds in kernels.seconds.items() if kernels.flops[kind])
                step_s, flops = max(busy_s, launch_s), sum(kernels.flops.values())
                cells: list[Any] = [
                    "training" if training else "scoring",
                    prompt,
                    events,
                    f"{sum(kernels.count.values()):,}",
                    f"{busy_s * 1e3:.1f}",
                ]
                cells += [
                    f"{launch_s * 1e3:.1f}",
                    f"{products_s / busy_s:.0%}",
                    f"{kept_gb:.1f}" if training else "",
                    f"{prompts / step_s:,.0f}",
                ]
                print(
                    "| " + " | ".join(map(str, [*cells, f"{flops / step_s / H200_FLOPS:.0%}"])) + " |",
                    flush=True,
                )
                for kind, seconds in collections.Counter(kernels.seconds).most_common(arguments.top):
                    work = f"{kernels.bytes[kind] / 1e9:7.2f} GB  {kernels.flops[kind] / 1e12:6.2f} TFLOP"
                    print(f"    {seconds * 1e3:7.2f} ms  {kernels.count[kind]:6,} kernels  {work}  {kind}")
    print(f"settings {[*DEFAULTS, *arguments.settings]}; calculated for one H200; commit {git_commit()}")


if __name__ == "__main__":
    main()
