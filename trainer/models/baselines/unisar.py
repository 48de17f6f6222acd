"""UniSAR (Shi, Si, Xu, Zhang, Zang, Song, Leng, Xu, Chen, Wang, "UniSAR: Modeling User Transition Behaviors
between Search and Recommendation", SIGIR 2024).

    text = tanh(W mean(words));  item = tanh(W [id; caption; category]);  user = tanh(W id)
    one list of a user's clicks: recommended items, and sessions = query + mean of the items clicked for it
    across: a layer over the whole list in which a slot sees only slots of the other kind: s2r at items, r2s
        at sessions
    within: a layer over the items, r2r, and one over the sessions, s2s
    alignment: a user's mean s2r and mean r2r find each other among the batch's, likewise r2s and s2s
    fusion: a decoder layer on r2r with memory s2r, on s2s with memory r2s; then attention by the candidate
    PLE (layers/mixture.py): 4 experts a task and 4 shared of [x_rec, x_src, item, user, query]; gate, tower
        and head of each task
    L = L_rec + α L_src
    each: click BCE + w_q query–item InfoNCE + w_h (both alignments)

Differs from the published code: one history of data.history_max clicks instead of 30 + 30 first records; a
session is a run of clicks for one query. Attention to nothing gives 0, where a user without searches (or
without recommendations) made NaN there, and such a row is left out of the alignments. Both tasks stand in
one batch: with r recommendations for each search, a search weighs α r, so that L_src is a mean over searches,
and contrastive negatives come from both. Categories are the mean over the levels; there are no user features;
an unknown user, and a query that the folder does not know, is the zero vector. Shapes: history [B, N, D],
candidates [B, C, D], scores [B, C] (log-odds).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import SRC
from trainer.batch import Batch, query_terms_of, rows_of
from trainer.config import Fraction, ModelSettings, NonNegativeFloat, Positive, PositiveFloat
from trainer.models.contract import ONE_PROCESS, Ranker, Ranks, World, clicked_only
from trainer.models.layers.attention import TargetAttention, masked_mean
from trainer.models.layers.contrast import QueryItemContrast, ViewContrast
from trainer.models.layers.embedding import ItemTable, Positions, WordMean
from trainer.models.layers.history import pack, session_means, sessions
from trainer.models.layers.mixture import TaskMixture
from trainer.models.layers.mlp import init_xavier
from trainer.models.layers.sequence import run_layers, torch_layer


@s.settings
class UniSarSettings(ModelSettings):
    name: Literal["unisar"] = "unisar"
    """transitions between search and recommendation"""
    id_dim: Positive = 32
    """width of the tables of users, items, categories and words"""
    dim: Positive = 64
    """width of item, user and query vectors and of the layers"""
    num_layers: Positive = 1
    """layers of each transformer"""
    num_heads: Positive = 2
    """attention heads"""
    ffn_dim: Positive = 64
    """inner width of the layers"""
    dropout: Fraction = 0.1
    """dropout of layers, experts, towers and heads"""
    num_experts: Positive = 4
    """experts of each task, and as many that both share"""
    expert_dim: Positive = 64
    """width of an expert"""
    tower_dims: tuple[int, ...] = (128, 64)
    """widths of a task's tower"""
    head_dims: tuple[int, ...] = (200, 80)
    """widths of a task's head before its score"""
    query_item_weight: NonNegativeFloat = 1e-3
    """w_q of the query–item InfoNCE (0.1 on Amazon)"""
    query_item_temperature: PositiveFloat = 0.5
    """τ of the query–item InfoNCE at the start (0.1 on Amazon)"""
    num_contrast: Positive = 1024
    """random items and queries a step that the query–item InfoNCE tells apart"""
    history_weight: NonNegativeFloat = 0.1
    """w_h of the alignments (0.01 on Amazon)"""
    history_temperature: PositiveFloat = 0.1
    """τ of the alignments at the start"""
    search_weight: NonNegativeFloat = 0.1
    """α, weight of the mean over searches beside that over recommendations in the loss (0.01 on Amazon)"""


@dataclass(frozen=True)
class Histories:
    """Both kinds of history at their own slots, padded at the end with 0: [B, N, D] and [B, N]."""

    rec: Tensor  # fused
    src: Tensor
    rec_mask: Tensor
    src_mask: Tensor
    s2r: Tensor
    r2r: Tensor
    r2s: Tensor
    s2s: Tensor


