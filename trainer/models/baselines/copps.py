"""CoPPS (Dai et al., "Contrastive Learning for User Sequence Representation in Personalized Product Search",
KDD 2023): contrastive tasks on top of a model of product search. [?] There is no public code, and we know the
abstract only: three augmentations, "using an external knowledge graph and the correlations within and between
user sequences". What follows is ours.

    L = L of TEM + λ Σ_3 InfoNCE(z, z⁺),  z = M of an event, cosine / τ, negatives: other events of the batch

    1 graph     history items replaced with probability ρ by neighbours: items of the same leaf category, or,
                where the folder has no categories, items clicked for a query that the item was clicked for
    2 within    two of {crop, mask, reorder} of the same history
    3 between   another user's search with the same query, else with the same clicked item, with the history
                that came before it; events without such a search take no part

Scoring is TEM's (tem.py). While it trains, the clicks of the training split lie on the device, 68 bytes each.
Shapes: query words [B, Q], history ids [B, N] padded at the end with 0, z [B, D].
"""

from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards import settings as s
from data_shards.histories import in_histories, windows
from data_shards.schema import SRC
from trainer.batch import Batch, TrainClicks
from trainer.config import Fraction, NonNegativeFloat, PositiveFloat
from trainer.models.baselines.tem import Tem, TemSettings
from trainer.models.layers.augment import augmented
from trainer.models.layers.categories import last_category
from trainer.models.layers.groups import Groups
from trainer.models.layers.history import newest


@s.settings
class CoppsSettings(TemSettings):
    name: Literal["copps"] = "copps"  # type: ignore[assignment]
    """TEM with contrastive tasks over user sequences"""
    contrastive_weight: NonNegativeFloat = 0.1
    """λ of the three contrastive terms"""
    temperature: PositiveFloat = 0.5
    """τ of the three"""
    replace: Fraction = 0.3
    """ρ: probability that a history item is replaced by a neighbour in the graph's view"""


