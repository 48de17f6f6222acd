"""BPR-MF: matrix factorisation with the pairwise loss of Rendle et al., "BPR: Bayesian Personalized Ranking
from Implicit Feedback", UAI 2009.

    s(u, i) = p_u · q_i + b_i
    L = mean over negatives j of −log σ(s(u, i) − s(u, j)) + λ (‖p_u‖² + ‖q_i‖² + mean_j ‖q_j‖²)

b_i is left out by default, as in the paper; its library (MyMediaLite) has it. Differs from the paper: λ is
one number; the regularisation counts each event's own rows, as bootstrap sampling does. Negatives are the
event's (data.num_negatives). A user without a row (a history given by hand) is the mean of the item vectors
of the history, and 0 without a history. Shapes: B events, C candidates, D = dim.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import REC
from trainer.batch import Batch
from trainer.config import ModelSettings, NonNegativeFloat, Positive
from trainer.models.contract import Ranker, World
from trainer.models.layers.attention import masked_mean
from trainer.models.layers.embedding import ItemTable, inner_products


@s.settings
class BprMfSettings(ModelSettings):
    name: Literal["bpr_mf"] = "bpr_mf"
    """user and item factors, trained pairwise"""
    dim: Positive = 64
    """width of user and item vectors"""
    reg: NonNegativeFloat = 0.03
    """λ, weight of the squared norms of an event's vectors"""
    item_bias: bool = False
    """adds b_i: popularity need not be spelled by the vectors. Better on 99 drawn negatives, worse over the
    catalogue (Scientific)"""


class Factors(nn.Module):
    """Rows of users and items (0 = unknown, padding) → vectors; an item's last number is its bias."""

    def __init__(self, num_users: int, num_items: int, settings: BprMfSettings) -> None:
        super().__init__()
        self.users = ItemTable(num_users, settings.dim, std=0.1)
        self.items = ItemTable(num_items, settings.dim, std=0.1)
        self.biases = ItemTable(num_items, 1, std=0.0) if settings.item_bias else None

    def forward(self, items: Tensor) -> Tensor:
        """[…] → […, D + 1]"""
        vectors: Tensor = self.items(items)
        bias = self.biases(items) if self.biases is not None else vectors.new_zeros((*vectors.shape[:-1], 1))
        return torch.cat([vectors, bias], -1)

    def catalogue(self, asked_BD: Tensor) -> Tensor:
        """Scores of all items for vectors [B, D + 1], float32."""
        scores: Tensor = self.items(scores_of=asked_BD[:, :-1])
        return scores if self.biases is None else scores + self.biases(scores_of=asked_BD[:, -1:])


class BprMf(Ranker):
    """Recommendation only."""

    Settings = BprMfSettings
    title = "BPR-MF"
    tasks = (REC,)
    settings: BprMfSettings

    def __init__(self, settings: BprMfSettings, world: World) -> None:
        super().__init__(settings, world)
        self.factors = Factors(world.num_users, world.num_items, settings)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        user_BD, items_BCD = self._asked(batch), self.factors(batch.candidates + 1)
        scores_BC, negative_BC = inner_products(user_BD, items_BCD), 1 - batch.labels
        clicked_B1 = (scores_BC * batch.labels).sum(1, keepdim=True)
        num_negatives_B = negative_BC.sum(1).clamp(min=1)
        pairs_B = (F.softplus(scores_BC - clicked_B1) * negative_BC).sum(1) / num_negatives_B
        weights_BC = batch.labels + negative_BC / num_negatives_B[:, None]
        squares_B = user_BD[:, :-1].square().sum(1) + (items_BCD.square().sum(2) * weights_BC).sum(1)
        pairwise, norms = pairs_B.mean(), squares_B.mean()
        report = {"pairwise_loss": pairwise.detach(), "squared_norms": norms.detach()}
        return pairwise + self.settings.reg * norms, report

    def score(self, batch: Batch) -> Tensor:
        return inner_products(self._asked(batch), self.factors(batch.candidates + 1))

    def score_catalogue(self, batch: Batch) -> Tensor:
        return self.factors.catalogue(self._asked(batch))

    def _asked(self, batch: Batch) -> Tensor:
        """The user's vector, or the mean of the history's items, with 1 behind it for the bias: [B, D + 1]"""
        user_BD = self.factors.users(batch.user + 1)
        if not self.training and bool((batch.user < 0).any()):  # a history given by hand
            mean_BD = masked_mean(self.factors.items(batch.history_items + 1), batch.history_mask)
            user_BD = torch.where((batch.user < 0)[:, None], mean_BD, user_BD)
        return torch.cat([user_BD, user_BD.new_ones((len(user_BD), 1))], 1)


MODEL = BprMf
