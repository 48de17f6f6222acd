"""Scores of a product of two vectors a ⊙ b."""

import torch
from torch import Tensor, nn

from trainer.models.layers.dropout import Dropout


class HadamardScorer(nn.Module):
    """num_layers linear maps with relu between them, the last to one number; with none the inner product."""

    def __init__(self, width: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        outputs = [width] * (num_layers - 1) + [1] if num_layers else []
        self.layers = nn.ModuleList(nn.Linear(width, output) for output in outputs)
        self.dropout = Dropout(dropout)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """left, right […, D], broadcast against each other → […], float32."""
        x = left * right
        if not len(self.layers):
            return x.float().sum(-1)
        for layer in self.layers[:-1]:
            x = self.dropout(layer(x).relu())
        with torch.autocast(x.device.type, enabled=False):  # in bf16 near scores would tie
            scores: Tensor = self.layers[-1](x.float())[..., 0]
        return scores