class Copps(Tem):
    """Search only."""

    Settings = CoppsSettings
    title = "CoPPS"
    may_read = frozenset({"item_category"})
    in_batch = True  # the other events are the negatives

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, report = super().loss(batch)
        if not self.settings.contrastive_weight:
            return loss, report
        contrast = self.contrastive_loss(batch)
        loss = loss + self.settings.contrastive_weight * contrast
        return loss, {**report, "contrastive_loss": contrast.detach()}

    def contrastive_loss(self, batch: Batch) -> Tensor:
        """The three terms, each a mean over events. All views pass the model in one call."""
        ids_BN, words_BQ = self.history(batch), self.query_words(batch.query)
        partner_B = self.partners(batch)
        has_partner_B = partner_B >= 0
        partner_BN, partner_words_BQ = self.row_of_click(partner_B, ids_BN.shape[1])
        histories = [ids_BN, self.neighbours(ids_BN), augmented(ids_BN), augmented(ids_BN), partner_BN]
        words = torch.cat([words_BQ.repeat(4, 1), partner_words_BQ])
        z, graph, first, second, partner = self.core(words, torch.cat(histories)).chunk(5)
        everyone_B = torch.ones_like(has_partner_B)
        all_queries_A, _ = self.world.ranks.gathered(batch.query)
        same_query_BA = batch.query[:, None] == all_queries_A[None, :]  # positives of each other in view 3
        return (
            self.info_nce(z, graph, everyone_B).mean()
            + self.info_nce(first, second, everyone_B).mean()
            + self.info_nce(z, partner, has_partner_B, same_query_BA).mean()
        )

    def info_nce(
        self, z_BD: Tensor, other_BD: Tensor, valid_B: Tensor, alike_BA: Tensor | None = None
    ) -> Tensor:
        """Losses [B] float32 among the A events of all ranks; 0 for rows that are not valid, which are
        nobody's negatives. alike: pairs of rows that are not negatives of each other."""
        ranks = self.world.ranks
        all_others_AD, start = ranks.gathered(other_BD)
        all_valid_A, _ = ranks.gathered(valid_B.long())
        with torch.autocast(z_BD.device.type, enabled=False):
            cosine_BA = F.normalize(z_BD.float(), dim=1) @ F.normalize(all_others_AD.float(), dim=1).T
        own_B = torch.arange(start, start + len(z_BD), device=z_BD.device)
        own_BA = own_B[:, None] == torch.arange(len(all_valid_A), device=z_BD.device)
        hidden_BA = (all_valid_A == 0)[None, :]
        if alike_BA is not None:
            hidden_BA = hidden_BA | alike_BA
        logits_BA = (cosine_BA / self.settings.temperature).masked_fill(hidden_BA & ~own_BA, -torch.inf)
        return F.cross_entropy(logits_BA, own_B, reduction="none") * valid_B

    # ---- views ---------------------------------------------------------------------------------------------

    def neighbours(self, ids_BN: Tensor) -> Tensor:
        """View 1 of histories: some items replaced by a neighbour, where they have one."""
        items_BN = ids_BN - 1  # −1 for padding: no key
        if self._categories is not None:
            leaves, groups = self._categories
            found_BN = groups.draw(leaves[items_BN.clamp(min=0)])
        else:
            clicks, by_query, by_item = self._clicks
            queries_BN = _looked_up(clicks.query, by_item.draw(items_BN))
            found_BN = _looked_up(clicks.item, by_query.draw(queries_BN))
        chosen_BN = torch.rand(ids_BN.shape, device=ids_BN.device) < self.settings.replace
        return torch.where(chosen_BN & (found_BN >= 0) & (ids_BN > 0), found_BN + 1, ids_BN)

    def partners(self, batch: Batch) -> Tensor:
        """Another user's search with the same query, else with the same item: rows of the clicks [B], −1 for
        none. One draw of each: a user who is alone there finds only themselves, and so none."""
        clicks, by_query, by_item = self._clicks
        found = [by_query.draw(batch.query), by_item.draw(batch.clicked)]
        of_query, of_item = (
            rows.masked_fill(_looked_up(clicks.user, rows) == batch.user, -1) for rows in found
        )
        return torch.where(of_query >= 0, of_query, of_item)

    def row_of_click(self, rows_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """History ids [B, length] and query words [B, Q] of training clicks, as events of these clicks have
        them; padding for row −1."""
        clicks, (shown, first, count) = self._clicks[0], self._histories
        place_W = torch.arange(self.world.data.history_max, device=rows_B.device)
        kept_BW = place_W < _looked_up(count, rows_B)[:, None]
        row_BW = shown[(_looked_up(first, rows_B)[:, None] + place_W) * kept_BW]
        if self.settings.history == "src":
            kept_BW = kept_BW & (clicks.task[row_BW] == SRC)
        ids_BN = newest(clicks.item[row_BW] + 1, kept_BW, length)
        return ids_BN, self.query_words(_looked_up(clicks.query, rows_B))

    # ---- what they are drawn from --------------------------------------------------------------------------

    @cached_property
    def _clicks(self) -> tuple[TrainClicks, Groups, Groups]:
        """Training clicks by user and time, and their searches by query and by item."""
        clicks = self.world.clicks()
        on_device = {
            name: getattr(clicks, name).to(self.device) for name in ("user", "task", "item", "query")
        }
        clicks = replace(clicks, **on_device)
        searches = clicks.task == SRC
        return clicks, Groups(clicks.query), Groups(clicks.item.masked_fill(~searches, -1))

    @cached_property
    def _histories(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the clicks that histories show, and of each click the first of them in its own history and
        how many follow: by the rule of the shards."""
        clicks = self.world.clicks()
        user, time, item, task = (
            column.numpy() for column in (clicks.user, clicks.time, clicks.item, clicks.task)
        )
        kept = in_histories(user, time, item, task)
        found = (kept.nonzero()[0], *windows(user, time, kept, self.world.data.history_max))
        shown, first, count = (torch.from_numpy(rows).to(self.device) for rows in found)
        return shown, first, count

    @cached_property
    def _categories(self) -> tuple[Tensor, Groups] | None:
        """The deepest category of each item, counted from 0, −1 for none; None where the folder has none."""
        if not self.tables.item_category.shape[1]:
            return None
        leaves = last_category(self.tables.item_category) - 1
        return leaves, Groups(leaves)


def _looked_up(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows]; −1 for row −1."""
    return values[rows.clamp(min=0)].masked_fill(rows < 0, -1)


MODEL = Copps
