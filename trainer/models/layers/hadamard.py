"""Scores of a product of two vectors a ⊙ b."""

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
        for number, layer in enumerate(self.layers):
            x = layer(x if number == 0 else self.dropout(x.relu()))
        return x[..., 0].float()
