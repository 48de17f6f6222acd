"""USER (Yao, Dou, Xie, Lu, Wang, Wen, "USER: A Unified Information Search and Recommendation Model based on
Integrated Behavior Sequence", CIKM 2021).

    text = additive attention over a transformer layer of its words
    an entry of the history: the clicked item's text, and for a search the co-attention of query and text
    q_s = the question after its session [earlier entries, question] passed one layer twice; the question of a
    search is its query's text, that of a recommendation the user's vector
    q_l, d_l = q_s and a candidate's text d, each after the older entries, which passed the layer of sessions
    s = tanh(Linear[cos(q_s, d), cos(q_s, d_l), cos(q_l, d), cos(q_l, d_l)]);  softmax over the candidates

Layers are post-norm, without positions, with heads of `head_dim`. Only the last output of [older entries, d]
is read, so a layer computes just that: d looks at the older entries and at itself.

Differs from the published code: its 122 hand-made features are left out; each candidate meets its own user's
history; W of the co-attention is learned, and padding words have no weight there
(padding_in_co_attention=true gives them one); texts and sessions of padding only are 0, not NaN. The four
weights of s start at .5, its bias at 0; there, their signs are random, and a short training does not turn a
sign that ranks last what is most like the question. [?] Our logs have no sessions: the newest
`session_length` clicks are the current one, and older clicks are cut likewise. An unknown user and an item
without text are zero vectors. Texts are cut at `text_words`.
Shapes: texts […, W] with 0 = padding, sessions [B, S, K, D], candidates [B, C, D], scores [B, C] in (−1, 1).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import SRC
from trainer.batch import Batch, query_terms_of, rows_of
from trainer.config import Fraction, ModelSettings, Positive
from trainer.models.contract import Ranker, World
from trainer.models.layers.attention import AdditivePooling, masked_softmax
from trainer.models.layers.dropout import Dropout
from trainer.models.layers.embedding import ItemTable
from trainer.models.layers.item_memory import ItemMemory
from trainer.models.losses import listwise_loss

MOST_REMEMBERED = 2**28  # floats of encoded words that evaluation keeps: 1 GiB


@s.settings
class UserSettings(ModelSettings):
    name: Literal["user"] = "user"
    """searches and recommendations as one sequence of texts"""
    dim: Positive = 100
    """width of words, users and layers"""
    num_heads: Positive = 8
    """attention heads"""
    head_dim: Positive = 64
    """width of a head"""
    ffn_dim: Positive = 2048
    """inner width of the feed-forward layers"""
    dropout: Fraction = 0.1
    """dropout of attention weights and of both halves of a layer"""
    text_words: Positive = 16
    """words of an item or a query that are read"""
    session_length: Positive = 5
    """clicks of a session"""
    padding_in_co_attention: bool = False
    """padding words take a share of the weights of the co-attention, as published"""


class Layer(nn.Module):
    """LN(x + attention), LN(· + feed-forward); 0 at padding, which takes no time in the linear maps."""

    def __init__(self, settings: UserSettings) -> None:
        super().__init__()
        self.heads, self.head_dim = settings.num_heads, settings.head_dim
        width, inner = settings.dim, self.heads * self.head_dim
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.output = nn.Linear(inner, width)
        self.inner, self.outer = nn.Linear(width, settings.ffn_dim), nn.Linear(settings.ffn_dim, width)
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = Dropout(settings.dropout)
        for projection in (self.query, self.key, self.value):
            nn.init.normal_(projection.weight, std=(2 / (width + settings.head_dim)) ** 0.5)
        nn.init.xavier_normal_(self.output.weight)

    def forward(
        self,
        x_BND: Tensor,
        mask_BN: Tensor,
        memory_BMD: Tensor | None = None,
        memory_mask_BM: Tensor | None = None,
    ) -> Tensor:
        """Every x looks at all real x; with a memory, at the memory and at itself alone."""
        x_RD = x_BND[mask_BN]  # R real positions
        if memory_BMD is None or memory_mask_BM is None:
            attended_BHNd = self._among(x_RD, mask_BN)
        else:
            attended_BHNd = self._to(x_RD, mask_BN, memory_BMD, memory_mask_BM)
        attended_RD = self.dropout(self.output(attended_BHNd.transpose(1, 2)[mask_BN].flatten(1)))
        x_RD = self.attention_norm(x_RD + attended_RD)
        inner_RD = self.dropout(self.outer(self.inner(x_RD).relu()))
        return padded(self.norm(x_RD + inner_RD), mask_BN)

    def _among(self, x_RD: Tensor, mask_BN: Tensor) -> Tensor:
        query, key, value = self._queries_keys_values(x_RD, mask_BN)
        weights = self.dropout(masked_softmax(query @ key.transpose(2, 3), mask_BN[:, None, None]))
        return weights.to(value.dtype) @ value

    def _to(self, x_RD: Tensor, mask_BN: Tensor, memory_BMD: Tensor, memory_mask_BM: Tensor) -> Tensor:
        query, own_key, own_value = self._queries_keys_values(x_RD, mask_BN)
        memory_RD = memory_BMD[memory_mask_BM]
        key, value = (self._heads(part(memory_RD), memory_mask_BM) for part in (self.key, self.value))
        own_BHN1 = (query * own_key).sum(-1, keepdim=True)
        scores_BHNM = torch.cat([own_BHN1, query @ key.transpose(2, 3)], -1)
        visible_BM = F.pad(memory_mask_BM, (1, 0), value=True)
        weights = self.dropout(masked_softmax(scores_BHNM, visible_BM[:, None, None])).to(value.dtype)
        return weights[..., :1] * own_value + weights[..., 1:] @ value

    def _queries_keys_values(self, x_RD: Tensor, mask_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, N, d] each; queries divided by √d."""
        query, key, value = (self._heads(part(x_RD), mask_BN) for part in (self.query, self.key, self.value))
        return query / self.head_dim**0.5, key, value

    def _heads(self, projected_RD: Tensor, mask_BN: Tensor) -> Tensor:
        """Of all heads, flat → [B, H, N, d]; 0 at padding."""
        return padded(projected_RD, mask_BN).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


