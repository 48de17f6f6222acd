"""Query-SeqRec (He et al., "Query-Aware Sequential Recommendation", CIKM 2022).

    one list of tokens, oldest first: items, and before the items clicked in a search its query
    token = mean of its vectors (a query's words, or the item; one table for both) + position + kind
    blocks of causal attention and feed-forward, each x + f(LN x), and a last LN
    s = h · e, h at the last token; cross-entropy over all items at every step that an item follows

While it learns, an item is replaced with probability `item_replace` and a query with `query_replace`: with
probability `graph_share` by an item clicked for the same query (a query of the item clicked), else by a
random one. Targets stay.

Differs from the published code: its block normalises queries but not keys and values, has no residual around
attention, and adds the feed-forward's input twice (published_block=true brings it back). The loss is the mean
over the steps of an event, then over events. An item that came without a query is replaced at random. Of the
items of a query (queries of an item), the most frequent `graph_neighbours` are drawn from, evenly.
Shapes: ids of tokens [B, T, W] with 0 = padding at the end, h [B, D], scores [B, C].
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import SRC
from trainer.batch import Batch, query_terms_of
from trainer.config import Fraction, ModelSettings, Positive, Share
from trainer.models.contract import World
from trainer.models.layers.attention import Attention, masked_mean
from trainer.models.layers.dropout import Dropout
from trainer.models.layers.embedding import ItemTable, Positions
from trainer.models.layers.history import clicked_ids, newest, sessions, slot_ids
from trainer.models.layers.sequence import causal, last_step, run_layers
from trainer.models.next_item import NextItemRanker

EPS = 1e-8  # of every LayerNorm


@s.settings
class QuerySeqRecSettings(ModelSettings):
    name: Literal["query_seqrec"] = "query_seqrec"
    """queries and clicked items as one list"""
    dim: Positive = 64
    """width of vectors and layers"""
    num_layers: Positive = 2
    """blocks"""
    num_heads: Positive = 2
    """attention heads of a block"""
    dropout: Fraction = 0.6
    """dropout of the input, of attention weights, and of both halves of a block (0 on Unsplash)"""
    length: Positive = 50
    """newest tokens that are read, queries and items"""
    query_words: Positive = 5
    """words of a query that are read"""
    item_replace: Share = 0.25
    """share of items that are replaced in training (.1 on Unsplash)"""
    query_replace: Share = 0.25
    """share of queries that are replaced in training (.1 on Unsplash)"""
    graph_share: Share = 0.2
    """share of the replacements that come from clicks of searches, .3 on Unsplash; the others are random"""
    graph_neighbours: Positive = 10
    """items kept of each query, and queries of each item"""
    published_block: bool = False
    """the block of the published code instead of x + f(LN x)"""


class Block(nn.Module):
    """Causal attention, then two linear maps with relu between, all of one width."""

    def __init__(self, width: int, heads: int, dropout: float, published: bool) -> None:
        super().__init__()
        self.published = published
        self.attention_norm, self.ffn_norm = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.attention = Attention(width, heads, dropout)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        if self.published:
            y = self.ffn_norm(self.attention(normed, x, visible))
            return self._ffn(y) + 2 * y
        x = x + self.dropout(self.attention(normed, normed, visible))
        return x + self._ffn(self.ffn_norm(x))

    def _ffn(self, y: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.outer(self.dropout(self.inner(y).relu())))
        return out


class QuerySeqRecCore(nn.Module):
    """Tokens [B, T, W] → a vector of each step [B, T, D]. Ids: items 1 … num_items, then words."""

    def __init__(self, num_items: int, num_words: int, settings: QuerySeqRecSettings) -> None:
        super().__init__()
        dim = settings.dim
        self.items = ItemTable(num_items, dim, extra=num_words)
        self.positions = Positions(settings.length, dim)
        self.kinds = nn.Embedding(2, dim)  # item, query
        self.dropout = Dropout(settings.dropout)
        block = (dim, settings.num_heads, settings.dropout, settings.published_block)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(settings.num_layers))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.items.zero_padding()

    def forward(self, ids_BTW: Tensor, is_query_BT: Tensor) -> Tensor:
        tokens = masked_mean(self.items(ids_BTW), ids_BTW != 0)
        x = self.dropout(self.positions(tokens) + self.kinds(is_query_BT.long()))
        x = run_layers(self.blocks, x, causal(ids_BTW[..., 0] != 0))
        steps_BTD: Tensor = self.norm(x)
        return steps_BTD


class QuerySeqRec(NextItemRanker):
    """Recommendation, with searches in the history."""

    Settings = QuerySeqRecSettings
    title = "Query-SeqRec"
    needs = frozenset({"history_queries"})
    settings: QuerySeqRecSettings
    items_of_query: Tensor  # [num_queries, K] int32: rows of items + 1; 0 where there are none
    queries_of_item: Tensor  # [num_items, K] int32: rows of queries + 1

    def __init__(self, settings: QuerySeqRecSettings, world: World) -> None:
        super().__init__(settings, world)
        self.core = QuerySeqRecCore(world.num_items, world.num_terms, settings)
        columns = settings.graph_neighbours if settings.graph_share else 0
        for name, rows in (("items_of_query", world.num_queries), ("queries_of_item", world.num_items)):
            self.register_buffer(name, torch.zeros(rows, columns, dtype=torch.int32))

    def fit(self) -> None:
        if not self.settings.graph_share:
            return
        clicks, columns = self.world.clicks(), self.settings.graph_neighbours
        searches = (clicks.task == SRC) & (clicks.query >= 0)
        query, item = clicks.query[searches], clicks.item[searches]
        self.items_of_query.copy_(neighbours(query, item, self.world.num_queries, columns))
        self.queries_of_item.copy_(neighbours(item, query, self.world.num_items, columns))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        items_BN, queries_BN = self._clicks(batch)
        if self.training:
            replaced = self.replaced(items_BN, queries_BN)
            ids_BTW, is_query_BT, next_BT = self.tokens(batch, *replaced, items_BN)
        else:
            ids_BTW, is_query_BT, next_BT = self.tokens(batch, items_BN, queries_BN, items_BN)
        # the step before the clicked item; the first one where nothing was clicked before
        last_B1 = ((ids_BTW[..., 0] != 0).sum(1, keepdim=True) - 1).clamp(min=0)
        next_BT = next_BT.scatter(1, last_B1, clicked_ids(batch)[:, None])
        losses_BT = self.step_losses(self.core(ids_BTW, is_query_BT), next_BT)
        return (losses_BT.sum(1) / (next_BT != 0).sum(1)).mean(), {}

    def step_losses(self, steps_BTD: Tensor, next_BT: Tensor) -> Tensor:
        """Cross-entropy over all items, float32 [B, T]; 0 where no item follows (next = 0)."""
        counted_BT = next_BT != 0
        logits_PI = self.core.items(scores_of=steps_BTD[counted_BT])
        losses_P = F.cross_entropy(logits_PI, next_BT[counted_BT] - 1, reduction="none")
        return torch.zeros(next_BT.shape, device=next_BT.device).masked_scatter(counted_BT, losses_P)

    def hidden(self, batch: Batch) -> Tensor:
        items_BN, queries_BN = self._clicks(batch)
        ids_BTW, is_query_BT, _ = self.tokens(batch, items_BN, queries_BN, items_BN)
        return last_step(self.core(ids_BTW, is_query_BT), (ids_BTW[..., 0] != 0).sum(1))

    # ---- batch → tokens ------------------------------------------------------------------------------------

    def _clicks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids of the clicked items and of the queries they were clicked for, [B, N] each; 0 for none."""
        return slot_ids(batch), (batch.history_queries + 1) * batch.searched

    def replaced(self, items_BN: Tensor, queries_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Some items and some queries are others."""
        settings, world = self.settings, self.world
        like_items = self._neighbour(self.items_of_query, queries_BN, world.num_items)
        like_queries = self._neighbour(self.queries_of_item, items_BN, world.num_queries)
        draws = torch.rand(2, *items_BN.shape, device=items_BN.device)
        item, query = draws[0] < settings.item_replace, draws[1] < settings.query_replace
        items = torch.where(item & (items_BN != 0), like_items, items_BN)
        return items, torch.where(query & (queries_BN != 0), like_queries, queries_BN)

    def _neighbour(self, table_RK: Tensor, ids_BN: Tensor, num_others: int) -> Tensor:
        """Ids [B, N] drawn from the neighbours of others, or from all."""
        chance = torch.randint_like(ids_BN, 1, max(num_others, 1) + 1)
        if table_RK.numel() == 0:
            return chance
        column = torch.randint_like(ids_BN, table_RK.shape[1])
        drawn = table_RK[(ids_BN - 1).clamp(min=0), column].long() * (ids_BN != 0)
        by_graph = torch.rand(ids_BN.shape, device=ids_BN.device) < self.settings.graph_share
        return torch.where(by_graph & (drawn != 0), drawn, chance)

    def tokens(
        self, batch: Batch, items_BN: Tensor, queries_BN: Tensor, targets_BN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The newest tokens: ids [B, T, W], which are queries [B, T], and the item that follows each [B, T],
        0 where a query or nothing follows. A query stands before the first of the clicks made for it."""
        words_BNW = self._words(queries_BN)
        first_BN, _ = sessions(batch.searched, batch.history_queries)
        first_BN = first_BN & (words_BNW[..., 0] != 0)
        alone_BNW = F.pad(items_BN[..., None], (0, words_BNW.shape[2] - 1))
        kept = torch.stack([first_BN, batch.history_mask], 2).flatten(1)
        ids = torch.stack([words_BNW, alone_BNW], 2).flatten(1, 2)
        targets = torch.stack([torch.zeros_like(targets_BN), targets_BN], 2).flatten(1)
        place_BT = newest(
            torch.arange(1, 1 + kept.shape[1], device=ids.device) * kept, kept, self.settings.length
        )
        real_BT, at_BT = place_BT != 0, (place_BT - 1).clamp(min=0)
        if not kept.shape[1]:  # nobody has a history: one column of padding
            return F.pad(ids, (0, 0, 0, 1)), real_BT, place_BT
        ids_BTW = ids.gather(1, at_BT[..., None].expand(-1, -1, ids.shape[2])) * real_BT[..., None]
        targets_BT = targets.gather(1, at_BT) * real_BT
        return ids_BTW, real_BT & (at_BT % 2 == 0), F.pad(targets_BT[:, 1:], (0, 1))

    def _words(self, queries_BN: Tensor) -> Tensor:
        """Ids of words in the table of tokens, [B, N, W] with W ≥ 1; 0 is padding."""
        rows = query_terms_of(self.tables, queries_BN - 1)[..., : self.settings.query_words]
        words = F.pad(rows, (0, 1)) if rows.shape[-1] == 0 else rows
        return (words + self.world.num_items) * (words != 0)


def neighbours(sources: Tensor, targets: Tensor, num_sources: int, columns: int) -> Tensor:
    """Of pairs [n], the most frequent targets of each source, + 1: [num_sources, columns]; fewer are
    repeated, 0 where there are none."""
    pairs, counts = torch.unique(torch.stack([sources, targets]), dim=1, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    order = order[pairs[0, order].argsort(stable=True)]
    degrees = torch.bincount(pairs[0], minlength=num_sources)
    starts = degrees.cumsum(0) - degrees
    within = torch.arange(columns) % degrees.clamp(min=1, max=columns)[:, None]
    ends_with_none = F.pad(pairs[1, order] + 1, (0, 1))
    places = torch.where(degrees[:, None] > 0, starts[:, None] + within, len(ends_with_none) - 1)
    return ends_with_none[places]


MODEL = QuerySeqRec
