"""GenSR once more, as slow and obvious as it can be: plain loops over events, candidates, history and heads
in float64, one unpadded prompt at a time, and the optimizer by hand.

Nothing of trainer/ is imported. Weights come by name from a state dict of the model under test; what frozen
tables hold comes as arrays. Equations have the paper's numbers (arXiv:2504.06714). Everything can be
differentiated, so gradients and whole training steps are compared, too (test_slow_gensr.py).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.parity.slow_evidence import SlowEvidence

REC, SRC = 0, 1

# The text around the slots: before the query, segments 1 to 5. Written down again on purpose: a test is to
# notice when the wording of the two tasks is changed or swapped.
ENCODER_WORDING: dict[str, dict[int, tuple[str, ...]]] = {
    "compact": {
        REC: ("", "Recommend", ",", "item", ",", "?"),
        SRC: ("", "Search", ",", "item", ",", "query"),
    },
    "paper": {
        task: (
            "",
            f"{name} task. The collaborative features of the items this user has interacted with are "
            "summarised as",
            "and the semantic features of these items are summarised as",
            ". The candidate item has the collaborative feature",
            "and the semantic feature",
            f". Based on this history, will the user {end}",
        )
        for task, name, end in (
            (REC, "Recommendation", "like the candidate item when it is recommended? Answer Yes or No."),
            (
                SRC,
                "Search",
                "click the candidate item after searching for the following query? Answer Yes or No. Query:",
            ),
        )
    },
}
DECODER_WORDING: dict[str, dict[int, tuple[str, ...]]] = {
    "compact": {
        REC: ("Recommend", ": user", ",", "; item", ",", "?"),
        SRC: ("Search", ": user", ",", "; item", ",", "?"),
    }
}


@dataclass(frozen=True)
class Event:
    """One event with its candidates, the clicked one among them."""

    user: int
    task: int
    query: int  # row of the queries, -1 for none
    fold: int  # which CF table it reads while training, -1 for the full one
    history: list[tuple[int, int]]  # (item, task), oldest first
    candidates: list[int]
    clicked: int  # place in candidates


@dataclass(frozen=True)
class Tables:
    """What is known of items and queries: CF vectors at unit RMS, tokens and words padded with 0."""

    cf: Tensor  # [items, K] float64
    cf_folds: Tensor  # [folds, items, K] float64
    item_tokens: list[list[int]]
    item_words: list[list[int]]
    query_tokens: list[list[int]]
    query_words: list[list[int]]


@dataclass(frozen=True)
class Settings:
    variant: str  # paper, extended
    prompt: str  # paper, compact
    num_heads: int
    history_tokens: int
    item_tokens: int
    history_max: int
    contrastive_weight: float
    listwise_weight: float
    temperature: float
    weight_rec: float
    weight_src: float
    words: bool  # queries are anonymised words, not tokens
    decoder: bool  # the backbone reads task text and query first
    mined_negatives: int = 0  # of each event's negatives
    views: str = "both"  # both, cf, semantic: the slots of the other view are empty, without Eq. 10
    soft_filter: bool = True  # False: every history item counts alike, and W is left out
    scale: float = 1.0  # RMS of the token vectors of a pretrained backbone, the unit of its slots
    before: list[int] = field(default_factory=list)  # special tokens in front of every text
    behind: list[int] = field(default_factory=list)  # and behind it


class SlowGenSR:
    """weights: name → tensor, without the backbone. token_vectors: the backbone's input table. answer:
    vectors of one prompt [S, D] → logits of (Yes, No). encode: text → token ids."""

    def __init__(
        self,
        settings: Settings,
        weights: dict[str, Tensor],
        tables: Tables,
        token_vectors: Tensor,
        answer: Callable[[Tensor], tuple[Tensor, Tensor]],
        encode: Callable[[str], Sequence[int]],
        evidence: SlowEvidence | None = None,
    ) -> None:
        self.s, self.w, self.tables = settings, weights, tables
        self.evidence = evidence
        self.token_vectors, self.answer, self.encode = token_vectors, answer, encode

    # ---- the two views of an item --------------------------------------------------------------------------

    def cf_vector(self, item: int, fold: int) -> Tensor:
        """E_c. In training an event reads the table that never saw its own click."""
        return self.tables.cf[item] if fold < 0 else self.tables.cf_folds[fold, item]

    def semantic_vector(self, item: int, num_tokens: int) -> Tensor:
        """E_s, in units of the backbone's token vectors: mean of the vectors of its tokens, and of its
        words."""
        vector = self.mean([self.token_vectors[t] for t in self.tables.item_tokens[item][:num_tokens] if t])
        vector = vector / self.s.scale
        if self.s.words:
            words = self.mean_words(self.tables.item_words[item])
            vector = vector + self.w["words_projection.weight"] @ words
        return vector

    def mean_words(self, words: Sequence[int]) -> Tensor:
        rows = [self.w["words.weight"][word] for word in words if word]
        return sum(rows[1:], rows[0]) / len(rows) if rows else 0 * self.w["words.weight"][0]

    def mean(self, rows: Sequence[Tensor]) -> Tensor:
        return sum(rows[1:], rows[0]) / len(rows) if rows else 0 * self.token_vectors[0]

    def query_vectors(self, query: int) -> list[Tensor]:
        """In units of the backbone's token vectors."""
        if query < 0:
            return []
        if self.s.words:
            words = [word for word in self.tables.query_words[query] if word]
            return [self.w["words_projection.weight"] @ self.w["words.weight"][word] for word in words]
        tokens = [token for token in self.tables.query_tokens[query] if token]
        return [self.token_vectors[token] / self.s.scale for token in tokens]

    # ---- Eqs. 3 and 4 --------------------------------------------------------------------------------------

    def encoded(self, side: str, items: list[Tensor], tasks: list[int]) -> list[Tensor]:
        """H = FFN(MSA(Q = K = V = E[H_u])): attention, a residual and a norm; two maps, a residual and a
        norm."""
        part = f"{side}_encoder."
        if self.s.variant == "extended":
            newest = len(items) - 1
            items = [
                vector
                + self.w[part + "age.weight"][newest - place]
                + self.w[part + "behaviour.weight"][tasks[place]]
                for place, vector in enumerate(items)
            ]
        part += "layer."
        width = len(items[0])
        weight, bias = self.w[part + "self_attn.in_proj_weight"], self.w[part + "self_attn.in_proj_bias"]
        projected = [
            [weight[n * width : (n + 1) * width] @ x + bias[n * width : (n + 1) * width] for x in items]
            for n in range(3)
        ]
        outputs = []
        for place, vector in enumerate(items):
            heads = []
            for head in self.heads(width):
                query = projected[0][place][head]
                logits = [query @ key[head] / math.sqrt(len(query)) for key in projected[1]]
                shares = softmax(logits)
                heads.append(weighted(shares, [value[head] for value in projected[2]]))
            attended = self.linear(part + "self_attn.out_proj", torch.cat(heads))
            vector = self.norm(part + "norm1", vector + attended)
            inner = gelu(self.linear(part + "linear1", vector))
            outputs.append(self.norm(part + "norm2", vector + self.linear(part + "linear2", inner)))
        return outputs

    # ---- Eqs. 5 and 6 --------------------------------------------------------------------------------------

    def weights(self, side: str, candidate: Tensor, history: list[Tensor]) -> list[Tensor]:
        """Eq. 5: a_j = softmax_j(score(e_i, h_j)), the mean over heads."""
        part = f"{side}_filter."
        query = self.linear(part + "query", candidate)
        keys = [self.linear(part + "key", vector) for vector in history]
        of_heads = [
            softmax([query[head] @ key[head] / math.sqrt(len(query[head])) for key in keys])
            for head in self.heads(len(query))
        ]
        same = [1 / len(of_heads)] * len(of_heads)
        return [weighted(same, [head[place] for head in of_heads]) for place in range(len(history))]

    def filtered(self, side: str, candidate: Tensor, history: list[Tensor]) -> Tensor:
        """Eq. 6: f = Σ_j a_j · W h_j."""
        if not history:
            return self.w[f"{side}_filter.no_history"]
        if not self.s.soft_filter:
            return weighted([1 / len(history)] * len(history), history)
        shares = self.weights(side, candidate, history)
        return weighted(shares, [self.w[f"{side}_filter.value.weight"] @ vector for vector in history])

    # ---- Eq. 7 ---------------------------------------------------------------------------------------------

    def prompt(self, task: int, slots: list[Tensor], query: list[Tensor]) -> Tensor:
        """x = [seg1, f_c, seg2, f_s, seg3, e_c, seg4, e_s, seg5], with the products and the query where the
        backbone reads them → [S, D]."""
        wording = (DECODER_WORDING if self.s.decoder else ENCODER_WORDING)[self.s.prompt][task]
        first, *segments = [[self.token_vectors[t] for t in self.encode(text)] for text in wording]
        views = ["cf" if place in (0, 2, 4) else "semantic" for place in range(len(slots))]
        kept = [float(self.s.views in ("both", view)) for view in views]
        slots = [self.s.scale * keep * slot for keep, slot in zip(kept, slots, strict=True)]
        asked = [self.s.scale * vector for vector in query]
        own = [*segments[0], slots[0], *segments[1], slots[1], *segments[2], slots[2], *segments[3], slots[3]]
        if self.s.decoder:
            vectors = [*first, *asked, *own, *slots[4:], *segments[4]]
        else:
            vectors = [*own, *segments[4], *slots[4:], *asked]
        before = [self.token_vectors[token] for token in self.s.before]
        behind = [self.token_vectors[token] for token in self.s.behind]
        return torch.stack([*before, *vectors, *behind])

    def slots(
        self, event: Event, item: int, cf_history: list[Tensor], sem_history: list[Tensor]
    ) -> list[Tensor]:
        """f_c, f_s, e_c, e_s and, in the extended variant, W(f_c ⊙ e_c), W(f_s ⊙ e_s), W(q̄ ⊙ e_s)."""
        e_c = self.cf_vector(item, event.fold)
        e_s = self.semantic_vector(item, self.s.item_tokens)
        f_c = self.filtered("cf", e_c, cf_history)
        f_s = self.filtered("sem", e_s, sem_history)
        slots = [self.linear("cf_projection", f_c), f_s, self.linear("cf_projection", e_c), e_s]
        if self.s.variant == "extended":
            slots.append(self.linear("match_cf", f_c * e_c))
            slots.append(self.linear("match_sem", f_s * e_s))
            if event.query < 0:
                slots.append(self.w["no_query"])
            else:
                mean = self.mean(self.query_vectors(event.query))
                slots.append(self.linear("match_query", mean * e_s))
        return slots

    # ---- Eqs. 8, 9 and 10 ----------------------------------------------------------------------------------

    def histories(self, event: Event) -> tuple[list[Tensor], list[Tensor]]:
        if not event.history:
            return [], []
        items, tasks = [item for item, _ in event.history], [task for _, task in event.history]
        cf = [self.cf_vector(item, event.fold) for item in items]
        sem = [self.semantic_vector(item, self.s.history_tokens) for item in items]
        return self.encoded("cf", cf, tasks), self.encoded("sem", sem, tasks)

    def answers(self, event: Event, training: bool) -> tuple[list[Tensor], Tensor, Tensor]:
        """Log-odds of Yes of each candidate, and the clicked candidate's two filtered views."""
        histories = self.histories(event)
        given, views = [], []
        clicked = event.candidates[event.clicked] if training else -1  # its click is among the counts
        for item in event.candidates:
            slots = self.slots(event, item, *histories)
            views.append((slots[0], slots[1]))
            beside: Tensor | float = 0.0
            if self.evidence is not None:
                slot, beside = self.counted(event, item, clicked)
                slots.append(slot)
            yes, no = self.answer(self.prompt(event.task, slots, self.query_vectors(event.query)))
            given.append(yes - no + beside)
        return given, *views[event.clicked]

    def scores(self, event: Event) -> list[float]:
        return [float(odds.detach()) for odds in self.answers(event, training=False)[0]]

    def loss(self, events: Sequence[Event]) -> dict[str, Tensor]:
        """Eq. 8 of one micro-batch, and its terms."""
        answered = [self.answers(event, training=True) for event in events]
        of_task = {REC: self.s.weight_rec, SRC: self.s.weight_src}
        answer = listwise = torch.zeros((), dtype=torch.float64)
        for event, (given, _, _) in zip(events, answered, strict=True):
            odds = [odds - self.drawn_more_often(event, place) for place, odds in enumerate(given)]
            right = [log_sigmoid(o if place == event.clicked else -o) for place, o in enumerate(odds)]
            answer = answer - of_task[event.task] * sum(right) / len(right) / len(events)  # Eq. 9
            listwise = listwise - of_task[event.task] * log_softmax(odds)[event.clicked] / len(events)
        contrast = self.contrast(events, [(f_c, f_s) for _, f_c, f_s in answered])
        weight = self.s.contrastive_weight if self.s.views == "both" else 0.0
        loss = answer + weight * contrast + self.s.listwise_weight * listwise
        return {"loss": loss, "answer": answer, "listwise": listwise, "contrast": contrast}

    def contrast(self, events: Sequence[Event], views: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Eq. 10 over a micro-batch: ½ [CE(cos(F_c, F_s)/τ) + CE(cos(F_s, F_c)/τ)], without events that have
        no history; a user's other events are no negatives."""
        total = torch.zeros((), dtype=torch.float64)
        counted = [n for n, event in enumerate(events) if event.history]
        for own in counted:
            for asks, answers in ((0, 1), (1, 0)):
                others = [n for n in counted if n == own or events[n].user != events[own].user]
                logits = [cosine(views[own][asks], views[n][answers]) / self.s.temperature for n in others]
                total = total - 0.5 * log_softmax(logits)[others.index(own)] / len(events)
        return total

    # ---- model.evidence and model.mined_negatives: slow_evidence.py ----------------------------------------

    def counted(self, event: Event, item: int, clicked: int) -> tuple[Tensor, Tensor]:
        """The eighth slot, and log-odds that are added to the answer's."""
        assert self.evidence is not None
        history = [item for item, _ in event.history]
        numbers = self.evidence.numbers(
            history, event.query, item, lambda row: self.cf_vector(row, event.fold), clicked
        )
        vector = torch.tensor(numbers, dtype=torch.float64)
        hidden = gelu(self.linear("evidence_head.hidden", vector))
        odds = self.linear("evidence_head.linear", vector) + self.linear("evidence_head.out", hidden)
        return self.linear("evidence_head.slot", vector), odds[event.task]

    def drawn_more_often(self, event: Event, place: int) -> float:
        """log(q · items) of a candidate; 0 where all negatives are uniform."""
        if self.evidence is None or not self.s.mined_negatives:
            return 0.0
        share = self.s.mined_negatives / (len(event.candidates) - 1)
        history, own = [item for item, _ in event.history], place == event.clicked
        return math.log(self.evidence.proposal(history, event.query, event.candidates[place], own, share))

    # ---- small parts ---------------------------------------------------------------------------------------

    def heads(self, width: int) -> list[slice]:
        size = width // self.s.num_heads
        return [slice(head * size, (head + 1) * size) for head in range(self.s.num_heads)]

    def linear(self, name: str, vector: Tensor) -> Tensor:
        return self.w[f"{name}.weight"] @ vector + self.w[f"{name}.bias"]

    def norm(self, name: str, vector: Tensor) -> Tensor:
        centred = vector - vector.sum() / len(vector)
        deviation = torch.sqrt((centred * centred).sum() / len(vector) + 1e-5)
        return centred / deviation * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]


