"""The two views of a history and its soft filtering by the candidate (paper 4.1, Eqs. 3–6).

Letters: B events, N history, C candidates, W view width (K on the CF side, D on the semantic side), H heads.
"""

import torch
from torch import Tensor, nn

from trainer.models.layers.history import ages

# In evaluation torch's encoder layer would take a shortcut that reads its weights in another order than
# training does; ZeRO-3 prefetches in the order it has seen, and ends the run with a tracing error when a
# validation stands between two training steps. The history encoders are a hundredth of the work.
torch.backends.mha.set_fastpath_enabled(False)


class HistoryEncoder(nn.Module):
    """Eqs. 3 and 4: H = FFN(MSA(Q = K = V = E[H_u])), one transformer encoder layer.

    The extended variant adds what the equations leave out: where in the history an item stands (0 = newest)
    and whether it was searched or recommended.
    """

    def __init__(self, width: int, num_heads: int, dropout: float, max_history: int, ordered: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width, num_heads, dim_feedforward=2 * width, dropout=dropout, activation="gelu", batch_first=True
        )
        self.age = nn.Embedding(max_history, width) if ordered else None
        self.behaviour = nn.Embedding(2, width) if ordered else None
        for table in (self.age, self.behaviour):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        # so that the encoder starts as the (normalised) item vectors themselves
        for residual in (self.layer.self_attn.out_proj, self.layer.linear2):
            nn.init.zeros_(residual.weight)
            nn.init.zeros_(residual.bias)

    def forward(self, items_BNW: Tensor, tasks_BN: Tensor, mask_BN: Tensor) -> Tensor:
        """Item vectors [B, N, W] → encoded history [B, N, W]; mask True = a real item. Rows without any item
        give finite values."""
        if self.age is not None and self.behaviour is not None:
            items_BNW = items_BNW + self.age(ages(mask_BN)) + self.behaviour(tasks_BN)
        return self.layer(items_BNW, src_key_padding_mask=~_never_empty(mask_BN))


class SoftFilter(nn.Module):
    """Eqs. 5 and 6: the candidate decides how much each history item counts.

    The three matrices start as the identity: history items count by their similarity to the candidate, and f
    is their weighted mean.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)  # W_c (W_s) of Eq. 6
        self.no_history = nn.Parameter(torch.zeros(width))
        for linear in (self.query, self.key, self.value):
            nn.init.eye_(linear.weight)
        nn.init.zeros_(self.query.bias)
        nn.init.zeros_(self.key.bias)

    def weights(self, candidates_BCW: Tensor, history_BNW: Tensor, mask_BN: Tensor) -> Tensor:
        """Eq. 5: a_j = softmax_j(score(e_i, h_j)), mean over heads, padding masked → [B, C, N] float32."""
        batch, num_candidates, width = candidates_BCW.shape
        shape = (self.num_heads, width // self.num_heads)
        query = self.query(candidates_BCW).view(batch, num_candidates, *shape).transpose(1, 2)
        key = self.key(history_BNW).view(batch, -1, *shape).transpose(1, 2)
        scores_BHCN = (query @ key.transpose(2, 3)).float() / shape[1] ** 0.5
        scores_BHCN = scores_BHCN.masked_fill(~_never_empty(mask_BN)[:, None, None, :], float("-inf"))
        return scores_BHCN.softmax(-1).mean(1)

    def forward(self, candidates_BCW: Tensor, history_BNW: Tensor, mask_BN: Tensor) -> Tensor:
        """Eq. 6: f(u, i) = Σ_j a_j · W h_j → [B, C, W]; a user without history gets the learned `no_history`
        vector."""
        weights_BCN = self.weights(candidates_BCW, history_BNW, mask_BN)
        filtered_BCW = weights_BCN.to(history_BNW.dtype) @ self.value(history_BNW)
        return torch.where(
            mask_BN.any(1)[:, None, None], filtered_BCW, self.no_history.to(filtered_BCW.dtype)
        )


class MeanFilter(nn.Module):
    """What stands in SoftFilter's place where it is ablated: every history item counts alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.no_history = nn.Parameter(torch.zeros(width))

    def weights(self, candidates_BCW: Tensor, history_BNW: Tensor, mask_BN: Tensor) -> Tensor:
        """[B, C, N] float32."""
        weights_BN = mask_BN.float() / mask_BN.sum(1, keepdim=True).clamp(min=1)
        return weights_BN[:, None].expand(-1, candidates_BCW.shape[1], -1)

    def forward(self, candidates_BCW: Tensor, history_BNW: Tensor, mask_BN: Tensor) -> Tensor:
        """The mean, [B, C, W]; of an empty history the learned `no_history` vector."""
        weights_BCN = self.weights(candidates_BCW, history_BNW, mask_BN)
        mean_BCW = weights_BCN.to(history_BNW.dtype) @ history_BNW
        return torch.where(mask_BN.any(1)[:, None, None], mean_BCW, self.no_history.to(mean_BCW.dtype))


def _never_empty(mask_BN: Tensor) -> Tensor:
    """Let rows without history attend to their first padding position, so that no softmax is over nothing
    (NaN)."""
    first = torch.zeros_like(mask_BN)
    first[:, 0] = True
    return mask_BN | (first & ~mask_BN.any(1, keepdim=True))