def padded(x_RD: Tensor, mask_BN: Tensor) -> Tensor:
    """Vectors of the real positions at their places, 0 elsewhere: [B, N, D]."""
    out_BND = x_RD.new_zeros(*mask_BN.shape, x_RD.shape[-1])
    out_BND[mask_BN] = x_RD
    return out_BND


class CoAttention(nn.Module):
    """A query and the text clicked for it → one vector: A = tanh(Q W Dᵀ), each side's words weighted by the
    softmax of their sums in A."""

    def __init__(self, width: int, padding_counts: bool) -> None:
        super().__init__()
        self.padding_counts = padding_counts
        self.weight = nn.Parameter(torch.empty(width, width))
        nn.init.xavier_normal_(self.weight)
        self.map = nn.Linear(2 * width, width)

    def forward(self, query_PQD: Tensor, query_mask: Tensor, text_PWD: Tensor, text_mask: Tensor) -> Tensor:
        """Words, 0 at padding → [P, D]."""
        affinity_PQW = (query_PQD @ self.weight @ text_PWD.transpose(1, 2)).tanh()
        if self.padding_counts:
            query_mask, text_mask = torch.ones_like(query_mask), torch.ones_like(text_mask)
        of_query = masked_softmax(affinity_PQW.sum(2), query_mask).to(query_PQD.dtype)
        of_text = masked_softmax(affinity_PQW.sum(1), text_mask).to(text_PWD.dtype)
        sums = [(of_query[..., None] * query_PQD).sum(1), (of_text[..., None] * text_PWD).sum(1)]
        vectors: Tensor = self.map(torch.cat(sums, -1))
        return vectors


@dataclass(frozen=True)
class Question:
    """What a candidate is compared with."""

    in_session: Tensor  # q_s [B, D]
    in_history: Tensor  # q_l [B, D]
    older: Tensor  # [B, M, D] entries of older sessions
    older_mask: Tensor  # [B, M] bool


