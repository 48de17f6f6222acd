"""A device for tests of placement: its tensors say "meta", and what they hold lies in the CPU's memory. An
operation with tensors of two devices is refused, as a GPU does, while values can be asked for.

(tests/unit/test_device.py uses torch's own "meta", which holds no values: whoever asks for one fails.)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

AWAY = torch.device("meta")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
MATH = 0  # of scaled_dot_product_attention: the way that is made of other operations


class Away(Tensor):
    """Of that device; `held` is on the CPU."""

    held: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "Away":
        if held.is_sparse:
            outside = torch.empty(held.shape, dtype=held.dtype, layout=held.layout, device=AWAY)
        else:
            outside = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=AWAY)
        self = Tensor._make_subclass(cls, outside)
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return computed(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()


class Placing(TorchDispatchMode):
    """Sees what no tensor of the device takes part in: new ones, and copies from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """With what they hold; what comes out is where torch would have put it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Away)}
    here = [tensor for tensor in tensors if not isinstance(tensor, Away)]
    if there and func not in COPIES:
        assert not any(tensor.ndim for tensor in here), (
            f"{func} reads a tensor of the CPU and one of the device"
        )
    if there and func is aten._fused_sdp_choice.default:
        return MATH
    device = kwargs.get("device")
    goes_there = bool(there) if device is None else torch.device(device) == AWAY
    if func is aten.copy_.default:
        goes_there = isinstance(args[0], Away)
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    if there and torch.Tag.inplace_view in func.tags:  # transpose_ and the like change the tensor's own shape
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    return tree_map(lambda leaf: _placed(leaf, there), found) if goes_there else found


def _placed(leaf: Any, there: dict[int, Away]) -> Any:
    """there: the tensors that took part, by what they hold; an operation in place gives one of them back."""
    if not isinstance(leaf, Tensor):
        return leaf
    return there[id(leaf)] if id(leaf) in there else Away(leaf.resolve_conj())


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, Away) else leaf


def move(module: nn.Module) -> None:
    """What Module.to() does, which would not give parameters another class; those that are shared stay so."""
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight not in moved:
                moved[weight] = nn.Parameter(weight.detach().to(AWAY), weight.requires_grad)
            setattr(part, name, moved[weight])
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(AWAY))
