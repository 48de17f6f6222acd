"""A two-tower model for both tasks (after Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large
Corpus Item Recommendations", RecSys 2019).

    item  v_i = E[i] + W_x mean(words of i) + mean(C[categories of i, from the root down])
    asked u   = W_q mean(words of the query) + g_t · Σ_j softmax_j(a·v_j + p_age(j)) v_j      over the history
    s(u, i)   = u · v_i + b_i

One user tower for both tasks: a recommendation has no query, and g_t, learned for each task, says how much
the history counts. Loss: softmax of the clicked item against the event's candidates and the clicked items of
the other events of the batch, on all ranks, less the logarithm of how often each item is drawn (its
correction for the batch's bias to popular items), at a temperature. An event's own item and the items of its
history are no negatives.

Differs from the paper: item frequencies are counted once in the training split, not streamed; vectors are not
normalised, a bias stands for popularity. Words are anonymised words where the data has them, else tokens. C
is read with categories=true, as the preset has it, if the folder has categories. An unknown word, a cold item
and an empty history add nothing.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import REC, SRC
from trainer.batch import Batch, query_terms_of, rows_of
from trainer.config import Fraction, ModelSettings, NonNegativeFloat, Positive, PositiveFloat
from trainer.models.contract import Ranker, View, World
from trainer.models.layers.dropout import Dropout
from trainer.models.layers.embedding import ItemTable, WordMean
from trainer.models.layers.history import ages
from trainer.models.losses import weighted_mean


@s.settings
class TwoTowerSettings(ModelSettings):
    name: Literal["two_tower"] = "two_tower"
    """two towers and an inner product"""
    dim: Positive = 64
    """width of all vectors"""
    dropout: Fraction = 0.1
    """dropout of word means and item vectors while training"""
    temperature: PositiveFloat = 1.0
    """of the softmax"""
    correction: NonNegativeFloat = 1.0
    """how much of the sampling bias is taken out: 0 none, 1 all"""
    categories: bool = False
    """the item tower reads the item's categories, too, where the folder has them"""


class Towers(nn.Module):
    """Both towers. Every way in goes through forward(), where ZeRO-3 gathers weights."""

    def __init__(self, world: World, settings: TwoTowerSettings) -> None:
        super().__init__()
        dim = settings.dim
        self.items = ItemTable(world.num_items, dim, std=0.02)
        self.biases = ItemTable(world.num_items, 1, std=1e-4)
        self.words = WordMean(world.num_terms, dim)
        nn.init.normal_(self.words.words.weight, std=dim**-0.5)
        self.reads_categories = settings.categories and world.num_categories > 0
        if self.reads_categories:
            self.categories = WordMean(world.num_categories, dim)
            nn.init.normal_(self.categories.words.weight, std=0.02)
        self.item_words, self.query_words = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.attention = nn.Linear(dim, 1)
        self.ages = nn.Embedding(world.data.history_max, 1)
        self.taste = nn.Embedding(2, dim)
        nn.init.zeros_(self.ages.weight)
        nn.init.ones_(self.taste.weight)
        self.dropout = Dropout(settings.dropout)

    def forward(self, rows: Tensor, words: Tensor, categories: Tensor | None) -> Tensor:
        """Items […] (row + 1, 0 = padding), their words […, W] and categories […, T] → […, dim + 1], the bias
        last."""
        vectors = self.items(rows) + self.item_words(self.dropout(self.words(words)))
        if categories is not None:
            vectors = vectors + self.dropout(self.categories(categories))
        return torch.cat([vectors, self.biases(rows)], -1)

    def asked(self, history_BND: Tensor, mask_BN: Tensor, query_BW: Tensor, task_B: Tensor) -> Tensor:
        """→ [B, dim + 1]; the last number is 1, for the bias."""
        logits_BN = (self.attention(history_BND) + self.ages(ages(mask_BN)))[..., 0]
        weights_BN = logits_BN.masked_fill(~mask_BN, -1e9).softmax(1) * mask_BN
        history_BD = (weights_BN[..., None] * history_BND).sum(1) * self.taste(task_B)
        vectors = self.query_words(self.dropout(self.words(query_BW))) + history_BD
        return torch.cat([vectors, vectors.new_ones((len(vectors), 1))], -1)


