"""SESRec (Si, Sun, Zhang, Xu, Zang, Song, Gai, Wen, "When Search Meets Recommendation: Learning Disentangled
Search Representation for Recommendation", SIGIR 2023).

    item = W e + b;  query = W' [e_q; mean(words)] + b'
    R = layer(items + positions);  S = layer(query + mean of the items clicked for it + positions)
    co-attention of R and S weighs the m real slots of each: a ≥ 1/m is similar, a < 1/m dissimilar; a set
    that would be empty is the whole history
    attention by the candidate to all, similar and dissimilar slots of R and of S; with user and item → MLP
    L = BCE + w_q query–item InfoNCE + w_t (triplet_R + triplet_S), a triplet draws Σ a x to the mean of the
    similar slots and away from the mean of the dissimilar ones

The split is not differentiable: the co-attention learns from the triplets alone, as published.

Differs from the published code: one history of data.history_max clicks; a slot of S is a run of clicks for
one query; the source of a query (typed, suggested) is not in the data. Attention to nothing gives 0. An
unknown user, an unknown query and a padding item (the bias b, there) are zero vectors. InfoNCE is the mean
over the pairs of an event, then over events, so that micro-batches add up. There, the co-attention also sums
over padding slots, and the split depends on the padded length (padding_in_co_attention=true brings it back).
Shapes: slots [B, N, D], candidates [B, C, D], scores [B, C] (log-odds).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import REC
from trainer.batch import Batch, query_terms_of
from trainer.config import Fraction, ModelSettings, NonNegativeFloat, Positive, PositiveFloat
from trainer.models.contract import Ranker, World
from trainer.models.layers.attention import TargetAttention, masked_mean, masked_softmax
from trainer.models.layers.contrast import QueryItemContrast
from trainer.models.layers.embedding import ItemTable, Positions, WordMean
from trainer.models.layers.history import pack, session_means, sessions, slot_ids
from trainer.models.layers.mlp import init_xavier, mlp
from trainer.models.layers.sequence import PostNormLayer, run_layers

EPS = 1e-8  # of every LayerNorm


@s.settings
class SesRecSettings(ModelSettings):
    name: Literal["sesrec"] = "sesrec"
    """interests that searches share with recommendations, and those they do not"""
    dim: Positive = 32
    """width of item and query vectors and of the layers (48 on the industrial log)"""
    query_dim: Positive = 16
    """width of the table of queries"""
    word_dim: Positive = 16
    """width of the table of words"""
    user_dim: Positive = 32
    """width of the table of users"""
    num_layers: Positive = 1
    """layers over each history"""
    num_heads: Positive = 4
    """attention heads (2 on the industrial log)"""
    dropout: Fraction = 0.1
    """dropout of layers and of the head"""
    head_dims: tuple[int, ...] = (200, 80)
    """widths of the head before its score"""
    query_item_weight: NonNegativeFloat = 0.1
    """w_q of the query–item InfoNCE"""
    temperature: PositiveFloat = 0.1
    """τ of the query–item InfoNCE at the start"""
    num_contrast: Positive = 1024
    """random items and queries a step that the query–item InfoNCE tells apart"""
    triplet_weight: NonNegativeFloat = 1e-3
    """w_t of the triplets"""
    margin: NonNegativeFloat = 0.1
    """of the triplets, a distance"""
    padding_in_co_attention: bool = False
    """padding slots, up to the longest list, take part in the sums of the co-attention, as published"""


@dataclass(frozen=True)
class Interests:
    """One kind of history, padded at the end with 0, and its slots by what they share with the other kind."""

    slots: Tensor  # [B, N, D]
    mask: Tensor  # [B, N] bool
    weights: Tensor  # a, [B, N] float32
    similar: Tensor  # [B, N] bool
    dissimilar: Tensor

    @classmethod
    def of(cls, slots: Tensor, mask: Tensor, weights: Tensor) -> "Interests":
        shared = weights >= 1 / mask.sum(1, keepdim=True).clamp(min=1)
        return cls(slots, mask, weights, _or_all(mask & shared, mask), _or_all(mask & ~shared, mask))

    def triplet(self, margin: float) -> Tensor:
        """[B]; distances are Euclidean."""
        anchor = (self.weights[..., None] * self.slots.float()).sum(1)
        similar, dissimilar = (masked_mean(self.slots.float(), m) for m in (self.similar, self.dissimilar))
        return F.triplet_margin_loss(anchor, similar, dissimilar, margin=margin, reduction="none")


class CoAttention(nn.Module):
    """A = tanh(R W Sᵀ); weights softmax_j((w_q Rᵀ A)_j) of S and softmax_i((w_d Sᵀ Aᵀ)_i) of R."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        self.rec_query, self.src_query = (nn.Parameter(torch.empty(1, width)) for _ in range(2))
        for parameter in self.parameters():
            nn.init.xavier_normal_(parameter)

    def forward(
        self, rec_BND: Tensor, src_BMD: Tensor, rec_mask: Tensor, src_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Padding slots are 0, or take part. → weights of R [B, N] and of S [B, M], float32."""
        affinity_BNM = (rec_BND @ self.weight @ src_BMD.transpose(1, 2)).tanh()
        of_src_BM = ((rec_BND @ self.rec_query.T).transpose(1, 2) @ affinity_BNM)[:, 0]
        of_rec_BN = (affinity_BNM @ (src_BMD @ self.src_query.T))[..., 0]
        return masked_softmax(of_rec_BN, rec_mask), masked_softmax(of_src_BM, src_mask)


class SesRecCore(nn.Module):
    """Users, items and queries by id (0 = unknown, padding), words by id (0 = padding)."""

    def __init__(
        self,
        num_users: int,
        num_items: int,
        num_queries: int,
        num_words: int,
        lengths: tuple[int, int],
        settings: SesRecSettings,
    ) -> None:
        """lengths: positions of R and S."""
        super().__init__()
        self.lengths, self.padding_counts = lengths, settings.padding_in_co_attention
        dim, dropout = settings.dim, settings.dropout
        self.items, self.users = ItemTable(num_items, dim), ItemTable(num_users, settings.user_dim)
        self.queries = ItemTable(num_queries, settings.query_dim)
        self.words = WordMean(num_words, settings.word_dim)
        self.item_map = nn.Linear(dim, dim)
        self.query_map = nn.Linear(settings.query_dim + settings.word_dim, dim)
        self.rec_positions, self.src_positions = (Positions(length, dim) for length in lengths)

        def layers() -> nn.ModuleList:
            return nn.ModuleList(
                # no dropout of attention weights and inside the feed-forward, as published
                PostNormLayer(dim, settings.num_heads, dim, dropout, 0.0, 0.0, "leaky_relu", EPS)
                for _ in range(settings.num_layers)
            )

        self.rec_layers, self.src_layers = layers(), layers()
        self.co_attention = CoAttention(dim)
        self.rec_pooling, self.src_pooling = TargetAttention(dim), TargetAttention(dim)
        self.head = mlp([7 * dim + settings.user_dim, *settings.head_dims], dropout, score=True)
        self.query_item = QueryItemContrast(dim, settings.temperature)
        self._start()

    def _start(self) -> None:
        """Xavier normal for linear maps, tables and positions."""
        self.apply(init_xavier)
        tables = (self.items, self.users, self.queries)
        for weight in [table.weight for table in (*tables, self.rec_positions, self.src_positions)]:
            nn.init.xavier_normal_(weight)
        nn.init.xavier_normal_(self.words.words.weight)
        for table in tables:
            table.zero_padding()

    def item_vectors(self, ids: Tensor) -> Tensor:
        """ids […] → […, D]; 0 for padding."""
        vectors: Tensor = self.item_map(self.items(ids))
        return vectors * (ids != 0)[..., None]

    def query_vectors(self, ids: Tensor, words: Tensor) -> Tensor:
        """ids […], words […, W] → […, D]; 0 for padding."""
        vectors: Tensor = self.query_map(torch.cat([self.queries(ids), self.words(words)], -1))
        return vectors * (ids != 0)[..., None]

    def encode(
        self, rec_BND: Tensor, rec_mask: Tensor, src_BMD: Tensor, src_mask: Tensor
    ) -> tuple[Interests, Interests]:
        """Items, and queries with the mean of their clicks, both padded at the end."""
        if self.padding_counts:
            query = self.query_map(src_BMD.new_zeros(self.query_map.in_features))
            item = self.item_map(rec_BND.new_zeros(self.item_map.in_features))
            rec_BND, rec_mask = _filled(rec_BND, rec_mask, self.lengths[0], item)
            src_BMD, src_mask = _filled(src_BMD, src_mask, self.lengths[1], query)
        rec = run_layers(self.rec_layers, self.rec_positions(rec_BND), rec_mask[:, None])
        src = run_layers(self.src_layers, self.src_positions(src_BMD), src_mask[:, None])
        real_rec, real_src = rec * rec_mask[..., None], src * src_mask[..., None]
        seen = (rec, src) if self.padding_counts else (real_rec, real_src)
        rec_weights, src_weights = self.co_attention(*seen, rec_mask, src_mask)
        return Interests.of(real_rec, rec_mask, rec_weights), Interests.of(real_src, src_mask, src_weights)

    def forward(self, rec: Interests, src: Interests, items_BCD: Tensor, user_BU: Tensor) -> Tensor:
        """→ log-odds of a click [B, C], float32."""
        parts = [
            pooling(history.slots, mask, items_BCD)
            for pooling, history in ((self.rec_pooling, rec), (self.src_pooling, src))
            for mask in (history.mask, history.similar, history.dissimilar)
        ]
        user_BCU = user_BU[:, None].expand(-1, items_BCD.shape[1], -1)
        scores_BC: Tensor = self.head(torch.cat([*parts, user_BCU, items_BCD], -1))[..., 0]
        return scores_BC.float()


def _or_all(chosen: Tensor, mask: Tensor) -> Tensor:
    return torch.where(chosen.any(1, keepdim=True), chosen, mask)


def _filled(x_BND: Tensor, mask_BN: Tensor, length: int, padding_D: Tensor) -> tuple[Tensor, Tensor]:
    """`length` slots, those of padding with the vector of padding."""
    missing = length - x_BND.shape[1]
    x_BND, mask_BN = F.pad(x_BND, (0, 0, 0, missing)), F.pad(mask_BN, (0, missing))
    return torch.where(mask_BN[..., None], x_BND, padding_D), mask_BN


class SesRec(Ranker):
    """Recommendation, with searches in the history."""

    Settings = SesRecSettings
    title = "SESRec"
    tasks = (REC,)
    needs = frozenset({"history_queries"})
    settings: SesRecSettings

    def __init__(self, settings: SesRecSettings, world: World) -> None:
        super().__init__(settings, world)
        sizes = (world.num_users, world.num_items, world.num_queries, world.num_terms)
        self.core = SesRecCore(*sizes, (world.data.history_max,) * 2, settings)

    def score(self, batch: Batch) -> Tensor:
        rec, src, *_ = self._histories(batch)
        return self._scores(batch, self.core.item_vectors(batch.candidates + 1), rec, src)

    def score_catalogue(self, batch: Batch) -> Tensor:
        rec, src, *_ = self._histories(batch)

        def scores(rows: Tensor) -> Tensor:
            items_BCD = self.core.item_vectors(rows + 1).expand(batch.num_events, -1, -1)
            return self._scores(batch, items_BCD, rec, src)

        return self.by_slices(scores)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rec, src, queries_BND, items_BND, pairs_BN = self._histories(batch)
        items_BCD, settings = self.core.item_vectors(batch.candidates + 1), self.settings
        scores_BC = self._scores(batch, items_BCD, rec, src)
        pair_losses_BN = self._query_item_losses(queries_BND, items_BND, pairs_BN)
        terms = {
            "click_loss": F.binary_cross_entropy_with_logits(scores_BC, batch.labels),
            "query_item_loss": masked_mean(pair_losses_BN[..., None], pairs_BN).mean(),
            "triplet_loss": (rec.triplet(settings.margin) + src.triplet(settings.margin)).mean(),
        }
        loss = terms["click_loss"] + settings.query_item_weight * terms["query_item_loss"]
        loss = loss + settings.triplet_weight * terms["triplet_loss"]
        return loss, {name: term.detach() for name, term in terms.items()}

    # ---- batch → core --------------------------------------------------------------------------------------

    def _histories(self, batch: Batch) -> tuple[Interests, Interests, Tensor, Tensor, Tensor]:
        """→ R, S; the query and the item of every slot [B, N, D], and which slots are such pairs."""
        rec_BN, src_BN = batch.browsed, batch.searched
        known_BN = src_BN & (batch.history_queries >= 0)
        items_BND = self.core.item_vectors(slot_ids(batch))
        queries_BND = self._queries(torch.where(known_BN, batch.history_queries, -1))
        first_BN, same_BNN = sessions(src_BN, batch.history_queries)
        rec, src = self.core.encode(
            pack(items_BND, rec_BN),
            pack(rec_BN, rec_BN),
            pack(queries_BND + session_means(items_BND, same_BNN), first_BN),
            pack(first_BN, first_BN),
        )
        return rec, src, queries_BND, items_BND, known_BN

    def _scores(self, batch: Batch, items_BCD: Tensor, rec: Interests, src: Interests) -> Tensor:
        scores_BC: Tensor = self.core(rec, src, items_BCD, self.core.users(batch.user + 1))
        return scores_BC

    def _query_item_losses(self, queries_BND: Tensor, items_BND: Tensor, pairs_BN: Tensor) -> Tensor:
        """[B, N]; 0 for slots that are no pair."""
        draws, device = (self.settings.num_contrast,), items_BND.device
        other_items = self.core.item_vectors(torch.randint(1, 1 + self.world.num_items, draws, device=device))
        num_queries = self.world.num_queries
        other_rows = torch.randint(min(num_queries, 1), 1 + num_queries, draws, device=device) - 1
        others = self._queries(other_rows), other_items
        return self.core.query_item.of_slots(queries_BND, items_BND, pairs_BN, *others)

    def _queries(self, rows: Tensor) -> Tensor:
        """Vectors of rows of the query tables; 0 for row -1."""
        return self.core.query_vectors(rows + 1, query_terms_of(self.tables, rows))


MODEL = SesRec
