"""Words of queries and items as product search reads them: one table for both. Ids 1 … num_terms, 0 is
padding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.layers.dropout import Dropout
from trainer.models.layers.embedding import ItemTable, inner_products
from trainer.models.layers.nce import nce


class WordTable(nn.Module):
    """A vector and a bias for each word; padding has none."""

    def __init__(self, num_terms: int, dim: int, std: float) -> None:
        """Vectors from N(0, std²), biases 0."""
        super().__init__()
        self.vectors = ItemTable(num_terms, dim, std=std)
        self.bias = ItemTable(num_terms, 1, std=0.0)

    def forward(self, words: Tensor) -> Tensor:
        """words […] → vectors […, dim]."""
        vectors: Tensor = self.vectors(words)
        return vectors

    def text_loss(self, of_BD: Tensor, words_BW: Tensor, noise_BWK: Tensor) -> Tensor:
        """How badly a vector predicts the words of a text: the mean over the real words w of
        nce(of · w + b_w; of · noise + b_noise), float32 [B]; 0 for a text without words."""
        words_BWX = torch.cat([words_BW[..., None], noise_BWK], 2)
        scores_BX = inner_products(of_BD, self.vectors(words_BWX.flatten(1)))
        scores_BWX = scores_BX.view_as(words_BWX) + self.bias(words_BWX)[..., 0].float()
        losses_BW = nce(scores_BWX[..., 0], scores_BWX[..., 1:])
        real_BW = words_BW != 0
        return (losses_BW * real_BW).sum(1) / real_BW.sum(1).clamp(min=1)


class QueryEncoder(nn.Module):
    """q = tanh(W · mean of the query's words + b); tanh(b) without words. W xavier normal, b 0."""

    def __init__(self, dim: int, dropout: float, count_padding: bool = False) -> None:
        """count_padding: the mean divides by the padded length, as in public code of HEM, AEM and ZAM."""
        super().__init__()
        self.count_padding = count_padding
        self.dropout = Dropout(dropout)
        self.projection = nn.Linear(dim, dim)
        nn.init.xavier_normal_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, vectors_BQD: Tensor, mask_BQ: Tensor) -> Tensor:
        """Vectors of the words, and which are real → [B, D]."""
        length = mask_BQ.shape[1] if self.count_padding else mask_BQ.sum(1, keepdim=True).clamp(min=1)
        mean_BD = (vectors_BQD * mask_BQ[..., None]).sum(1) / length
        query: Tensor = self.projection(self.dropout(mean_BD)).tanh()
        return query


def draw_words(terms_BT: Tensor, num: int) -> Tensor:
    """`num` words of each text, drawn with replacement, [B, num]; 0 for a text without words."""
    terms_BT = F.pad(terms_BT, (0, max(1 - terms_BT.shape[1], 0)))
    length_B1 = (terms_BT != 0).sum(1, keepdim=True)
    draws = torch.rand(len(terms_BT), num, device=terms_BT.device)
    return terms_BT.gather(1, (draws * length_B1).long().minimum((length_B1 - 1).clamp(min=0)))
