"""LightGCN (He et al., SIGIR 2020) as `gensr cf` trains it: e_u · e_i of the full table.

Two forms of the same table. user: the user's own vector. history (the stronger one): the mean of the vectors
of the history, which also holds the clicks after the training split, and serves users that the table never
saw. Users and items without training clicks are zero vectors: their candidates tie.
"""

from typing import Literal

import torch
from torch import Tensor

from data_shards import settings as s
from data_shards.schema import REC
from trainer.batch import Batch
from trainer.config import ModelSettings
from trainer.models.contract import Ranker
from trainer.models.layers.attention import masked_mean


@s.settings
class LightGcnSettings(ModelSettings):
    name: Literal["lightgcn"] = "lightgcn"
    """the CF table alone"""
    by: Literal["history", "user"] = "history"
    """whose vector is multiplied with the item's: the mean of the history's, or the user's own"""


class LightGcn(Ranker):
    """Nothing is trained here: the table has been. Recommendation only."""

    Settings = LightGcnSettings
    title = "LightGCN"
    settings: LightGcnSettings
    tasks = (REC,)
    needs = frozenset({"cf", "cf_users"})
    trained = False

    def score(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # bf16 would tie items
            return torch.einsum("bk,bck->bc", self._taste(batch), self.tables.cf[batch.candidates])

    def score_catalogue(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self._taste(batch) @ self.tables.cf.T

    def _taste(self, batch: Batch) -> Tensor:
        if self.settings.by == "user":
            self.check_history(batch, reads_users=True)
            return self.tables.cf_users[batch.user]
        return masked_mean(self.tables.cf[batch.history_items], batch.history_mask)


MODEL = LightGcn