class UniSarCore(nn.Module):
    """Users and items by id (0 = unknown, padding), texts and categories by their ids (0 = padding)."""

    def __init__(
        self,
        num_users: int,
        num_items: int,
        num_words: int,
        lengths: tuple[int, ...],
        settings: UniSarSettings,
        num_categories: int = 0,
    ) -> None:
        """lengths: positions of the whole list, of items and of sessions."""
        super().__init__()
        width, dim = settings.id_dim, settings.dim
        self.words = WordMean(num_words, width)
        self.items, self.users = ItemTable(num_items, width), ItemTable(num_users, width)
        self.categories = WordMean(num_categories, width) if num_categories else None
        self.text_map, self.user_map = nn.Linear(width, dim), nn.Linear(width, dim)
        self.item_map = nn.Linear(width + dim + (width if num_categories else 0), dim)
        self.positions, self.rec_positions, self.src_positions = (Positions(n, dim) for n in lengths)
        layer = (dim, settings.num_heads, settings.ffn_dim, settings.dropout)

        def layers(cross: bool = False) -> nn.ModuleList:
            return nn.ModuleList(torch_layer(*layer, cross=cross) for _ in range(settings.num_layers))

        self.across, self.within_rec, self.within_src = layers(), layers(), layers()
        self.rec_fusion, self.src_fusion = layers(cross=True), layers(cross=True)
        self.rec_pooling, self.src_pooling = TargetAttention(dim), TargetAttention(dim)
        self.mixture = TaskMixture(
            5 * dim,
            settings.num_experts,
            settings.expert_dim,
            settings.tower_dims,
            settings.head_dims,
            settings.dropout,
        )
        self.no_query = nn.Embedding(1, dim)  # stands for the query of a recommendation
        self.query_item = QueryItemContrast(dim, settings.query_item_temperature)
        self.rec_alignment = ViewContrast(dim, settings.history_temperature)
        self.src_alignment = ViewContrast(dim, settings.history_temperature)
        self._start()

    def _start(self) -> None:
        """Xavier normal for linear maps, tables and positions."""
        self.apply(init_xavier)
        positions = (self.positions, self.rec_positions, self.src_positions)
        for table in (self.items, self.users, self.no_query, *positions):
            nn.init.xavier_normal_(table.weight)
        for bags in (self.words, self.categories):
            if bags is not None:
                nn.init.xavier_normal_(bags.words.weight)
                with torch.no_grad():
                    bags.words.weight[0].zero_()
        self.items.zero_padding()
        self.users.zero_padding()

    # ---- vectors -------------------------------------------------------------------------------------------

    def text_vectors(self, words: Tensor) -> Tensor:
        """Words […, W] → […, D]."""
        vectors: Tensor = self.text_map(self.words(words)).tanh()
        return vectors

    def item_vectors(self, ids: Tensor, words: Tensor, categories: Tensor) -> Tensor:
        """ids […], words […, W], categories […, levels] → […, D]; 0 for padding."""
        parts = [self.items(ids), self.text_vectors(words)]
        if self.categories is not None:
            parts.append(self.categories(categories))
        vectors: Tensor = self.item_map(torch.cat(parts, -1)).tanh()
        return vectors * (ids != 0)[..., None]

    def user_vectors(self, ids_B: Tensor) -> Tensor:
        vectors: Tensor = self.user_map(self.users(ids_B)).tanh()
        return vectors * (ids_B != 0)[:, None]

    def query_vectors(self, words_BW: Tensor, search_B: Tensor) -> Tensor:
        """Of a recommendation, a learned vector stands for the query."""
        none = self.no_query(torch.zeros_like(search_B, dtype=torch.int64))
        return torch.where(search_B[:, None], self.text_vectors(words_BW), none)

    # ---- history -------------------------------------------------------------------------------------------

    def encode(self, slots_BND: Tensor, search_BN: Tensor, mask_BN: Tensor) -> Histories:
        """One list of items and sessions (search = True), padded at the end."""
        rec_BN, src_BN = mask_BN & ~search_BN, mask_BN & search_BN
        other_BNN = (search_BN[:, :, None] != search_BN[:, None]) & mask_BN[:, None]
        across = run_layers(self.across, self.positions(slots_BND), other_BNN)
        both_B11 = (rec_BN.any(1) & src_BN.any(1))[:, None, None]
        s2r, r2s = pack(across, rec_BN) * both_B11, pack(across, src_BN) * both_B11
        rec_mask, src_mask = pack(rec_BN, rec_BN), pack(src_BN, src_BN)
        r2r = self._within(self.within_rec, self.rec_positions, pack(slots_BND, rec_BN), rec_mask)
        s2s = self._within(self.within_src, self.src_positions, pack(slots_BND, src_BN), src_mask)
        rec = run_layers(self.rec_fusion, r2r, rec_mask[:, None], s2r, rec_mask[:, None] & both_B11)
        src = run_layers(self.src_fusion, s2s, src_mask[:, None], r2s, src_mask[:, None] & both_B11)
        return Histories(rec, src, rec_mask, src_mask, s2r, r2r, r2s, s2s)

    def _within(self, layers: nn.ModuleList, positions: Positions, x_BND: Tensor, mask_BN: Tensor) -> Tensor:
        return run_layers(layers, positions(x_BND), mask_BN[:, None]) * mask_BN[..., None]

    # ---- score and loss ------------------------------------------------------------------------------------

    def interests(self, histories: Histories, items_BCD: Tensor) -> tuple[Tensor, Tensor]:
        """What of each kind of history matters to each candidate, [B, C, D] twice."""
        rec = self.rec_pooling(histories.rec, histories.rec_mask, items_BCD)
        return rec, self.src_pooling(histories.src, histories.src_mask, items_BCD)

    def forward(
        self, histories: Histories, items_BCD: Tensor, user_BD: Tensor, query_BD: Tensor, search_B: Tensor
    ) -> Tensor:
        """→ log-odds of a click [B, C], float32."""
        scores_BC: Tensor = self.mixture(self.features(histories, items_BCD, user_BD, query_BD), search_B)
        return scores_BC

    def features(self, histories: Histories, items_BCD: Tensor, user_BD: Tensor, query_BD: Tensor) -> Tensor:
        """What the mixture reads, [B, C, 5 D]: both interests, the item, the user, the query."""
        event = [part[:, None].expand_as(items_BCD) for part in (user_BD, query_BD)]
        return torch.cat([*self.interests(histories, items_BCD), items_BCD, *event], -1)

    def alignment(self, histories: Histories, ranks: Ranks = ONE_PROCESS) -> Tensor:
        """Both alignments, [B]; 0 for a row without one of the two kinds. Rows of all ranks are told
        apart."""
        h = histories
        valid_B = h.rec_mask.any(1) & h.src_mask.any(1)
        rec = self.rec_alignment(
            masked_mean(h.s2r, h.rec_mask), masked_mean(h.r2r, h.rec_mask), valid_B, ranks
        )
        return rec + self.src_alignment(
            masked_mean(h.r2s, h.src_mask), masked_mean(h.s2s, h.src_mask), valid_B, ranks
        )


