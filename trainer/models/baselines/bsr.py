"""BSR: generative retrieval with one token an item for search and recommendation (Penha et al., "Bridging
Search and Recommendation in Generative Retrieval", RecSys 2024).

    recommendation   task sentence, tokens of the history's items  → token of the clicked item
    search           task sentence, words of the query             → token of the clicked item
    s = h · E[i] = log P(i | prompt) up to a constant,   loss = −log P(clicked item)

Both logs train one model. h is what the language model knows at the first decoder step (of a decoder-only
backbone, behind the prompt's last token). An id is one token, so the trie of ids has one level: every item is
a leaf below the root, the scores of all leaves are one product, and beam search with any number of beams
gives the first of the same order. There is no illegal id, nothing to prune, and no setting for beams.

Differs from the paper: items are predicted against items, not against the words of the vocabulary, too, which
no trie allows; E is one table for reading and for predicting; prompts are our wording (the paper's are not
published [?]). Search ignores the history, which the paper itself criticises.

The softmax over all items does not fit above SAMPLED_ABOVE of them: there (softmax=auto) num_samples are
drawn log-uniformly over items by falling clicks, P(rank r) = log((r + 2) / (r + 1)) / log(I + 1). Each drawn
logit is corrected by the logarithm of how often its item is expected among the draws, the clicked item's is
not and its draws do not count: the sum under the logarithm is then that of all items on average (importance
sampling, Bengio & Senécal, IEEE Trans. Neural Networks 2008). The log then shows sampled_items. A cold item's
vector is its random start. Shapes: B events, D width, S positions.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import REC, SRC
from trainer.batch import Batch, query_terms_of
from trainer.config import Positive
from trainer.models.backbones.backbone import Prompt, packed
from trainer.models.backbones.language import language_model
from trainer.models.backbones.ranker import LanguageRanker
from trainer.models.backbones.settings import BackboneSettings
from trainer.models.contract import World
from trainer.models.layers.embedding import ItemTable, inner_products
from trainer.models.layers.history import HistoryKind, history_ids
from trainer.models.losses import weighted_mean

SAMPLED_ABOVE = 500_000  # items; the logits of 32 events take 64 MB there, forward
TASK_SENTENCES = {
    REC: "Recommend the next item for a user who clicked these items:",
    SRC: "Find the item that answers this query:",
}
ASK = "Item:"  # an encoder reads it first, a decoder last


@s.settings
class BsrSettings(BackboneSettings):
    name: Literal["bsr"] = "bsr"
    """generative retrieval, one token an item"""
    history: HistoryKind = "all"
    """clicks that a recommendation reads: all, or those of recommendations only, as in the paper"""
    softmax: Literal["auto", "full", "sampled"] = "auto"
    """over all items, or over num_samples drawn ones; auto: all, up to 500,000 items"""
    num_samples: Positive = 8192
    """items drawn for a micro-batch by the sampled softmax"""


class Bsr(LanguageRanker):
    Settings = BsrSettings
    title = "BSR"
    needs = frozenset({"item_text"})  # for the queries' words
    settings: BsrSettings
    by_clicks: Tensor  # [I] items by falling training clicks

    def __init__(self, settings: BsrSettings, world: World) -> None:
        super().__init__(settings, world)
        self.backbone = language_model(settings, world)
        head = self.backbone.base.get_output_embeddings()
        if head.weight is not self.backbone.embedding_weight():
            head.requires_grad_(False)  # words are never predicted
        width = self.backbone.width
        self.items = ItemTable(world.num_items, width, std=width**-0.5)
        if world.num_words:
            self.words = nn.Embedding(world.num_words + 1, width, padding_idx=0)
            nn.init.normal_(self.words.weight, std=width**-0.5)
        self.register_buffer("by_clicks", torch.arange(world.num_items))
        if world.tokenizer is not None:
            tokenizer = world.tokenizer()
            for name, text in {**{f"task_{t}": x for t, x in TASK_SENTENCES.items()}, "ask": ASK}.items():
                self._constant(name, tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def samples(self) -> bool:
        """Whether the loss draws items."""
        auto = self.world.num_items > SAMPLED_ABOVE
        return {"auto": auto, "full": False, "sampled": True}[self.settings.softmax]

    def fit(self) -> None:
        clicks = torch.bincount(self.world.clicks().item, minlength=self.world.num_items)
        self.by_clicks.copy_(clicks.argsort(descending=True, stable=True))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        hidden_BD, target_B = self._hidden(batch), batch.clicked
        weights_B = self.event_weights(batch)
        if not self.samples:
            losses_B = F.cross_entropy(self.items(scores_of=hidden_BD), target_B, reduction="none")
            return weighted_mean(losses_B, weights_B), {}
        losses_B = self._sampled_losses(hidden_BD, target_B)
        drawn = torch.tensor(float(self.settings.num_samples))
        return weighted_mean(losses_B, weights_B), {"sampled_items": drawn}

    def _sampled_losses(self, hidden_BD: Tensor, target_B: Tensor) -> Tensor:
        """−log P of the clicked item among itself and the drawn ones, which the batch shares: [B]"""
        num_items, num_samples = self.world.num_items, self.settings.num_samples
        uniform = torch.rand(num_samples, device=hidden_BD.device, dtype=torch.float64)
        place_K = (((num_items + 1) ** uniform).long() - 1).clamp(0, num_items - 1)  # log-uniform
        drawn_K = self.by_clicks[place_K]
        positive_B1 = inner_products(hidden_BD, self.items(target_B[:, None] + 1))
        with torch.autocast(hidden_BD.device.type, enabled=False):
            others_BK = hidden_BD.float() @ self.items(drawn_K + 1).float().T
        others_BK = others_BK - self._log_draws(place_K)
        others_BK = others_BK.masked_fill(drawn_K == target_B[:, None], -torch.inf)
        return torch.cat([positive_B1, others_BK], 1).logsumexp(1) - positive_B1[:, 0]

    def _log_draws(self, place: Tensor) -> Tensor:
        """Logarithm of how often an item at this place is drawn in num_samples draws, float32."""
        share = torch.log1p(1 / (place.double() + 1)) / math.log(self.world.num_items + 1)
        return (share * self.settings.num_samples).log().float()

    def score(self, batch: Batch) -> Tensor:
        return inner_products(self._hidden(batch), self.items(batch.candidates + 1))

    def score_catalogue(self, batch: Batch) -> Tensor:
        scores_BI: Tensor = self.items(scores_of=self._hidden(batch))
        return scores_BI

    def beams(self, catalogue: bool = False) -> int:
        return 0

    # ---- prompt --------------------------------------------------------------------------------------------

    def _hidden(self, batch: Batch) -> Tensor:
        """What the model knows behind the prompt, [B, D]."""
        vectors_BSD, mask_BS = self._content(batch)
        ask_1D = self.backbone.embed(self.get_buffer("ask"), sparse=False)
        prompt = Prompt(
            ask_1D.to(vectors_BSD.dtype).expand(len(vectors_BSD), 1, -1, -1), vectors_BSD, mask_BS
        )
        nothing = torch.zeros((len(vectors_BSD), 1, 0), dtype=torch.int64, device=vectors_BSD.device)
        hidden_B11D = self.backbone.reader(prompt)(nothing)
        return hidden_B11D[:, 0, 0]

    def _content(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Task sentence and what is given of each event, padding last: [B, S, D], [B, S] bool."""
        search_B1 = (batch.task == SRC)[:, None]
        sentences = [self.get_buffer(f"task_{task}") for task in (REC, SRC)]
        parts = [
            (self.backbone.embed(tokens, sparse=False).expand(len(search_B1), -1, -1), search_B1 == wanted)
            for tokens, wanted in zip(sentences, (False, True), strict=True)
        ]
        ids_BN = history_ids(batch, self.settings.history, self.world.data.history_max)
        parts.append((self.items(ids_BN), (ids_BN != 0) & ~search_B1))
        terms_BQ = query_terms_of(self.tables, batch.query)
        vectors = self.words(terms_BQ) if self.world.num_words else self.backbone.embed(terms_BQ)
        parts.append((vectors, (terms_BQ != 0) & search_B1))
        return packed(parts)

    # ---- called by the trainer, registry and service -------------------------------------------------------

    def saved_names(self) -> set[str]:
        """Each tied tensor once."""
        return {name for name, _ in self.named_parameters()} | {"by_clicks"}


MODEL = Bsr
