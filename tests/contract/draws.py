"""What a loss does with torch: random numbers that two halves of a batch draw as the whole batch does, and
waits for its device."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PERIOD = 8  # rows; half a batch must be a multiple of it


class RepeatingDraws(TorchDispatchMode):
    """Every draw begins from the same seed, and its row r is its row r % PERIOD. A loss that draws negatives
    or masks for each event, or some that all events share, is then the mean over events to the last digits.
    Leaves torch's global generator seeded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        torch.manual_seed(0)
        if kwargs.get("generator") is not None:
            kwargs["generator"].manual_seed(0)
        drawn = func(*args, **kwargs)
        if isinstance(drawn, Tensor) and drawn.dim() and len(drawn) > PERIOD:
            drawn.copy_(drawn[torch.arange(len(drawn), device=drawn.device) % PERIOD])
        return drawn


class NoWaits(TorchDispatchMode):
    """Refuses what a GPU would be waited for: a tensor's value, and a result as large as values say."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = torch.Tag.data_dependent_output in func.tags
        if torch.Tag.dynamic_output_shape in func.tags:
            places = args[1] if func is torch.ops.aten.index.Tensor else None
            asked |= places is None or any(one is not None and one.dtype == torch.bool for one in places)
        assert not asked, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
