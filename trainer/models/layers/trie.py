"""Generative retrieval: ids of items as sequences of tokens, and beam search that can only spell such ids.

An id [L] is its tokens, END (the padding token 0), padding. END makes every id a leaf: none is the beginning
of another. The trie is a table: nodes[l, i] numbers the first l tokens of item i: equal beginnings, and only
they, have equal numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
        nodes.append(torch.unique(pairs, dim=0, return_inverse=True)[1] + nodes[-1].max() + 1)
    return torch.stack(nodes)


@dataclass(frozen=True)
class Children:
    """The tokens that may follow each beginning."""

    tokens: Tensor  # [E], those of a node side by side, nodes in the order of their numbers
    first: Tensor  # [nodes + 1], where those of each node begin

    @classmethod
    def of(cls, ids_IL: Tensor, nodes_XI: Tensor) -> "Children":
        """nodes: trie_nodes() of the ids."""
        size = int(ids_IL.max()) + 1
        levels = zip(nodes_XI[:-1], ids_IL.long().T, strict=True)
        edges_E = torch.cat([(node_I * size + token_I).unique() for node_I, token_I in levels])
        numbers = torch.bincount(edges_E // size)
        return cls(edges_E % size, torch.cat([numbers.new_zeros(1), numbers.cumsum(0)]))

    def log_sums(self, logits: Tensor, nodes: Tensor) -> Tensor:
        """log Σ exp of the logits of a node's children: logits […, V], nodes […] → […]."""
        start_R, end_R = self.first[nodes.flatten()], self.first[nodes.flatten() + 1]
        number_R = end_R - start_R
        row_E = torch.repeat_interleave(number_R)  # of each child of each row
        before_R = number_R.cumsum(0) - number_R
        place_E = torch.arange(len(row_E), device=row_E.device) + (start_R - before_R)[row_E]
        logit_E = logits.flatten(0, -2)[row_E, self.tokens[place_E]]
        least_R = logit_E.new_full(start_R.shape, -torch.inf)
        most_R = least_R.scatter_reduce(0, row_E, logit_E.detach(), "amax")
        sum_R = torch.zeros_like(most_R).index_add(0, row_E, (logit_E - most_R[row_E]).exp())
        return (sum_R.log() + most_R).view(nodes.shape)


def id_lengths(ids: Tensor) -> Tensor:
    """Tokens of each id, END included: […, L] → […]."""
    return ((ids != END).sum(-1) + 1).clamp(max=ids.shape[-1])


def log_probs(logits: Tensor, nodes: Tensor, legal: Children | None) -> Tensor:
    """log P of every token […, V] at nodes […]: among all tokens, or among the `legal` ones alone (that of
    others is then no probability)."""
    return logits.log_softmax(-1) if legal is None else logits - legal.log_sums(logits, nodes)[..., None]


def token_log_probs(logits: Tensor, tokens: Tensor, nodes: Tensor, legal: Children | None = None) -> Tensor:
    """log P of each token of ids, 0 behind END: logits […, L, V], tokens […, L], their nodes […, L + 1] →
    […, L]."""
    chosen = log_probs(logits, nodes[..., :-1], legal).gather(-1, tokens[..., None])[..., 0]
    return chosen * (torch.arange(tokens.shape[-1], device=tokens.device) < id_lengths(tokens)[..., None])


def beam_search(
    next_logits: Callable[[Tensor], Tensor],
    ids_BCL: Tensor,
    nodes_BCX: Tensor,
    num_beams: int,
    legal: Children | None = None,
) -> Tensor:
    """log P of each candidate's id, summed over its tokens, or UNREACHED: [B, C] float32.

    next_logits: beginnings [B, K, l] → logits of the next token [B, K, V], float32. ids_BCL: the candidates'
    ids. nodes_BCX: trie_nodes() of the candidates, X = L + 1. Of the beginnings that are longer by one token
    the best `num_beams` of each event go on, finished ids among them. Always L steps: under ZeRO-3 every rank
    must call the model equally often. A token is taken with its probability among all tokens, or among the
    `legal` ones of a trie that has the candidates.
    """
    num_events, num_candidates, length = ids_BCL.shape
    log_p_BC = torch.zeros((num_events, num_candidates), device=ids_BCL.device)
    alive_BC = torch.ones_like(log_p_BC, dtype=torch.bool)
    done_BC = id_lengths(ids_BCL)
    for step in range(length):
        first_BK, beam_BC, num_kept = _distinct(nodes_BCX[..., step], alive_BC, num_beams)
        begun_BKl = ids_BCL[..., :step].gather(1, first_BK[..., None].expand(-1, -1, step))
        node_BK = nodes_BCX[..., step].gather(1, first_BK)
        log_BKV = log_probs(next_logits(begun_BKl), node_BK, legal)
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
