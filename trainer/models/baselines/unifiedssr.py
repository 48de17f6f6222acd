"""UnifiedSSR (Xie, Liu, Cong, Chen, "UnifiedSSR: A Unified Framework of Sequential Search and
Recommendation", arXiv 2310.13921, 2023).

    every look-up × √d, plus the user's vector and sinusoids
    layer(x, y): x + attention(LN x), x + attention of LN x to y, x + feed-forward(LN x); a last LN
    recommendation: products look at themselves, h = encode(P₀, P₀);  s = h · e
    search: step t has the product before and the query; the two lists look at each other with one set of
    weights, P = encode(P₀, Q₀), Q = encode(Q₀, P₀);  s = w P · e + (1 − w) Q · e, w learned in [.1, .9]
    sessions: windows of the list are predicted from its halves; neighbouring sessions should differ
    (|cos|), sessions of products and of queries should agree (−cos)
    L = −log σ(s⁺) − Σ log σ(−s⁻) (search: w L_P + (1 − w) L_Q) + session_weight · L_sessions

Differs from the published code, whose faults are off by default: its attention sees the future, which holds
the targets of training (causal=false brings that back); of its layers only the last one acts, on the first
input (num_layers=1 is the same); its windows are compared with steps by ≤, so that they never learn, and a
step in a window gets its own vector once more, which scales scores but cannot change their order
(windows=hard). Here windows are soft, and a step gets the mean of its session [?]. Windows follow the length
of the list, not the padded length. Every click has a list of its own here, and is its last step's target; the
mean loss of the earlier steps, which know no sessions (those see later steps), is added to that of the last
(steps=last leaves it out). The first step of a search, before any product, is kept and seen: it is all that a
user without searches has. Both tasks are trained at once, without fine-tuning on each.
Shapes: ids [B, N] with 0 = padding at the end, h [B, D], scores [B, C].
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import SRC
from trainer.batch import Batch, query_terms_of
from trainer.config import Fraction, ModelSettings, NonNegativeFloat, Positive
from trainer.models.contract import Ranker, World
from trainer.models.layers.attention import Attention
from trainer.models.layers.dropout import Dropout
from trainer.models.layers.embedding import ItemTable, WordMean, inner_products
from trainer.models.layers.history import HistoryKind, history_ids, newest
from trainer.models.layers.nce import nce, sampled_bce
from trainer.models.layers.prenorm import sinusoids
from trainer.models.layers.sequence import last_step

EPS = 1e-6  # of every norm, beside a standard deviation
SOFTNESS = 0.5  # steps: how gently a soft window begins and ends
START_WIDTH = 0.5 * math.log(5 / 3)  # windows begin with half of their part of the list: tanh(.2554) = .25


@s.settings
class UnifiedSsrSettings(ModelSettings):
    name: Literal["unifiedssr"] = "unifiedssr"
    """products and queries in two lists that share one encoder"""
    dim: Positive = 32
    """width of vectors and layers"""
    num_layers: Positive = 2
    """layers of the encoder"""
    num_heads: Positive = 4
    """attention heads"""
    ffn_dim: Positive = 64
    """inner width of the feed-forward layers"""
    dropout: Fraction = 0.5
    """dropout of the input and of the parts of a layer"""
    attention_dropout: Fraction = 0.1
    """dropout of attention weights"""
    num_sessions: Positive = 2
    """windows of a list"""
    session_weight: NonNegativeFloat = 0.1
    """weight of the session loss"""
    windows: Literal["soft", "hard"] = "soft"
    """soft: windows learn; hard: they do not, as published"""
    causal: bool = True
    """a step sees earlier ones only; false: all, as published"""
    steps: Literal["all", "last"] = "all"
    """steps of a list that are trained on: all, as published, or the last one, whose target is the event's
    click"""
    history: HistoryKind = "all"
    """clicks that a recommendation reads: all, or those of recommendations only"""


class StdNorm(nn.Module):
    """a (x − mean) / (std + ε) + b with the unbiased standard deviation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        std = (centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
        return self.weight * centred / (std + EPS) + self.bias


class SiameseLayer(nn.Module):
    """Attention within a list, attention to another list, feed-forward; all pre-norm."""

    def __init__(self, settings: UnifiedSsrSettings) -> None:
        super().__init__()
        dim = settings.dim
        self.norms = nn.ModuleList(StdNorm(dim) for _ in range(3))
        self.attention = Attention(dim, settings.num_heads, settings.attention_dropout)
        self.cross = Attention(dim, settings.num_heads, settings.attention_dropout)
        self.inner, self.outer = nn.Linear(dim, settings.ffn_dim), nn.Linear(settings.ffn_dim, dim)
        self.dropout = Dropout(settings.dropout)

    def forward(self, x: Tensor, other: Tensor, visible: Tensor) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.dropout(self.attention(normed, normed, visible))
        x = x + self.dropout(self.cross(self.norms[1](x), other, visible))
        inner = self.dropout(self.inner(self.norms[2](x)).relu())
        out: Tensor = x + self.dropout(self.outer(inner))
        return out


class Windows(nn.Module):
    """Where sessions begin and end: the list in S parts, each part's mean moves and widens its window."""

    def __init__(self, width: int, num_sessions: int) -> None:
        super().__init__()
        self.num_sessions = num_sessions
        self.offsets = nn.Linear(width, 2, bias=False)
        self.width_bias = nn.Parameter(torch.tensor([START_WIDTH]))

    def forward(self, steps_BND: Tensor, length_B: Tensor) -> Tensor:
        """→ [B, S, 2] first and last position, in steps, float32."""
        number, parts = torch.arange(self.num_sessions, device=length_B.device), self.num_sessions
        first_BS = length_B[:, None] * number // parts
        end_BS = -(-length_B[:, None] * (number + 1) // parts)
        place = torch.arange(steps_BND.shape[1], device=length_B.device)
        part_BSN = ((place >= first_BS[..., None]) & (place < end_BS[..., None])).float()
        mean_BSD = part_BSN @ steps_BND.float() / part_BSN.sum(2, keepdim=True).clamp(min=1)
        offset, width = self.offsets(mean_BSD.relu()).float().unbind(2)
        centre = (number + 0.5 + offset.tanh()) / parts
        half = (width + self.width_bias).tanh().relu() / parts
        return torch.stack([centre - half, centre + half], 2).clamp(0, 1) * length_B[:, None, None]


class Mix(nn.Module):
    """w p + (1 − w) q, w within [.1, .9]; outside, w still gets its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5]))

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        weight = self.weight + (self.weight.clamp(0.1, 0.9) - self.weight).detach()
        return weight * p + (1 - weight) * q


@dataclass(frozen=True)
class Encoded:
    """A list and its sessions."""

    steps: Tensor  # [B, N, D], each with its session in it: a session holds later steps, too
    sessions: Tensor  # [B, S, D]
    alone: Tensor  # [B, N, D], the steps without their sessions: none has seen a later one

    def differences(self) -> Tensor:
        """|cos| of neighbouring sessions [B, S − 1]; 0 for one without steps."""
        return F.cosine_similarity(self.sessions[:, 1:], self.sessions[:, :-1], dim=2).abs()

    def agreement(self, other: "Encoded") -> Tensor:
        """cos of the sessions of two lists [B, S]."""
        return F.cosine_similarity(self.sessions, other.sessions, dim=2)


class UnifiedSsrCore(nn.Module):
    """Users, products and words of queries by id, 0 = unknown, padding."""

    def __init__(self, num_users: int, num_items: int, num_words: int, settings: UnifiedSsrSettings) -> None:
        super().__init__()
        self.settings, self.scale = settings, settings.dim**0.5
        self.users, self.products = ItemTable(num_users, settings.dim), ItemTable(num_items, settings.dim)
        self.words = WordMean(num_words, settings.dim)
        self.layers = nn.ModuleList(SiameseLayer(settings) for _ in range(settings.num_layers))
        self.norm, self.dropout = StdNorm(settings.dim), Dropout(settings.dropout)
        # hard windows have no gradient
        self.windows = Windows(settings.dim, settings.num_sessions).requires_grad_(settings.windows == "soft")
        self.mix = Mix()
        self._start()

    def _start(self) -> None:
        """Xavier uniform for all matrices, offsets of windows 0."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.zeros_(self.windows.offsets.weight)
        with torch.no_grad():
            self.words.words.weight[0].zero_()
        self.products.zero_padding()
        self.users.zero_padding()

    def recommend(self, user_B: Tensor, products_BN: Tensor, mask_BN: Tensor) -> Tensor:
        """h [B, N, D]"""
        x = self._with_user(self.products(products_BN), user_B)
        return self._encode(x, x, self._visible(mask_BN))

    def search(
        self, user_B: Tensor, products_BN: Tensor, words_BNW: Tensor, p_mask_BN: Tensor, q_mask_BN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """P and Q [B, N, D]: at each step the product before it, and its query. Masks: the steps, of both
        lists, that P looks at, and those that Q looks at."""
        p = self._with_user(self.products(products_BN), user_B)
        q = self._with_user(self.words(words_BNW), user_B)
        return self._encode(p, q, self._visible(p_mask_BN)), self._encode(q, p, self._visible(q_mask_BN))

    def with_sessions(self, steps_BND: Tensor, mask_BN: Tensor, length_B: Tensor) -> Encoded:
        """length: of the list that is cut in windows."""
        window_BS12 = self.windows(steps_BND, length_B)[..., None]
        place = torch.arange(steps_BND.shape[1], device=length_B.device)
        after, before = place - window_BS12[:, :, 0], window_BS12[:, :, 1] - place
        if self.settings.windows == "hard":
            inside_BSN = ((after >= 0) & (before >= 0)).float() * mask_BN[:, None]
        else:
            inside_BSN = (after / SOFTNESS).sigmoid() * (before / SOFTNESS).sigmoid() * mask_BN[:, None]
        steps = steps_BND.float()
        sessions_BSD = inside_BSN @ steps / inside_BSN.sum(2, keepdim=True).clamp(min=EPS)
        if self.settings.windows == "hard":
            return Encoded(steps * (1 + inside_BSN.amax(1))[..., None], sessions_BSD, steps)
        return Encoded(steps + inside_BSN.transpose(1, 2) @ sessions_BSD, sessions_BSD, steps)

    def scores(self, hidden_BD: Tensor, items_BC: Tensor) -> Tensor:
        """[B, C] float32"""
        return inner_products(hidden_BD, self.products(items_BC)) * self.scale

    def _with_user(self, vectors_BND: Tensor, user_B: Tensor) -> Tensor:
        places = sinusoids(vectors_BND.shape[1], vectors_BND.shape[2], vectors_BND.device)
        return self.dropout((vectors_BND + self.users(user_B)[:, None]) * self.scale + places)

    def _visible(self, mask_BN: Tensor) -> Tensor:
        visible = mask_BN[:, None].expand(-1, mask_BN.shape[1], -1)
        return visible.tril() if self.settings.causal else visible

    def _encode(self, x: Tensor, other: Tensor, visible: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, other, visible)
        out: Tensor = self.norm(x)
        return out


class UnifiedSsr(Ranker):
    """Both tasks."""

    Settings = UnifiedSsrSettings
    title = "UnifiedSSR"
    needs = frozenset({"history_queries"})
    settings: UnifiedSsrSettings

    def __init__(self, settings: UnifiedSsrSettings, world: World) -> None:
        super().__init__(settings, world)
        self.core = UnifiedSsrCore(world.num_users, world.num_items, world.num_terms, settings)

    def score(self, batch: Batch) -> Tensor:
        return self.core.scores(self._hidden(batch), batch.candidates + 1)

    def score_catalogue(self, batch: Batch) -> Tensor:
        scores_BI: Tensor = self.core.products(scores_of=self._hidden(batch))
        return scores_BI * self.core.scale

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rec, src = self._tasks(batch)
        (h, h_last, clicks), (p, p_last, q, q_last, searched) = self._recommended(rec), self._searched(src)
        drawn_BNK = self._drawn(batch)
        drawn_rec, drawn_src = drawn_BNK[batch.task != SRC], drawn_BNK[batch.task == SRC]
        by_history = self._click_losses(h, h_last, clicks, rec, drawn_rec)
        by_product = self._click_losses(p, p_last, searched, src, drawn_src)
        by_query = self._click_losses(q, q_last, searched, src, drawn_src)
        click_B = torch.cat([by_history, self.core.mix(by_product, by_query)])
        apart = mean_or_zero(p.differences()) + mean_or_zero(q.differences())
        session_B = torch.cat([mean_or_zero(h.differences()), apart - p.agreement(q).mean(1)])
        is_rec_B, data = torch.arange(len(click_B), device=click_B.device) < rec.num_events, self.world.data
        weights_B = torch.where(is_rec_B, data.weight_rec, data.weight_src).float()
        click, session = (weights_B * click_B).mean(), (weights_B * session_B).mean()
        report = {"click_loss": click.detach(), "session_loss": session.detach()}
        return click + self.settings.session_weight * session, report

    def _click_losses(
        self, encoded: Encoded, last_BD: Tensor, products_BN: Tensor, batch: Batch, drawn_BNK: Tensor
    ) -> Tensor:
        """[B] float32: of the event's click, and the mean of those of the list, each predicted by the step
        before it, against drawn items."""
        losses_B = sampled_bce(self.core.scores(last_BD, batch.candidates + 1), batch.labels)
        if self.settings.steps == "last":
            return losses_B
        targets_BN = products_BN[:, 1:]
        real_BN = targets_BN != 0
        drawn_MK = drawn_BNK[:, : targets_BN.shape[1]][real_BN]
        items_MC = torch.cat([targets_BN[real_BN][:, None], drawn_MK], 1)
        scores_MC = self.core.scores(encoded.alone[:, :-1][real_BN], items_MC)
        earlier_BN = losses_B.new_zeros(real_BN.shape)
        earlier_BN = earlier_BN.masked_scatter(real_BN, nce(scores_MC[:, 0], scores_MC[:, 1:]))
        return losses_B + earlier_BN.sum(1) / real_BN.sum(1).clamp(min=1)

    def _drawn(self, batch: Batch) -> Tensor:
        """Negatives of the steps of a list, as many as the click has: ids [B, history_max, K]."""
        shape = (batch.num_events, self.world.data.history_max, batch.candidates.shape[1] - 1)
        return torch.randint(1, self.world.num_items + 1, shape, device=self.device)

    # ---- batch → core --------------------------------------------------------------------------------------

    def _hidden(self, batch: Batch) -> Tensor:
        """The vector that items are multiplied with, [B, D]."""
        rec, src = self._tasks(batch)
        _, h_last, _ = self._recommended(rec)
        _, p_last, _, q_last, _ = self._searched(src)
        hidden_BD = torch.cat([h_last, self.core.mix(p_last, q_last)])
        return hidden_BD[(batch.task == SRC).to(torch.int8).argsort(stable=True).argsort()]

    def _tasks(self, batch: Batch) -> tuple[Batch, Batch]:
        """Its recommendations and its searches, either may be empty: every rank calls every layer."""
        return batch.take(batch.task != SRC), batch.take(batch.task == SRC)

    def _recommended(self, batch: Batch) -> tuple[Encoded, Tensor, Tensor]:
        """→ the list of products, its last step [B, D], the products [B, N]."""
        ids_BN = history_ids(batch, self.settings.history, self.world.data.history_max)
        mask_BN = ids_BN != 0
        length_B = mask_BN.sum(1)
        steps = self.core.recommend(batch.user + 1, ids_BN, mask_BN)
        encoded = self.core.with_sessions(steps, mask_BN, length_B)
        return encoded, last_step(encoded.steps, length_B), ids_BN

    def _searched(self, batch: Batch) -> tuple[Encoded, Tensor, Encoded, Tensor, Tensor]:
        """→ the lists of products and of queries, each with its last step [B, D]; the products [B, N], one
        step late."""
        kept_BN = batch.searched
        length, count_B = self.world.data.history_max, kept_BN.sum(1).clamp(max=self.world.data.history_max)
        products = F.pad(newest(batch.history_items + 1, kept_BN, length), (1, 0))
        queries = F.pad(newest(batch.history_queries + 1, kept_BN, length), (0, 1))
        queries = queries.scatter(1, count_B[:, None], batch.query[:, None] + 1)
        mask = torch.arange(products.shape[1], device=count_B.device) <= count_B[:, None]
        words = query_terms_of(self.tables, queries - 1)
        both = self.core.search(batch.user + 1, products, words, mask, mask)
        p, q = (self.core.with_sessions(steps, mask, count_B + 1) for steps in both)
        return p, last_step(p.steps, count_B + 1), q, last_step(q.steps, count_B + 1), products


def mean_or_zero(values_BS: Tensor) -> Tensor:
    """[B]; 0 where there is one session only, and so no neighbours."""
    return values_BS.sum(1) / max(values_BS.shape[1], 1)


MODEL = UnifiedSsr