class UserCore(nn.Module):
    """Texts, histories and scores. Ids of words and users, 0 = padding, unknown."""

    def __init__(self, num_users: int, num_words: int, settings: UserSettings) -> None:
        super().__init__()
        dim = settings.dim
        self.words = ItemTable(num_words, dim, std=0.1)
        self.users = ItemTable(num_users, dim, std=0.1)
        self.word_layer, self.session_layer, self.history_layer = (Layer(settings) for _ in range(3))
        self.word_pool = AdditivePooling(dim, dim)
        self.co_attention = CoAttention(dim, settings.padding_in_co_attention)
        self.scorer = nn.Linear(4, 1)
        nn.init.constant_(self.scorer.weight, 0.5)
        nn.init.zeros_(self.scorer.bias)

    def encode_words(self, texts: Tensor) -> Tensor:
        """[…, W] → […, W, D]; 0 at padding. Each text is read once, however often it is there."""
        distinct_TW, at = texts.flatten(0, -2).unique(dim=0, return_inverse=True)
        encoded_TWD: Tensor = self.word_layer(self.words(distinct_TW), distinct_TW != 0)
        return encoded_TWD[at].unflatten(0, texts.shape[:-1])

    def text_vectors(self, texts: Tensor) -> Tensor:
        """[…, W] → […, D]"""
        vectors: Tensor = self.word_pool(self.encode_words(texts), texts != 0)
        return vectors

    def entries(self, encoded: Tensor, texts: Tensor, queries: Tensor, searched: Tensor) -> Tensor:
        """Of clicks: the item's text […, W] and its encode_words(), the query [P, Q] of those that were
        searched […] → […, D]."""
        clicks = self.co_attention(
            self.encode_words(queries), queries != 0, encoded[searched], texts[searched] != 0
        )
        entries = self.word_pool(encoded, texts != 0)
        return entries.masked_scatter(searched[..., None], clicks.to(entries.dtype))

    def question(
        self,
        asked_BD: Tensor,
        older_BSKD: Tensor,
        older_mask: Tensor,
        recent_BKD: Tensor,
        recent_mask: Tensor,
    ) -> Question:
        """asked: the text of a query, or a user. Older sessions and the current one's earlier entries."""
        current, mask = torch.cat([recent_BKD, asked_BD[:, None]], 1), F.pad(recent_mask, (0, 1), value=True)
        for _ in range(2):
            current = self.session_layer(current, mask)
        older = self.session_layer(older_BSKD.flatten(0, 1), older_mask.flatten(0, 1))
        older = older.reshape(older_BSKD.shape).flatten(1, 2)
        last, one = current[:, -1:], mask[:, -1:]
        in_history = self.history_layer(last, one, older, older_mask.flatten(1))
        return Question(last[:, 0], in_history[:, 0], older, older_mask.flatten(1))

    def cosines(self, question: Question, items_BCD: Tensor) -> Tensor:
        """[B, C, 4]: q_s and q_l, each with d and d_l."""
        real_BC = torch.ones_like(items_BCD[..., 0], dtype=torch.bool)
        in_history = self.history_layer(items_BCD, real_BC, question.older, question.older_mask)
        pairs = [
            F.cosine_similarity(asked[:, None].float(), items.float(), dim=2)
            for asked in (question.in_session, question.in_history)
            for items in (items_BCD, in_history)
        ]
        return torch.stack(pairs, 2)

    def forward(self, question: Question, items_BCD: Tensor) -> Tensor:
        """→ scores [B, C] float32."""
        scores_BC: Tensor = self.scorer(self.cosines(question, items_BCD))[..., 0].float().tanh()
        return scores_BC


