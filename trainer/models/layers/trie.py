"""Generative retrieval: ids of items as sequences of tokens, and beam search that can only spell such ids.

An id [L] is its tokens, END (the padding token 0), padding. END makes every id a leaf: none is the beginning
of another. The trie is a table: nodes[l, i] numbers the first l tokens of item i, and equal beginnings have
equal numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from data_shards.schema import PAD
from trainer.models.contract import UNREACHED

END = PAD


def trie_nodes(ids_IL: Tensor) -> Tensor:
    """[L + 1, I] int64: numbers of the beginnings of each id, of length 0 … L."""
    nodes = [torch.zeros(len(ids_IL), dtype=torch.int64, device=ids_IL.device)]
    for token_I in ids_IL.long().T:
        pairs = torch.stack([nodes[-1], token_I], 1)
        nodes.append(torch.unique(pairs, dim=0, return_inverse=True)[1])
    return torch.stack(nodes)


def id_lengths(ids: Tensor) -> Tensor:
    """Tokens of each id, END included: […, L] → […]."""
    return ((ids != END).sum(-1) + 1).clamp(max=ids.shape[-1])


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log P of each token of ids, 0 behind END: logits […, L, V], tokens […, L] → […, L]."""
    chosen = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return chosen * (torch.arange(tokens.shape[-1], device=tokens.device) < id_lengths(tokens)[..., None])


def beam_search(
    next_logits: Callable[[Tensor], Tensor], ids_BCL: Tensor, nodes_BCX: Tensor, num_beams: int
) -> Tensor:
    """log P of each candidate's id, summed over its tokens, or UNREACHED: [B, C] float32.

    next_logits: beginnings [B, K, l] → logits of the next token [B, K, V], float32. ids_BCL: the candidates'
    ids. nodes_BCX: trie_nodes() of the candidates, X = L + 1. Of the beginnings that are longer by one token
    the best `num_beams` of each event go on, finished ids among them. Always L steps: under ZeRO-3 every rank
    must call the model equally often. A token is taken with its probability among all tokens, legal or not:
    what no trie allows costs what is left.
    """
    num_events, num_candidates, length = ids_BCL.shape
    log_p_BC = torch.zeros((num_events, num_candidates), device=ids_BCL.device)
    alive_BC = torch.ones_like(log_p_BC, dtype=torch.bool)
    done_BC = id_lengths(ids_BCL)
    for step in range(length):
        first_BK, beam_BC, num_kept = _distinct(nodes_BCX[..., step], alive_BC, num_beams)
        begun_BKl = ids_BCL[..., :step].gather(1, first_BK[..., None].expand(-1, -1, step))
        log_BKV = next_logits(begun_BKl).log_softmax(-1)
        token_BC = ids_BCL[..., step]
        flat_BC = beam_BC.clamp(max=num_kept - 1) * log_BKV.shape[2] + token_BC
        log_p_BC = log_p_BC + log_BKV.flatten(1).gather(1, flat_BC) * (step < done_BC)
        alive_BC = alive_BC & _best(nodes_BCX[..., step + 1], alive_BC, log_p_BC, num_beams)
    return log_p_BC.masked_fill(~alive_BC, UNREACHED)


def _firsts(nodes_BC: Tensor, alive_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row: which candidate is the first of its node [B, C] bool, and the position of that first
    candidate [B, C]; dead candidates have none."""
    keys_BC = nodes_BC.masked_fill(~alive_BC, torch.iinfo(torch.int64).max)
    sorted_BC, order_BC = keys_BC.sort(dim=1, stable=True)
    new_BC = torch.ones_like(alive_BC)
    new_BC[:, 1:] = sorted_BC[:, 1:] != sorted_BC[:, :-1]
    place_BC = torch.arange(keys_BC.shape[1], device=keys_BC.device).expand_as(keys_BC)
    head_BC = torch.where(new_BC, place_BC, 0).cummax(1).values
    of_sorted_BC = order_BC.gather(1, head_BC)
    first_BC = torch.zeros_like(order_BC).scatter(1, order_BC, of_sorted_BC)
    return (first_BC == place_BC) & alive_BC, first_BC


def _distinct(nodes_BC: Tensor, alive_BC: Tensor, num_beams: int) -> tuple[Tensor, Tensor, int]:
    """Distinct living nodes: a candidate that stands for each [B, K], and which of them each candidate has
    [B, C]; K."""
    is_first_BC, first_BC = _firsts(nodes_BC, alive_BC)
    width = min(num_beams, max(int(is_first_BC.sum(1).max()), 1))
    first_BK = is_first_BC.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :width]
    number_BC = is_first_BC.cumsum(1) - 1
    return first_BK, number_BC.gather(1, first_BC).clamp(min=0), width


def _best(nodes_BC: Tensor, alive_BC: Tensor, log_p_BC: Tensor, num_beams: int) -> Tensor:
    """Candidates whose node is among the best `num_beams` living ones of the row."""
    is_first_BC, first_BC = _firsts(nodes_BC, alive_BC)
    if num_beams >= nodes_BC.shape[1]:
        return alive_BC
    firsts_BC = log_p_BC.masked_fill(~is_first_BC, -torch.inf)
    best_BK = firsts_BC.topk(num_beams, dim=1).indices
    kept_BC = torch.zeros_like(alive_BC).scatter(1, best_BK, True) & is_first_BC
    return kept_BC.gather(1, first_BC)
