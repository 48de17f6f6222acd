import torch

from trainer.models.baselines.gru4rec import Gru4RecCore, Gru4RecSettings
from trainer.runtime.device import autocast


def test_the_gru_computes_in_float32_whatever_the_precision() -> None:
    """Autocast of a GPU would take float16 for it, whose small gradients are zero."""
    core, with_autocast = Gru4RecCore(10, Gru4RecSettings()), []
    core.gru.register_forward_pre_hook(lambda *_: with_autocast.append(torch.is_autocast_enabled("cpu")))
    with autocast("cpu", "bf16"):
        steps_BND = core(torch.tensor([[3, 5, 0]]))
    assert with_autocast == [False] and steps_BND.dtype == torch.bfloat16