class UniSar(Ranker):
    """Both tasks."""

    Settings = UniSarSettings
    title = "UniSAR"
    needs = frozenset({"item_text", "history_queries"})
    may_read = frozenset({"item_category"})
    in_batch = True  # the alignments
    settings: UniSarSettings

    def __init__(self, settings: UniSarSettings, world: World) -> None:
        super().__init__(settings, world)
        lengths = (world.data.history_max,) * 3
        self.core = UniSarCore(
            world.num_users, world.num_items, world.num_terms, lengths, settings, world.num_categories
        )

    def score(self, batch: Batch) -> Tensor:
        histories, *_ = self._histories(batch)
        return self._scores(batch, self._items(batch.candidates), histories)

    def score_catalogue(self, batch: Batch) -> Tensor:
        histories, *_ = self._histories(batch)

        def scores(rows: Tensor) -> Tensor:
            return self._scores(batch, self._items(rows).expand(batch.num_events, -1, -1), histories)

        return self.by_slices(scores)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Means over events, those of a search weighted with α r, and with data.weight_* as in all models."""
        histories, queries_BND, items_BND, pairs_BN = self._histories(batch)
        scores_BC = self._scores(batch, self._items(batch.candidates), histories)
        settings, data = self.settings, self.world.data
        search_B = batch.task == SRC
        weights_B = torch.where(search_B, data.weight_src * self._search_weight, data.weight_rec).float()
        click_B = F.binary_cross_entropy_with_logits(scores_BC, batch.labels, reduction="none").mean(1)
        ranks = self.world.ranks
        history_B = self.core.alignment(histories, ranks)
        aligned_B = histories.rec_mask.any(1) & histories.src_mask.any(1)
        pair_BN = self._query_item_losses(queries_BND, items_BND, pairs_BN)
        terms = {
            "click_loss": (click_B * weights_B).mean(),
            "history_loss": weighted(history_B, weights_B, aligned_B, ranks),
            "query_item_loss": weighted(pair_BN, weights_B[:, None], pairs_BN, ranks),
        }
        loss = terms["click_loss"] + settings.history_weight * terms["history_loss"]
        loss = loss + settings.query_item_weight * terms["query_item_loss"]
        return loss, {name: term.detach() for name, term in terms.items()}

    @cached_property
    def _search_weight(self) -> float:
        """α r, of one search: public code has a batch of each task in a step, and so a mean of each. r is
        that of the training events, or of data.search_share; 1 where one of the tasks is not trained."""
        share = self.world.data.search_share
        if not share:
            share = float((self.world.clicks().task == SRC).float().mean())
        return self.settings.search_weight * ((1 - share) / share if 0 < share < 1 else 1.0)

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        """history: the interests in both histories. input: what the mixture of experts reads. hidden: the
        output of the event's tower, which its head reads."""
        batch = clicked_only(batch)
        histories, *_ = self._histories(batch)
        search_B, items_BCD = batch.task == SRC, self._items(batch.candidates)
        query_BD = self.core.query_vectors(query_terms_of(self.tables, batch.query), search_B)
        features_BCD = self.core.features(
            histories, items_BCD, self.core.user_vectors(batch.user + 1), query_BD
        )
        rec_BCD, src_BCD = self.core.mixture.hidden(features_BCD)
        hidden_BCD = torch.where(search_B[:, None, None], src_BCD, rec_BCD)
        width = 2 * items_BCD.shape[-1]
        return {
            "history": features_BCD[:, 0, :width],
            "input": features_BCD[:, 0],
            "hidden": hidden_BCD[:, 0],
        }

    # ---- batch → core --------------------------------------------------------------------------------------

    def _histories(self, batch: Batch) -> tuple[Histories, Tensor, Tensor, Tensor]:
        """→ encoded histories; the query and the item of every slot [B, N, D], and which slots are such
        pairs."""
        items_BN, mask_BN = batch.history_items, batch.history_mask
        src_BN = batch.searched
        known_BN = src_BN & (batch.history_queries >= 0)
        items_BND = self._items(items_BN) * mask_BN[..., None]
        words_BNW = query_terms_of(self.tables, batch.history_queries)
        queries_BND = self.core.text_vectors(words_BNW) * known_BN[..., None]
        first_BN, same_BNN = sessions(src_BN, batch.history_queries)
        sessions_BND = queries_BND + session_means(items_BND, same_BNN)
        slots_BND = torch.where(src_BN[..., None], sessions_BND, items_BND)
        kept_BN = mask_BN & (~src_BN | first_BN)
        histories = self.core.encode(pack(slots_BND, kept_BN), pack(src_BN, kept_BN), pack(kept_BN, kept_BN))
        return histories, queries_BND, items_BND, known_BN

    def _scores(self, batch: Batch, items_BCD: Tensor, histories: Histories) -> Tensor:
        search_B = batch.task == SRC
        query_BD = self.core.query_vectors(query_terms_of(self.tables, batch.query), search_B)
        user_BD = self.core.user_vectors(batch.user + 1)
        scores_BC: Tensor = self.core(histories, items_BCD, user_BD, query_BD, search_B)
        return scores_BC

    def _query_item_losses(self, queries_BND: Tensor, items_BND: Tensor, pairs_BN: Tensor) -> Tensor:
        """[B, N]; 0 for slots that are no pair."""
        draws, device = (self.settings.num_contrast,), items_BND.device
        other_items = self._items(torch.randint(self.world.num_items, draws, device=device))
        other_rows = torch.randint(max(self.world.num_queries, 1), draws, device=device)
        words = query_terms_of(self.tables, other_rows)
        others = self.core.text_vectors(words), other_items
        return self.core.query_item.of_slots(queries_BND, items_BND, pairs_BN, *others)

    def _items(self, rows: Tensor) -> Tensor:
        """Vectors of rows of the item tables."""
        words = rows_of(self.tables.item_terms, rows)
        return self.core.item_vectors(rows + 1, words, rows_of(self.tables.item_category, rows))


def weighted(values: Tensor, weights: Tensor, counted: Tensor, ranks: Ranks) -> Tensor:
    """Σ w·v over the counted / their number; 0 where there is none. Of several ranks, the number that each
    has on average: the mean of their losses is then that over all counted."""
    numbers_R, _ = ranks.gathered(counted.sum()[None].float())
    return (values * weights * counted).sum() / (numbers_R.sum().clamp(min=1) / ranks.size)


MODEL = UniSar
