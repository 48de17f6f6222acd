"""Contrastive terms with a learned similarity, s(a, b) = tanh(aᵀ W b) / τ (SESRec, UniSAR). Softmaxes in
float32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.contract import ONE_PROCESS, Ranks

MIN_TEMPERATURE = 1e-2  # τ is learned: it must not reach 0


class _Similarity(nn.Module):
    """W: xavier normal. τ is learned from its initial value."""

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        self.temperature = nn.Parameter(torch.full((1,), temperature))
        nn.init.xavier_normal_(self.weight)

    def matrix(self, left_PD: Tensor, right_ND: Tensor) -> Tensor:
        return (left_PD @ self.weight @ right_ND.T).float().tanh() / self._temperature

    def pairs(self, left_PD: Tensor, right_PD: Tensor) -> Tensor:
        return ((left_PD @ self.weight) * right_PD).float().sum(1).tanh() / self._temperature

    @property
    def _temperature(self) -> Tensor:
        return self.temperature.float().clamp(min=MIN_TEMPERATURE)


class QueryItemContrast(_Similarity):
    """InfoNCE between a query and an item that was clicked for it. One W serves both directions: the item
    stands on the left when queries are told apart."""

    def forward(
        self, queries_PD: Tensor, items_PD: Tensor, other_queries_ND: Tensor, other_items_ND: Tensor
    ) -> Tensor:
        """P pairs, N negatives that all pairs share → losses [P]: half the sum of both directions."""
        of_query = self._loss(queries_PD, items_PD, other_items_ND)
        of_item = self._loss(items_PD, queries_PD, other_queries_ND)
        return (of_query + of_item) / 2

    def of_slots(
        self,
        queries_BND: Tensor,
        items_BND: Tensor,
        pairs_BN: Tensor,
        other_queries_ND: Tensor,
        other_items_ND: Tensor,
    ) -> Tensor:
        """Losses of histories' slots [B, N]; 0 for those that are no pair."""
        losses_P = self(queries_BND[pairs_BN], items_BND[pairs_BN], other_queries_ND, other_items_ND)
        return losses_P.new_zeros(pairs_BN.shape).masked_scatter(pairs_BN, losses_P)

    def _loss(self, left_PD: Tensor, right_PD: Tensor, others_ND: Tensor) -> Tensor:
        positive_P1 = self.pairs(left_PD, right_PD)[:, None]
        return -torch.cat([positive_P1, self.matrix(left_PD, others_ND)], 1).log_softmax(1)[:, 0]


class ViewContrast(_Similarity):
    """InfoNCE between two views of a row: each view must find the other among the 2A − 2 views of other
    rows, A of all ranks."""

    def forward(
        self, first_BD: Tensor, second_BD: Tensor, valid_B: Tensor, ranks: Ranks = ONE_PROCESS
    ) -> Tensor:
        """→ losses [B], mean of both directions. Rows that are not valid are nobody's negatives; their own
        loss is 0."""
        (all_first, start), (all_second, _) = ranks.gathered(first_BD), ranks.gathered(second_BD)
        all_valid, _ = ranks.gathered(valid_B.long())
        rows, others = torch.cat([first_BD, second_BD]), torch.cat([all_first, all_second])
        place_B = torch.arange(start, start + len(first_BD), device=rows.device)
        own = torch.cat([place_B, place_B + len(all_first)])
        partner = torch.cat([place_B + len(all_first), place_B])
        hidden = (own[:, None] == torch.arange(len(others), device=rows.device)) | (all_valid == 0).repeat(2)
        logits = self.matrix(rows, others).masked_fill(hidden, torch.finfo(torch.float32).min)
        losses = F.cross_entropy(logits, partner, reduction="none").view(2, -1).mean(0)
        return losses.masked_fill(~valid_B, 0.0)
