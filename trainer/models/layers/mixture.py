"""A mixture of experts for two tasks."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from trainer.models.layers.mlp import mlp


class TaskMixture(nn.Module):
    """Progressive layered extraction (Tang et al., RecSys 2020) of one level: experts of each task and
    shared ones, a gate, a tower and a head for each task. Both tasks are computed for every row, so that no
    rank calls fewer layers than another."""

    def __init__(
        self,
        width: int,
        num_experts: int,
        expert_dim: int,
        tower_dims: Sequence[int],
        head_dims: Sequence[int],
        dropout: float,
    ) -> None:
        """num_experts: of each task, and as many shared ones."""
        super().__init__()
        self.num_experts = num_experts
        # one map for all of them: recommendation, search, shared
        self.experts = mlp([width, 3 * num_experts * expert_dim], dropout)
        self.gates = nn.ModuleList(nn.Linear(width, 2 * num_experts) for _ in range(2))
        towers = [expert_dim, *tower_dims]
        self.towers = nn.ModuleList(mlp(towers, dropout) for _ in range(2))
        self.heads = nn.ModuleList(mlp([towers[-1], *head_dims], dropout, score=True) for _ in range(2))

    def forward(self, x_BCD: Tensor, search_B: Tensor) -> Tensor:
        """→ [B, C] float32: the search head's where search, else the recommendation head's."""
        hidden = zip(self.hidden(x_BCD), self.heads, strict=True)
        scores = [head(tower_BCD)[..., 0].float() for tower_BCD, head in hidden]
        return torch.where(search_B[:, None], scores[1], scores[0])

    def hidden(self, x_BCD: Tensor) -> Iterator[Tensor]:
        """What the heads read, [B, C, D] each: the recommendation tower's output, and the search tower's."""
        own_rec, own_src, shared = self.experts(x_BCD).unflatten(-1, (3 * self.num_experts, -1)).chunk(3, -2)
        for own, gate, tower in zip((own_rec, own_src), self.gates, self.towers, strict=True):
            weights = gate(x_BCD).float().softmax(-1)[..., None]  # own experts first
            mixed = (torch.cat([own, shared], -2) * weights).sum(-2)
            yield tower(mixed)
