"""Towers of linear maps."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from trainer.models.layers.dropout import Dropout


class ScoreLinear(nn.Linear):
    """A linear map to scores, in float32 whatever autocast says: bf16 would tie near scores."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def mlp(widths: Sequence[int], dropout: float, score: bool = False) -> nn.Sequential:
    """Linear, relu, dropout for each step of `widths`, input first; score: one more linear map to one
    number."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(), Dropout(dropout)]
    if score:
        layers.append(ScoreLinear(widths[-1], 1))
    return nn.Sequential(*layers)


def init_xavier(module: nn.Module) -> None:
    """For module.apply: linear maps xavier normal, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
