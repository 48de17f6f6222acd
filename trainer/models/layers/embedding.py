"""Tables of vectors. Row 0 is padding everywhere; item (user) r of the prepared folder is row r + 1."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ItemTable(nn.Module):
    """Vectors of items [1 + num_items + extra, width]: padding (zero, never trained), the items, then
    `extra` rows such as [MASK]. Both ways to use it go through forward(), where ZeRO-3 gathers the weight.

    Drawn from N(0, std²).
    """

    def __init__(self, num_items: int, width: int, extra: int = 0, std: float = 0.02) -> None:
        super().__init__()
        self.num_items = num_items
        self.weight = nn.Parameter(torch.empty(1 + num_items + extra, width))
        nn.init.normal_(self.weight, std=std)
        self.zero_padding()

    def zero_padding(self) -> None:
        """To be called after another initialisation of the weight."""
        with torch.no_grad():
            self.weight[0].zero_()

    def forward(
        self, ids: Tensor | None = None, scores_of: Tensor | None = None, with_padding: bool = False
    ) -> Tensor:
        """ids […] → vectors […, width]. scores_of [B, width] → inner products with every item [B, num_items],
        float32; with_padding: column 0 is the padding row's, the items follow."""
        if ids is not None:
            return F.embedding(ids, self.weight, padding_idx=0)
        assert scores_of is not None
        items = self.weight[0 if with_padding else 1 : 1 + self.num_items]
        with torch.autocast(items.device.type, enabled=False):
            return scores_of.float() @ items.float().T


class WordMean(nn.Module):
    """Mean of the vectors of a text's real words; 0 for a text without words. Ids: 1 … num_words, 0 is
    padding."""

    def __init__(self, num_words: int, width: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(num_words + 1, width, mode="mean", padding_idx=0)

    def forward(self, words: Tensor) -> Tensor:
        """words […, W] int → […, width]."""
        if words.shape[-1] == 0:
            words = F.pad(words, (0, 1))
        means: Tensor = self.words(words.reshape(-1, words.shape[-1]).long())
        return means.view(*words.shape[:-1], means.shape[-1])


class Positions(nn.Module):
    """Adds a learned vector of each position, counted from the left, to x [B, N, width]. Slots from
    `length` on are left as they are: they can only be padding."""

    def __init__(self, length: int, width: int, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight[: x.shape[1]]
        return x + F.pad(weight, (0, 0, 0, x.shape[1] - len(weight)))


def inner_products(vectors_BD: Tensor, candidates_BCD: Tensor) -> Tensor:
    """[B, C] float32, also under autocast."""
    return (vectors_BD.float()[:, None] * candidates_BCD.float()).sum(-1)
