"""AdamW for a model, and its learning rate."""

from typing import Any

import torch
from torch import nn

from trainer.config import OptimConfig

UNDECAYED_TABLES = ("relative_attention_bias",)  # T5's position biases: a table by shape, a bias by nature


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters. Weight decay on matrices only: no biases, norms, single vectors or
    tables of biases."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not any(table in name for table in UNDECAYED_TABLES)
            (decayed if decays else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=(0.9, config.beta2), fused=True
    )


def trained_shapes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Size]:
    """Name → shape of what the optimizer trains, in its order. To be asked before ZeRO-3 takes the parameters
    apart."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: parameter.shape for group in optimizer.param_groups for parameter in group["params"]
    }


def set_lr(optimizer: Any, lr: float) -> None:
    """The learning rate of the next step. It is a function of the step (training/schedule.py), so no
    scheduler object has to be saved and restored."""
    for group in optimizer.param_groups:
        group["lr"] = lr