class User(Ranker):
    """Both tasks."""

    Settings = UserSettings
    title = "USER"
    needs = frozenset({"item_text", "history_queries"})
    settings: UserSettings

    def __init__(self, settings: UserSettings, world: World) -> None:
        super().__init__(settings, world)
        self.core = UserCore(world.num_users, world.num_terms, settings)
        self._vectors: ItemMemory | None = None
        self._encoded: ItemMemory | None = None

    def score(self, batch: Batch) -> Tensor:
        question = self._question(batch)
        scores_BC: Tensor = self.core(question, self._item_vectors(batch.candidates))
        return scores_BC

    def score_catalogue(self, batch: Batch) -> Tensor:
        question = self._question(batch)

        def scores(rows: Tensor) -> Tensor:
            items_BCD = self._item_vectors(rows).expand(batch.num_events, -1, -1)
            scores_BC: Tensor = self.core(question, items_BCD)
            return scores_BC

        return self.by_slices(scores)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return listwise_loss(self.score(batch), batch.labels, self.event_weights(batch)), {}

    def ready_to_serve(self) -> None:
        """Most of a score is the layer over the words of texts. Those of the candidates are kept as vectors;
        those of the history, where a catalogue is small enough, word by word."""
        num_items = self.world.num_items
        self._vectors = ItemMemory(num_items)
        if num_items * self.settings.text_words * self.settings.dim <= MOST_REMEMBERED:
            self._encoded = ItemMemory(num_items)

    # ---- batch → core --------------------------------------------------------------------------------------

    def _question(self, batch: Batch) -> Question:
        searched_BN = batch.searched & (batch.history_queries >= 0)
        texts_BNW = self._items(batch.history_items) * batch.history_mask[..., None]
        encoded_BNWD = self._item_words(batch.history_items)
        queries_PQ = self._queries(batch.history_queries[searched_BN])
        entries_BND = self.core.entries(encoded_BNWD, texts_BNW, queries_PQ, searched_BN)
        sessions = cut(entries_BND, batch.history_mask, self.settings.session_length)
        search_B1 = (batch.task == SRC)[:, None]
        query_BD = self.core.text_vectors(self._queries(batch.query))
        asked_BD = torch.where(search_B1, query_BD, self.core.users(batch.user + 1))
        return self.core.question(asked_BD, *sessions)

    def _item_vectors(self, rows: Tensor) -> Tensor:
        """Texts of items […] → […, D]."""

        def compute(rows: Tensor) -> Tensor:
            vectors: Tensor = self.core.word_pool(self._item_words(rows), self._items(rows) != 0)
            return vectors

        return self._vectors(rows, compute) if self._vectors else compute(rows)

    def _item_words(self, rows: Tensor) -> Tensor:
        """Encoded words of the texts of items […] → […, W, D]."""

        def compute(rows: Tensor) -> Tensor:
            return self.core.encode_words(self._items(rows))

        return self._encoded(rows, compute) if self._encoded else compute(rows)

    def _items(self, rows: Tensor) -> Tensor:
        """Words of items […, W]."""
        return self._cut(rows_of(self.tables.item_terms, rows))

    def _queries(self, rows: Tensor) -> Tensor:
        """Words of queries […, Q], padding for row -1."""
        return self._cut(query_terms_of(self.tables, rows))

    def _cut(self, words: Tensor) -> Tensor:
        """At least one word, at most text_words."""
        return F.pad(words, (0, max(1 - words.shape[-1], 0)))[..., : self.settings.text_words]


def cut(entries_BND: Tensor, mask_BN: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entries, padded at the end, in sessions of `length`, the newest full: older sessions [B, S, K, D] and
    their mask, the newest one [B, K, D] and its mask. Padding stands in front of the oldest entry."""
    num_sessions = max(-(-mask_BN.shape[1] // length), 1)
    missing = num_sessions * length - mask_BN.shape[1]
    entries, mask = F.pad(entries_BND, (0, 0, 0, missing)), F.pad(mask_BN, (0, missing))
    places = torch.arange(mask.shape[1], device=mask.device)
    at_BT = (places + mask.sum(1, keepdim=True)) % mask.shape[1]
    entries = entries.gather(1, at_BT[..., None].expand_as(entries)).unflatten(1, (num_sessions, length))
    mask = mask.gather(1, at_BT).unflatten(1, (num_sessions, length))
    return entries[:, :-1], mask[:, :-1], entries[:, -1], mask[:, -1]


MODEL = User