class TwoTower(Ranker):
    """B events, C candidates, D = dim."""

    Settings = TwoTowerSettings
    title = "two-tower"
    needs = frozenset({"item_text"})
    may_read = frozenset({"item_category"})
    in_batch = True
    settings: TwoTowerSettings
    log_share: Tensor  # [I] log of an item's share of the training clicks, counted with one click more each

    def __init__(self, settings: TwoTowerSettings, world: World) -> None:
        super().__init__(settings, world)
        self.towers = Towers(world, settings)
        self.register_buffer("log_share", torch.zeros(world.num_items))

    def fit(self) -> None:
        count = torch.bincount(self.world.clicks().item, minlength=self.world.num_items) + 1
        self.log_share.copy_((count / count.sum()).log())

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        asked_BD = self._asked(batch)
        own_BCD = self._items(batch.candidates)
        clicked_B1, item_B = batch.labels.argmax(1, keepdim=True), batch.clicked
        clicked_BD = own_BCD.gather(1, clicked_B1[..., None].expand(-1, -1, own_BCD.shape[2]))[:, 0]
        tau, correction = self.settings.temperature, self.settings.correction
        with torch.autocast(asked_BD.device.type, enabled=False):
            asked_BD, clicked_BD = asked_BD.float(), clicked_BD.float()
            own_BC = (asked_BD[:, None] * own_BCD.float()).sum(-1) / tau
            all_clicked_AD, _ = self.world.ranks.gathered(clicked_BD)  # A: events of all ranks
            all_items_A, _ = self.world.ranks.gathered(item_B)
            others_BA = asked_BD @ all_clicked_AD.T / tau - correction * self.log_share[all_items_A]
        known_BN = torch.where(batch.history_mask, batch.history_items, -1)
        taken_BA = (all_items_A == item_B[:, None]) | (known_BN[:, :, None] == all_items_A).any(1)
        positive_B = (own_BC * batch.labels).sum(1) - correction * self.log_share[item_B]
        drawn_BC = own_BC + correction * torch.log(torch.tensor(self.world.num_items, dtype=torch.float32))
        others = others_BA.masked_fill(taken_BA, -torch.inf)
        everything = torch.cat(
            [positive_B[:, None], drawn_BC.masked_fill(batch.labels > 0, -torch.inf), others], 1
        )
        loss_B = everything.logsumexp(1) - positive_B
        return weighted_mean(loss_B, self.event_weights(batch)), {}

    def score(self, batch: Batch) -> Tensor:
        return (self._asked(batch).float()[:, None] * self._items(batch.candidates).float()).sum(-1)

    def views(self) -> dict[str, View]:
        def ask(batch: Batch, mean: Tensor) -> Tensor:
            return self._asked(batch).float()

        return {
            "towers": View(
                self.settings.dim + 1, lambda rows: self._items(rows).float(), ask, {REC: 1.0, SRC: 1.0}
            )
        }

    def _items(self, items: Tensor) -> Tensor:
        """Rows of items […] → […, D + 1]."""
        categories = rows_of(self.tables.item_category, items) if self.towers.reads_categories else None
        vectors: Tensor = self.towers(items + 1, rows_of(self.tables.item_terms, items), categories)
        return vectors

    def _asked(self, batch: Batch) -> Tensor:
        history_BND = self._items(batch.history_items)[..., :-1]
        words_BW = query_terms_of(self.tables, batch.query)
        return self.towers.asked(history_BND, batch.history_mask, words_BW, batch.task)


MODEL = TwoTower
