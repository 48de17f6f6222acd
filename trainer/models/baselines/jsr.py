"""JSR, joint search and recommendation by Zamani & Croft, in two forms.

variant=2018 ("Joint Modeling and Optimization of Search and Recommendation", DESIRES 2018):

    s_src = ψ_s(φ_Q(q) ⊙ φ_I(i));  s_rec = ψ_r(φ_U(u) ⊙ φ_I(i));  L = L_src + L_rec, BCE

    φ_Q, φ_I  mean of word vectors, weighted by softmax over the text of one learned number a word
    φ_U       a table;  ψ  two feed-forward networks

[?] No public code. Ours: queries and items share words and weights; ψ has the other form's sizes.
items=table is for folders whose items have no words.

variant=2020 ("Learning a Joint Search and Recommendation Model from User-Item Interactions", WSDM 2020, in
the form of a public re-implementation):

    s_rec = MLP(u ⊙ e);  s_src = mean over the query's words of log(λ p(w|i) + (1 − λ) p(w|C) + 1e-7)
    p(w|i) = softmax_w(w · P e), p(w|C) its mean over items;  users do not matter in search
    L = L_rec + α L_words
    L_rec = (BCE of the clicked + mean BCE of the negatives) / 2, of all events, searches too
    L_words = −mean over words of log p(w|i), of searches

Departs from that code: word vectors are learned (there frozen fastText, which anonymised words have not), and
L_words is summed over searches and divided by all events, so that micro-batches add up; there it is an n × n
matrix by mistake (published_word_loss=true brings it back).
Shapes: users [B], query words [B, Q], items [B, C], words of items [B, C, T]; 0 = padding, unknown.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import SRC
from trainer.batch import Batch, query_terms_of, rows_of
from trainer.config import Fraction, ModelSettings, NonNegative, NonNegativeFloat, Positive, Share
from trainer.models.contract import Ranker, World
from trainer.models.layers.attention import masked_softmax
from trainer.models.layers.embedding import ItemTable
from trainer.models.layers.hadamard import HadamardScorer
from trainer.models.layers.history import clicked_ids
from trainer.models.layers.language_model import ItemLanguageModel
from trainer.models.layers.nce import balanced
from trainer.models.losses import answer_loss, weighted_mean

STD = 0.1  # of all tables


@s.settings
class JsrSettings(ModelSettings):
    name: Literal["jsr"] = "jsr"
    """joint search and recommendation, two products of vectors"""
    variant: Literal[2018, 2020] = 2018
    """2018: the one that GenSR's paper cites; 2020: search by query likelihood"""
    dim: Positive = 64
    """width of user, item and (2018) word vectors"""
    num_layers: NonNegative = 2
    """linear maps of a feed-forward network, 0 = inner product"""
    dropout: Fraction = 0.0
    """dropout between them"""
    items: Literal["words", "table"] = "words"
    """what an item is in variant 2018: the mean of its words, or a vector of its own"""
    word_dim: Positive = 300
    """width of word vectors in variant 2020"""
    word_weight: NonNegativeFloat = 0.1
    """α of variant 2020"""
    background: Share = 0.0
    """1 − λ of variant 2020: the catalogue's share in an item's language model"""
    published_word_loss: bool = False
    """the words' loss of variant 2020 as published, a mean over all pairs of a sum and a query's length"""


class WeightedWords(nn.Module):
    """φ of a text: the mean of its word vectors with learned weights; 0 without words."""

    def __init__(self, num_terms: int, dim: int) -> None:
        super().__init__()
        self.vectors = ItemTable(num_terms, dim, std=STD)
        self.importance = ItemTable(num_terms, 1, std=0.0)

    def forward(self, words: Tensor) -> Tensor:
        """words […, T] → […, D]"""
        vectors: Tensor = self.vectors(words)
        weights = masked_softmax(self.importance(words)[..., 0], words != 0).to(vectors.dtype)
        return (weights[..., None] * vectors).sum(-2)


