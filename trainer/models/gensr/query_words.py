"""What searchers mean by a word, counted from their clicks (model.evidence_queries): how much more often than
usual the texts hold a word t that are clicked after a query with a word w.

This is retrieval by translation (Berger & Lafferty, 1999), with counts instead of EM: a search for "plush
animal" finds a "teddy bear" where others who used these words have clicked teddy bears. It knows words, not
queries, so it serves a query that nobody has asked before.

Letters: trainer/README.md; V terms (words, or tokens of natural text), M terms of texts kept for each of
them, Q terms of a query, X = C · T terms of the candidates' texts.
"""

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from data_shards.schema import SRC
from trainer.batch import Batch, ItemTables, first_of_each, query_terms_of, rows_of
from trainer.models.contract import World
from trainer.models.layers.neighbours import keep_nearest, looked_up, still_near, write_refused

PRIOR = 5.0  # clicks of any search that each word of a query begins with
SHRINK = 10.0  # clicks added to the denominator of a similarity: which pairs are kept
CLICKS_AT_ONCE = 65_536  # bounds memory while counting
TERMS_AT_ONCE = 512  # words of queries whose pairs are counted together: frequent ones have many


class QueryWords(nn.Module):
    """Counts over the search clicks of the training split, as buffers."""

    # [V, M] int32, terms of the texts clicked after a query with the row's term, ascending; V = none
    near: Tensor
    near_clicks: Tensor  # [V, M] float32, n(w, t): how many of those clicks
    near_refused: Tensor  # [V] int32, the best term that found no room, V = all did; read in training only
    near_refused_by: Tensor  # [V] float32, its similarity, or −1
    asked: Tensor  # [V] float32, n(w): search clicks whose query holds the term
    held: Tensor  # [V] float32, n(t): search clicks on an item whose text holds it
    searches: Tensor  # [] float32, search clicks

    def __init__(self, num_kept: int, num_terms: int) -> None:
        super().__init__()
        size = num_terms + 1  # 0 is padding
        shape = (size, min(num_kept, size))
        self.register_buffer("near", torch.full(shape, size, dtype=torch.int32))
        self.register_buffer("near_clicks", torch.zeros(shape))
        self.register_buffer("near_refused", torch.full((size,), size, dtype=torch.int32))
        self.register_buffer("near_refused_by", torch.full((size,), -1.0))
        self.register_buffer("asked", torch.zeros(size))
        self.register_buffer("held", torch.zeros(size))
        self.register_buffer("searches", torch.zeros(()))

    def fit(self, world: World) -> None:
        clicks, tables, size = world.clicks(), world.tables, len(self.asked)
        searched = (clicks.task == SRC) & (clicks.query >= 0)
        query, item = clicks.query[searched].to(tables.device), clicks.item[searched].to(tables.device)
        self.searches.fill_(len(query))
        if not len(query):
            return
        # 1 where the query, or the item's text, of a search click holds a term
        asked_WS, held_TS = (
            sparse.hstack(
                [_terms_of(rows_of(terms, some), size) for some in rows.split(CLICKS_AT_ONCE)], "csr"
            )
            for terms, rows in ((tables.query_terms, query), (tables.item_terms, item))
        )
        asked_W, held_T = (np.asarray(terms.sum(1)).ravel() for terms in (asked_WS, held_TS))
        self.asked.copy_(torch.from_numpy(asked_W))
        self.held.copy_(torch.from_numpy(held_T))
        held_ST = held_TS.T.tocsr()
        for start in range(0, size, TERMS_AT_ONCE):
            found = (asked_WS[start : start + TERMS_AT_ONCE] @ held_ST).tocoo()
            row, other = found.row.astype(np.int64) + start, found.col.astype(np.int64)
            similarity = found.data / (np.sqrt(asked_W[row] * held_T[other]) + SHRINK)
            refused = keep_nearest(self.near, self.near_clicks, row, other, found.data, similarity)
            write_refused(self.near_refused, self.near_refused_by, *refused)
            world.report("words of queries", min(start + TERMS_AT_ONCE, size), size)

    def forward(self, batch: Batch, tables: ItemTables, own: bool) -> Tensor:
        """Mean over the words w of the query of the largest log P(t | w) / P(t) of a word t of the
        candidate's text, [B, C] float32; 0 without query, and of a word that nobody has asked for.

        own: the events' own clicks are among the counts, and are taken out: from all candidates, because each
        that shares a word with the clicked one would know of it."""
        if batch.query.device.type != "cpu":  # to ask which events are searches would wait for the device
            return self._meaning(batch, tables, own)
        asked_B = batch.query >= 0
        meaning_BC = torch.zeros(batch.candidates.shape)
        meaning_BC[asked_B] = self._meaning(batch.take(asked_B), tables, own)
        return meaning_BC

    def _meaning(self, batch: Batch, tables: ItemTables, own: bool) -> Tensor:
        word_BQ = _once(query_terms_of(tables, batch.query))
        text_BCT = rows_of(tables.item_terms, batch.candidates)
        text_BX = text_BCT.flatten(1)
        clicks_BQX = looked_up(self.near, self.near_clicks, word_BQ, text_BX)
        asked_BQ1, held_B1X = self.asked[word_BQ][..., None], self.held[text_BX][:, None]
        searches = self.searches
        if own:
            mine_BT = rows_of(tables.item_terms, batch.clicked)
            mine_B1X = ((text_BX[..., None] == mine_BT[:, None]).any(-1) & (text_BX > 0))[:, None]
            searches = searches - 1
            asked_BQ1, held_B1X = (asked_BQ1 - 1).clamp(min=0), held_B1X - mine_B1X.float()
            clicks_BQX = (clicks_BQX - mine_B1X.float()).clamp(min=0)
            similar_BQX = clicks_BQX / ((asked_BQ1 * held_B1X).clamp(min=0).sqrt() + SHRINK)
            refused = (self.near_refused, self.near_refused_by)
            stays_BQX = still_near(*refused, word_BQ, text_BX, similar_BQX) | ~mine_B1X
            clicks_BQX = clicks_BQX * stays_BQX
        usual_B1X = (held_B1X + 1) / (searches + 2)  # P(t)
        lift_BQX = ((clicks_BQX + PRIOR * usual_B1X) / ((asked_BQ1 + PRIOR) * usual_B1X)).log()
        best_BQC = lift_BQX.unflatten(2, text_BCT.shape[1:]).amax(-1)
        word_BQ1 = (word_BQ > 0).float()[..., None]
        return (best_BQC * word_BQ1).sum(1) / word_BQ1.sum(1).clamp(min=1)


def _once(terms: Tensor) -> Tensor:
    """Rows sorted, each real term at its first place and 0 elsewhere."""
    terms = terms.sort(-1).values
    return terms * first_of_each(terms)


def _terms_of(terms_ST: Tensor, size: int) -> sparse.csr_matrix:
    """[size, S], 1 where a row of terms holds one."""
    once_ST = _once(terms_ST)
    row, place = once_ST.nonzero(as_tuple=True)
    term = once_ST[row, place].cpu().numpy()
    ones = np.ones(len(term), np.float32)
    return sparse.csr_matrix((ones, (term, row.cpu().numpy())), shape=(size, len(terms_ST)))
