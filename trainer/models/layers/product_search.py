"""What the models of product search share (QEM, HEM, AEM, ZAM, TEM, CoPPS): a table of words, a table of
items, a question M made of the query and the user, the score M · e_i + b_i, and two losses:

    L = L_rank + L_text
    L_rank   BCE summed over the clicked item and the event's negatives, which is nce(M; item)
    L_text   nce(e; word): the clicked item's vector predicts words of its text

Published code makes a row of each word of a review; here a row is a click, and `text_words` words of the
item's text are drawn for it. Item negatives are the event's candidates, uniform by default, as in every other
model; public code of HEM, AEM and ZAM shares 5 among a batch. Noise words are drawn for each word.
Query −1 or without words: q = tanh(b).
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import SRC
from trainer.batch import Batch, query_terms_of, rows_of
from trainer.config import Fraction, ModelSettings, NonNegativeFloat, Positive, PositiveFloat
from trainer.models.contract import Ranker, World
from trainer.models.layers.embedding import ItemTable, inner_products
from trainer.models.layers.history import clicked_ids, newest
from trainer.models.layers.nce import NoiseWords, sampled_bce
from trainer.models.layers.text import QueryEncoder, WordTable, draw_words


@s.settings
class ProductSearchSettings(ModelSettings):
    dim: Positive = 128
    """width of word and item vectors"""
    dropout: Fraction = 0.1
    """dropout of the query's mean word vector and of layers"""
    text_words: Positive = 5
    """words of the clicked item's text that an event is trained on, drawn anew each time; public code has a
    row for each word"""
    noise_words: Positive = 5
    """noise words for each of them"""
    init_std: PositiveFloat = 0.1
    """standard deviation of word and item vectors at the start; 1 in public code of TEM, where inner products
    begin at √dim and the first epochs unlearn them; next to 0 in public code of HEM, for SGD"""
    count_query_padding: bool = False
    """the mean of a query's words divides by the padded length, as in public code of HEM, AEM and ZAM"""


@s.settings
class WithHistory(ProductSearchSettings):
    """Of models that read what the user clicked before."""

    history: Literal["all", "src"] = "all"
    """clicks that are read: all, or those of searches only"""
    history_length: Positive = 20
    """newest clicks that are read, at most data.history_max"""


@s.settings
class WithTableNorms(ProductSearchSettings):
    """Of models whose public code adds norms of whole tables to the loss."""

    l2: NonNegativeFloat = 0.0
    """weight of the norms (not squared) of whole tables in the loss, .005 in public code; optim.weight_decay
    does the same work"""


def norm_of(*tensors: Tensor) -> Tensor:
    """Frobenius norm of all of them together; its gradient at 0 is 0."""
    return torch.linalg.vector_norm(torch.cat([tensor.flatten() for tensor in tensors]))


class ProductSearchCore(nn.Module):
    """Tables and the query's encoder. Each model says how it asks."""

    def __init__(
        self, num_items: int, num_terms: int, settings: ProductSearchSettings, item_bias: bool = False
    ) -> None:
        super().__init__()
        dim = settings.dim
        self.words = WordTable(num_terms, dim, settings.init_std)
        self.query = QueryEncoder(dim, settings.dropout, settings.count_query_padding)
        self.items = ItemTable(num_items, dim, std=settings.init_std)
        self.item_bias = ItemTable(num_items, 1, std=0.0) if item_bias else None

    def encode_query(self, words_BQ: Tensor) -> Tensor:
        """q [B, D]"""
        vectors_BQD: Tensor = self.words(words_BQ)
        q_BD: Tensor = self.query(vectors_BQD, words_BQ != 0)
        return q_BD

    def scores(self, question_BD: Tensor, items_BC: Tensor) -> Tensor:
        """M · e + b of items (ids), [B, C] float32."""
        scores_BC = inner_products(question_BD, self.items(items_BC))
        return scores_BC if self.item_bias is None else scores_BC + self.item_bias(items_BC)[..., 0].float()

    def catalogue_scores(self, question_BD: Tensor) -> Tensor:
        """Of every item, [B, num_items] float32."""
        scores_BI: Tensor = self.items(scores_of=question_BD)
        if self.item_bias is None:
            return scores_BI
        one = torch.ones(len(question_BD), 1, device=question_BD.device)
        return scores_BI + self.item_bias(scores_of=one)

    def text_loss(self, items_B: Tensor, words_BW: Tensor, noise_BWK: Tensor) -> Tensor:
        """nce(e; word), [B]."""
        return self.words.text_loss(self.items(items_B), words_BW, noise_BWK)


class ProductSearch(Ranker):
    """Search only. Subclasses build `core` and say what its question is."""

    tasks = (SRC,)
    needs = frozenset({"item_text"})
    settings: Any  # of the subclass
    core: Any
    Core: ClassVar[Any]

    def __init__(self, settings: Any, world: World) -> None:
        super().__init__(settings, world)
        self.core = self.Core(world, settings)
        self.noise = NoiseWords(world.num_terms)

    def question(self, batch: Batch) -> Tensor:
        """M [B, D]"""
        raise NotImplementedError

    def fit(self) -> None:
        self.noise.count(self.tables.item_terms)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scores_BC = self.core.scores(self.question(batch), batch.candidates + 1)
        ranking, text = sampled_bce(scores_BC, batch.labels).mean(), self.text_loss(batch).mean()
        return ranking + text, {"ranking_loss": ranking.detach(), "text_loss": text.detach()}

    def text_loss(self, batch: Batch) -> Tensor:
        """L_text of each event, [B]."""
        items_B = clicked_ids(batch)
        return self.core.text_loss(items_B, *self.drawn_words(items_B))

    def drawn_words(self, items_B: Tensor) -> tuple[Tensor, Tensor]:
        """Words of the items' texts [B, W] and noise [B, W, K]."""
        words_BW = draw_words(rows_of(self.tables.item_terms, items_B - 1), self.settings.text_words)
        return words_BW, self.noise.draw(*words_BW.shape, self.settings.noise_words)

    def score(self, batch: Batch) -> Tensor:
        scores_BC: Tensor = self.core.scores(self.question(batch), batch.candidates + 1)
        return scores_BC

    def score_catalogue(self, batch: Batch) -> Tensor:
        scores_BI: Tensor = self.core.catalogue_scores(self.question(batch))
        return scores_BI

    def query_words(self, query_B: Tensor) -> Tensor:
        """Words of queries [B, Q], padding where there is no query (−1)."""
        return query_terms_of(self.tables, query_B)

    def history(self, batch: Batch) -> Tensor:
        """Ids of the newest clicks, oldest first, padded at the end, [B, N] with N ≥ 1."""
        kept_BN = batch.searched if self.settings.history == "src" else batch.history_mask
        length = min(self.settings.history_length, self.world.data.history_max)
        return newest(batch.history_items + 1, kept_BN, length)


class WithNorms(ProductSearch):
    """L + l2 · Σ ‖table‖. Subclasses' cores have `norms()`."""

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, report = super().loss(batch)
        if not self.settings.l2:
            return loss, report
        norms = torch.stack(self.core.norms()).sum()
        return loss + self.settings.l2 * norms, {**report, "norms": norms.detach()}

    @classmethod
    def refusals(cls, settings: Any, zero_stage: int | None) -> list[str]:
        """Under ZeRO-3 no rank holds a whole table outside the table's own forward."""
        return [f"model.l2={settings.l2}"] if settings.l2 and zero_stage == 3 else []
