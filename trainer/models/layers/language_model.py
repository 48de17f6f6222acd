"""Which words an item stands for: p(w|i) = softmax_w(w · P e), and the likelihood of a query under it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.layers.embedding import ItemTable

EPS = 1e-7  # inside the logarithm of a query's likelihood
SLICE_LOGITS = 2**19  # words × candidates of an event at once, when words are normalised: 2 MiB an event


class ItemLanguageModel(nn.Module):
    """P maps an item's vector (width) to that of words (word_width), without bias."""

    def __init__(self, num_terms: int, word_width: int, width: int, std: float, background: float) -> None:
        """background: the catalogue's share in an item's language model."""
        super().__init__()
        self.background = background
        self.words = ItemTable(num_terms, word_width, std=std)
        self.projection = nn.Linear(width, word_width, bias=False)
        self._of_catalogue: Tensor | None = None  # of the weights as they are

    def train(self, mode: bool = True) -> "ItemLanguageModel":
        self._of_catalogue = None
        return super().train(mode)

    @property
    def _slice(self) -> int:
        return max(SLICE_LOGITS // self.words.num_items, 1)

    def log_probabilities(self, items_ND: Tensor) -> Tensor:
        """log p(w|i) [N, num_terms]: column w − 1 is word w."""
        logits: Tensor = self.words(scores_of=self.projection(items_ND))
        return logits.log_softmax(1)

    def query_likelihood(self, words_BQ: Tensor, items_BCD: Tensor, catalogue: ItemTable) -> Tensor:
        """Mean over the query's words of log((1 − b) p(w|i) + b p(w|C) + EPS), b the background: [B, C], 0
        for a query without words. The items' first dimension may be 1."""
        projected_BCK = self.projection(items_BCD).float()
        with torch.autocast(projected_BCK.device.type, enabled=False):  # as the normaliser's: p stays below 1
            logits_BCQ = projected_BCK @ self.words(words_BQ).float().transpose(1, 2)
        p_BCQ = (logits_BCQ - self._log_normaliser(projected_BCK)[..., None]).exp()
        if self.background:
            of_catalogue_BQ = self.of_catalogue(catalogue)[words_BQ]
            p_BCQ = (1 - self.background) * p_BCQ + self.background * of_catalogue_BQ[:, None]
        real_BQ = words_BQ != 0
        return ((p_BCQ + EPS).log() * real_BQ[:, None]).sum(2) / real_BQ.sum(1).clamp(min=1)[:, None]

    def of_catalogue(self, catalogue: ItemTable) -> Tensor:
        """p(w|C), the mean of p(w|i) over all items [1 + num_terms], by id. Kept until training goes on."""
        if self._of_catalogue is None:
            ids = torch.arange(1, catalogue.num_items + 1, device=catalogue.weight.device)
            total = torch.zeros(self.words.num_items, dtype=torch.float64, device=ids.device)
            with torch.no_grad():
                for part in ids.split(self._slice):
                    total += self.log_probabilities(catalogue(part)).exp().sum(0, dtype=torch.float64)
            self._of_catalogue = F.pad((total / len(ids)).float(), (1, 0))
        return self._of_catalogue

    def negative_log_likelihood(self, words_BQ: Tensor, items_BD: Tensor) -> tuple[Tensor, Tensor]:
        """−Σ_w log p(w|i) over the query's words, and their number, [B] each."""
        real_BQ = words_BQ != 0
        picked_BQ = self.log_probabilities(items_BD).gather(1, (words_BQ - 1).clamp(min=0))
        return -(picked_BQ * real_BQ).sum(1), real_BQ.sum(1)

    def _log_normaliser(self, projected_BCK: Tensor) -> Tensor:
        """log Σ_w exp(w · P e), [B, C]. As many slices whatever B: ranks of ZeRO-3 must call alike."""
        slices = projected_BCK.split(self._slice, 1)
        return torch.cat([self.words(scores_of=part).logsumexp(2) for part in slices], 1)