class Core2018(nn.Module):
    """Two products of vectors."""

    def __init__(self, world: World, settings: JsrSettings) -> None:
        super().__init__()
        dim = settings.dim
        self.words = WeightedWords(world.num_terms, dim)
        self.items = ItemTable(world.num_items, dim, std=STD) if settings.items == "table" else None
        self.users = ItemTable(world.num_users, dim, std=STD)
        self.search = HadamardScorer(dim, settings.num_layers, settings.dropout)
        self.recommendation = HadamardScorer(dim, settings.num_layers, settings.dropout)

    def forward(
        self, users_B: Tensor, words_BQ: Tensor, items_BC: Tensor, terms_BCT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores of both tasks, [B, C] each; the items' first dimension may be 1."""
        item_BCD = self.words(terms_BCT) if self.items is None else self.items(items_BC)
        rec_BC = self.recommendation(self.users(users_B)[:, None], item_BCD)
        return rec_BC, self.search(self.words(words_BQ)[:, None], item_BCD)


class Core2020(nn.Module):
    """Recommendation by interaction, search by query likelihood."""

    def __init__(self, world: World, settings: JsrSettings) -> None:
        super().__init__()
        dim = settings.dim
        self.users = ItemTable(world.num_users, dim, std=STD)
        self.items = ItemTable(world.num_items, dim, std=STD)
        self.scorer = HadamardScorer(dim, settings.num_layers, settings.dropout)
        sizes = (world.num_terms, settings.word_dim, dim)
        self.language_model = ItemLanguageModel(*sizes, std=STD, background=settings.background)

    def forward(
        self, users_B: Tensor, words_BQ: Tensor, items_BC: Tensor, terms_BCT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As Core2018's."""
        likelihood_BC = self.language_model.query_likelihood(words_BQ, self.items(items_BC), self.items)
        return self.interactions(users_B, items_BC), likelihood_BC

    def interactions(self, users_B: Tensor, items_BC: Tensor) -> Tensor:
        """s_rec [B, C]"""
        scores_BC: Tensor = self.scorer(self.users(users_B)[:, None], self.items(items_BC))
        return scores_BC

    def word_losses(self, words_BQ: Tensor, items_B: Tensor, published: bool = False) -> Tensor:
        """−mean over words of log p(w|i), [B]; published: the mean of all sums times that of all 1 / lengths,
        over rows that have words."""
        sums_B, sizes_B = self.language_model.negative_log_likelihood(words_BQ, self.items(items_B))
        if not published:
            return sums_B / sizes_B.clamp(min=1)
        searches_B = sizes_B > 0
        inverse_B = searches_B / sizes_B.clamp(min=1)
        mean = sums_B.sum() * inverse_B.sum() / searches_B.sum().clamp(min=1) ** 2
        return mean.expand(len(sums_B))


def interaction_losses(scores_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """(BCE of the clicked + mean BCE of the negatives) / 2, [B]."""
    losses_BC = F.binary_cross_entropy_with_logits(scores_BC, labels_BC, reduction="none")
    return balanced(losses_BC, labels_BC) / 2


class Jsr(Ranker):
    """Both tasks. Recommendation needs the user's row."""

    Settings = JsrSettings
    title = "JSR"
    needs = frozenset({"item_text", "users"})
    settings: JsrSettings

    def __init__(self, settings: JsrSettings, world: World) -> None:
        super().__init__(settings, world)
        self.core: Core2018 | Core2020
        self.core = Core2018(world, settings) if settings.variant == 2018 else Core2020(world, settings)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        weights_B = self.event_weights(batch)
        if isinstance(self.core, Core2018):
            return answer_loss(self.score(batch), batch.labels, weights_B), {}
        scores_BC = self.core.interactions(batch.user + 1, batch.candidates + 1)
        rec = weighted_mean(interaction_losses(scores_BC, batch.labels), weights_B)
        published = self.settings.published_word_loss
        words_B = self.core.word_losses(
            query_terms_of(self.tables, batch.query), clicked_ids(batch), published
        )
        words = weighted_mean(words_B, weights_B if published else weights_B * (batch.task == SRC))
        return rec + self.settings.word_weight * words, {
            "rec_loss": rec.detach(),
            "word_loss": words.detach(),
        }

    def score(self, batch: Batch) -> Tensor:
        return self._scores(batch, batch.candidates)

    def score_catalogue(self, batch: Batch) -> Tensor:
        """Items are encoded once for all events."""
        return self.by_slices(lambda rows: self._scores(batch, rows[None]))

    def _scores(self, batch: Batch, items_BC: Tensor) -> Tensor:
        self.check_history(batch)
        terms_BCT = rows_of(self.tables.item_terms, items_BC)
        words_BQ = query_terms_of(self.tables, batch.query)
        rec_BC, src_BC = self.core(batch.user + 1, words_BQ, items_BC + 1, terms_BCT)
        return torch.where((batch.task == SRC)[:, None], src_BC, rec_BC)


MODEL = Jsr
