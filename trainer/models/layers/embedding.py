"""Tables of vectors. Row 0 is padding everywhere; item (user) r of the prepared folder is row r + 1."""

from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError


class ItemTable(nn.Module):
    """Vectors of items [1 + num_items + extra, width]: padding (zero, never trained), the items, then
    `extra` rows such as [MASK]. Both ways to use it go through forward(), where ZeRO-3 gathers the weight.

    Drawn from N(0, std²).

    After by_rows() the table is no parameter any more: DDP, ZeRO and AdamW do not see it. Then forward()
    keeps what it looks up in `taken`, as pairs (ids, rows), and the backward pass leaves each row's gradient
    in rows.grad, for training/sparse_rows.py.
    """

    rows: Tensor  # the weight, after by_rows()

    def __init__(self, num_items: int, width: int, extra: int = 0, std: float = 0.02) -> None:
        super().__init__()
        self.num_items = num_items
        self.taken: list[tuple[Tensor, Tensor]] | None = None
        self.weight = nn.Parameter(torch.empty(1 + num_items + extra, width))
        nn.init.normal_(self.weight, std=std)
        self.zero_padding()

    def zero_padding(self) -> None:
        """Call it after another initialisation of the weight."""
        with torch.no_grad():
            self.weight[0].zero_()

    def forward(
        self, ids: Tensor | None = None, scores_of: Tensor | None = None, with_padding: bool = False
    ) -> Tensor:
        """ids […] → vectors […, width]. scores_of [B, width] → inner products with every item [B, num_items],
        float32; with_padding: column 0 is the padding row's, the items follow.

        Raises ConfigError for scores_of in training after by_rows()."""
        if ids is not None:
            return F.embedding(ids, self.weight, padding_idx=0) if self.taken is None else self._take(ids)
        assert scores_of is not None
        learning = self.taken is None or torch.is_grad_enabled()
        weight = self.weight if learning else self.rows  # self.weight raises after by_rows()
        items = weight[0 if with_padding else 1 : 1 + self.num_items]
        with torch.autocast(items.device.type, enabled=False):
            return scores_of.float() @ items.float().T

    # ---- without a gradient for the whole table ------------------------------------------------------------

    def by_rows(self) -> None:
        """Turn the parameter into a buffer that state_dict() leaves out."""
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("rows", weight, persistent=False)
        self.taken = []

    def _take(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.rows)
        if torch.is_grad_enabled():
            assert self.taken is not None
            self.taken.append((ids, rows.requires_grad_()))
        return rows

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("taken") is not None:
            raise ConfigError(
                "optim.sparse_rows cannot be used here: the loss reads a whole table of items or users, so "
                "that every row has a gradient. Set optim.sparse_rows=0, or a loss that samples items "
                "(model.loss=bce of sasrec)"
            )
        return super().__getattr__(name)


def tables_by_rows(model: nn.Module) -> dict[str, ItemTable]:
    """Name that the weight had → table, of those that by_rows() was called for."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, ItemTable) and module.taken is not None
    }


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


def table_sizes(model: nn.Module, counts: Container[int]) -> dict[str, int]:
    """Name of a table's weight → how many items (users, words, …) it holds vectors of. Row 0 is padding, they
    follow, and behind them is what else the table holds (`extra`). A plain nn.Embedding or nn.EmbeddingBag is
    such a table where it has one row more than one of the counts."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ItemTable):
            found[f"{name}.weight"] = module.num_items
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.num_embeddings - 1 in counts:
            found[f"{name}.weight"] = module.num_embeddings - 1
    return found


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
