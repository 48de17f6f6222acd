"""Batch normalisation over any number of leading dimensions, without padding, and over all ranks."""

import torch
from torch import Tensor, nn

from trainer.models.contract import GatherRows

MOMENTUM = 0.1  # of the running statistics


class BatchNorm(nn.Module):
    """As nn.BatchNorm1d, in float32. In training the statistics are those of the micro-batch, of all ranks
    where `gather` is given (models/contract.py): so all ranks keep the same running ones, which evaluation
    uses."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, eps: float = 1e-5, gather: GatherRows | None = None) -> None:
        super().__init__()
        self.eps, self.gather = eps, gather
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        """x […, width]; counted […]: rows that the statistics are made of, all by default."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self._statistics(x.float(), counted)
        scale = (var + self.eps).rsqrt() * self.weight
        return torch.addcmul(self.bias - mean * scale, x.float(), scale).to(x.dtype)

    def _statistics(self, x: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, -2)
        weight = torch.ones_like(rows[:, :1]) if counted is None else counted.reshape(-1, 1).to(rows.dtype)
        totals = self._of_all_ranks(torch.cat([(rows * weight).sum(0), weight.sum()[None]]))
        count = totals[-1].clamp(min=1)
        mean = totals[:-1] / count
        var = self._of_all_ranks(((rows - mean).square() * weight).sum(0)) / count
        with torch.no_grad():
            unbiased = var * count / (count - 1).clamp(min=1)
            # one batch that overflows is left out by run.on_nan=skip, and must not stay here for ever
            finite = mean.isfinite() & unbiased.isfinite()
            self.running_mean.lerp_(mean.where(finite, self.running_mean), MOMENTUM)
            self.running_var.lerp_(unbiased.where(finite, self.running_var), MOMENTUM)
        return mean, var

    def _of_all_ranks(self, total: Tensor) -> Tensor:
        return total if self.gather is None else self.gather(total[None])[0].sum(0)


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """By name. They are learned along with the weights, and belong to them."""
    return {
        f"{name}.{key}": statistic
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
        for key, statistic in module.named_buffers()
    }