def softmax(logits: list[Tensor]) -> list[Tensor]:
    return [share.exp() for share in log_softmax(logits)]


def log_softmax(logits: list[Tensor]) -> list[Tensor]:
    largest = max(float(logit.detach()) for logit in logits)
    total = sum((logit - largest).exp() for logit in logits)
    return [logit - largest - torch.as_tensor(total).log() for logit in logits]


def log_sigmoid(odds: Tensor) -> Tensor:
    return log_softmax([odds, 0 * odds])[0]


def weighted(shares: Sequence[Tensor | float], vectors: Sequence[Tensor]) -> Tensor:
    total = shares[0] * vectors[0]
    for share, vector in zip(shares[1:], vectors[1:], strict=True):
        total = total + share * vector
    return total


def gelu(vector: Tensor) -> Tensor:
    return 0.5 * vector * (1 + torch.erf(vector / math.sqrt(2)))


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other) / torch.sqrt((one @ one) * (other @ other))


# ---- the optimizer -----------------------------------------------------------------------------------------


@dataclass
class SlowAdamW:
    """AdamW (Loshchilov & Hutter 2019) with decoupled weight decay, parameter by parameter. Only matrices
    decay; T5's position biases are a table by shape and a bias by nature."""

    weights: dict[str, Tensor]  # changed in place
    beta2: float
    weight_decay: float
    grad_clip: float
    beta1: float = 0.9
    epsilon: float = 1e-8
    step_number: int = 0
    means: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    norm: float = 0.0  # of the last gradient, before clipping

    def decays(self, name: str) -> bool:
        return self.weights[name].dim() >= 2 and "relative_attention_bias" not in name

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from .grad of each weight, which is emptied. A weight that no event of the step has read
        has gradient 0, and moves on by what AdamW remembers."""
        grads = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in self.weights.items()}
        self.norm = math.sqrt(sum(float((grad * grad).sum()) for grad in grads.values()))
        shrink = min(1.0, self.grad_clip / (self.norm + 1e-6))  # 1e-6 as in torch.nn.utils.clip_grad_norm_
        self.step_number += 1
        for name, grad in grads.items():
            weight, grad = self.weights[name], grad * shrink
            if self.decays(name):
                weight -= lr * self.weight_decay * weight
            zero = torch.zeros_like(grad)
            mean = self.beta1 * self.means.get(name, zero) + (1 - self.beta1) * grad
            square = self.beta2 * self.squares.get(name, zero) + (1 - self.beta2) * grad * grad
            self.means[name], self.squares[name] = mean, square
            unbiased_mean = mean / (1 - self.beta1**self.step_number)
            unbiased_square = square / (1 - self.beta2**self.step_number)
            weight -= lr * unbiased_mean / (unbiased_square.sqrt() + self.epsilon)
            weight.grad = None


def learning_rate(step: int, peak: float, warmup: int, num_steps: int) -> float:
    """Of step `step`, counted from 0: up in `warmup` equal parts, then down to 0 behind the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (num_steps - step) / (num_steps - warmup)


# ---- backbones of transformers, one prompt at a time -------------------------------------------------------


def answers_of(backbone: Any, yes: int, no: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """backbone: a float64 model of transformers, in evaluation mode."""

    def answer(vectors_SD: Tensor) -> tuple[Tensor, Tensor]:
        if backbone.config.is_encoder_decoder:
            start = torch.tensor([[backbone.config.decoder_start_token_id]])
            logits = backbone(inputs_embeds=vectors_SD[None], decoder_input_ids=start).logits[0, 0]
        else:
            logits = backbone(inputs_embeds=vectors_SD[None]).logits[0, -1]
        return logits[yes], logits[no]

    return answer
