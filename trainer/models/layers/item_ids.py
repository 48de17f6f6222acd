"""Ids of items as short token sequences (IDGenRec): written by a language model or taken from the text, and
no two alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from data_shards.schema import PAD
from trainer.models.layers.trie import END

Tokens = tuple[int, ...]


def distinct_ids(
    proposals: Iterable[Callable[[list[int]], Iterable[Sequence[Tokens]]]],
    num_items: int,
    number: Callable[[int], Tokens],
    known: Mapping[int, Tokens] | None = None,
) -> list[Tokens]:
    """The first proposal of each item that no item before it has taken.

    proposals: rounds; each gives, for the items still without an id, their wordings from the best on.
    number: tokens of a number, put behind an item's first wording where all rounds fail; no two are alike.
    known: ids that items have already.
    """
    found: dict[int, Tokens] = dict(known or {})
    taken: set[Tokens] = set(found.values())
    first: dict[int, Tokens] = {}
    waiting = [item for item in range(num_items) if item not in found]
    for proposed in proposals:
        if not waiting:
            break
        for item, wordings in zip(waiting, proposed(waiting), strict=True):
            first.setdefault(item, wordings[0] if wordings else ())
            free = next((wording for wording in wordings if wording and wording not in taken), None)
            if free is not None:
                found[item] = free
                taken.add(free)
        waiting = [item for item in waiting if item not in found]
    counted: dict[Tokens, int] = {}
    for item in waiting:
        start = first.get(item, ())
        while True:
            counted[start] = counted.get(start, 0) + 1
            numbered = (*start, *number(counted[start]))
            if numbered not in taken:
                break
        found[item] = numbered
        taken.add(numbered)
    return [found[item] for item in range(num_items)]


def rare_words(texts_IL: Tensor, counts: Tensor, size: int) -> list[Tokens]:
    """Of each text its `size` rarest tokens (all of a shorter one) in the order of the text. texts: 0 =
    padding. counts [V]: how often each token occurs in all texts."""
    ids: list[Tokens] = []
    for row, rarity in zip(texts_IL.tolist(), counts[texts_IL].tolist(), strict=True):
        # of each token its first place
        places = {token: place for place, token in reversed(list(enumerate(row))) if token != PAD}
        rarest = sorted(places.values(), key=lambda place: (rarity[place], place))[:size]
        ids.append(tuple(row[place] for place in sorted(rarest)))
    return ids


def diverse_greedy(
    next_logits: Callable[[Tensor], Tensor],
    size: int,
    groups: int,
    penalty: float,
    length: int,
    stops: Tensor,
) -> Tensor:
    """Diverse beam search (Vijayakumar et al., AAAI 2018) with one beam a group: [size, groups, length]
    tokens, END behind the last.

    next_logits: beginnings [B, G, l] → logits [B, G, V]. Each group takes the best token at
    log P − penalty · (earlier groups that took it at this step). stops: tokens that end a sequence.
    Always `length` steps: under ZeRO-3 every rank must call the model equally often.
    """
    device = stops.device
    begun = torch.zeros((size, groups, 0), dtype=torch.int64, device=device)
    ended = torch.zeros((size, groups), dtype=torch.bool, device=device)
    for _ in range(length):
        log_BGV = next_logits(begun).log_softmax(-1)
        taken_BV = torch.zeros_like(log_BGV[:, 0])
        chosen = []
        for group in range(groups):
            token_B = (log_BGV[:, group] - penalty * taken_BV).argmax(1)
            taken_BV.scatter_add_(1, token_B[:, None], torch.ones_like(taken_BV[:, :1]))
            chosen.append(token_B)
        tokens_BG = torch.stack(chosen, 1)
        ended = ended | torch.isin(tokens_BG, stops)
        begun = torch.cat([begun, tokens_BG.masked_fill(ended, END)[..., None]], 2)
    return begun


def as_matrix(ids: Sequence[Tokens], length: int) -> Tensor:
    """[I, length] int64, END behind each; longer ones are refused by assertion."""
    assert max(map(len, ids), default=0) < length, "an id leaves no room for its end"
    matrix_IL = torch.full((len(ids), length), END)
    lengths_I = torch.tensor([len(tokens) for tokens in ids], dtype=torch.int64)
    tokens = torch.tensor(list(chain.from_iterable(ids)), dtype=torch.int64)
    return matrix_IL.masked_scatter_(torch.arange(length) < lengths_I[:, None], tokens)
