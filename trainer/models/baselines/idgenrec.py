"""IDGenRec: a generator writes items' ids as words, a recommender spells them (Tan et al., "IDGenRec:
LLM-RecSys Alignment with Textual ID Learning", SIGIR 2024). Recommendation only; it needs items' text.

    id(i)  words that the generator writes for the text of i, no two items alike
    s      log P(id(c) | prompt with the ids of the history) / length^length_penalty, spelled inside a trie
    L_rec  cross-entropy of the tokens of the clicked item's id                       stage=recommender
    L_gen  the same, the history's ids as Σ_v p_v · emb_v of what the generator would write, greedily, emb_v
           the recommender's table; the recommender is frozen                         stage=generator

The published alternation is a chain of runs, each begun with run.init_from of the one before: recommender,
generator, recommender, … A new run writes the ids (fit) with the generator it begins with; on a folder that
goes on from the earlier run's, only those of new items. Ids: diverse beam search, 10 groups of one beam,
penalty 1, 2, … 9 until an item has one that is not taken.

ids=words (default) writes no ids by a model: the rarest tokens of the item's text. A generator from scratch
writes noise; for the published method name a T5 that was tuned to write tags: ids=generator,
model.generator=FOLDER. It must share the prepared folder's tokenizer with the recommender.

Differs from the published code: no user id (the published one is written from the whole sequence, target
included); an item that finds no free id in nine rounds gets its first wording and a number, where the
published code allows ten tokens more; ids are tokens, not joined to text and cut anew; 5 wordings of the
prompt, one drawn a micro-batch, for 21, three of them drawn a row; punctuation is kept in ids and zeroed in
the soft ones, as published; probabilities of illegal tokens are not given to the legal ones, as in its
beam search, unless legal_only=true: a word then costs what tells it from the other words that an item has
there. num_beams=0 spells every candidate: scores then do not depend on the other candidates.
Shapes: B events, C candidates, N history, L tokens of an id, V vocabulary, D width.
"""

import string
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_shards import settings as s
from data_shards.schema import PAD, REC
from trainer.batch import ITEM_SLICE, Batch, rows_of, term_counts
from trainer.config import NonNegative, NonNegativeFloat, Positive
from trainer.errors import ConfigError, DataError
from trainer.models.backbones.backbone import Backbone, Prompt, packed
from trainer.models.backbones.language import check_own_tokenizer, language_model
from trainer.models.backbones.ranker import LanguageRanker
from trainer.models.backbones.settings import BackboneSettings
from trainer.models.contract import UNREACHED, World
from trainer.models.layers.history import HistoryKind, history_ids
from trainer.models.layers.item_ids import Tokens, as_matrix, distinct_ids, diverse_greedy, rare_words
from trainer.models.layers.trie import END, Children, beam_search, id_lengths, token_log_probs, trie_nodes

GROUPS, PENALTIES = 10, range(1, 10)  # of diverse beam search
SUFFIX = 7  # tokens that a number may add to an id
ITEMS_AT_ONCE = 64  # texts that the generator reads together when ids are written
LOGITS_AT_ONCE = 2**25  # of candidates' tokens: 128 MiB
STOPS = ("</s>", "<eos>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>")
INTRO, BETWEEN = "A user has clicked:", ","
WORDINGS = (  # the first one is asked with outside training
    "Predict the next item:",
    "What will the user click next?",
    "Recommend an item:",
    "The next item of this sequence is",
    "Name the item that follows:",
)
WRITE = "Tags of this item:"

Round = Callable[[list[int]], Iterator[list[Tokens]]]  # wordings of items, from the best on


@s.settings
class IdGenRecSettings(BackboneSettings):
    name: Literal["idgenrec"] = "idgenrec"
    """textual ids, spelled by a language model"""
    stage: Literal["recommender", "generator"] = "recommender"
    """which of the two is trained, the other is frozen; the next stage begins with run.init_from"""
    backbone: str = "scratch:mini"
    """the recommender: hub name, local folder, or scratch:SIZE (trainer/models/backbones/families.py)"""
    generator: str = "scratch:mini"
    """the writer of ids, where ids=generator"""
    ids: Literal["words", "generator"] = "words"
    """words: the rarest of the item's text. generator: as published"""
    id_tokens: Positive = 10
    """longest id"""
    shortest_id: Positive = 3
    """tokens of an id with ids=words, more where it is taken"""
    num_beams: NonNegative = 0
    """beams among an event's candidates; 0 spells all of them. Published: 20"""
    catalogue_beams: NonNegative = 50
    """beams in the trie of all items; 0 spells all of them"""
    length_penalty: NonNegativeFloat = 1.0
    """log P is divided by the id's length to this power"""
    legal_only: bool = False
    """probabilities are among the words that go on to some item's id, and sum to 1 over all items"""
    history: HistoryKind = "all"
    """clicks that are read: all, or those of recommendations only, as in the paper"""


class IdGenRec(LanguageRanker):
    Settings = IdGenRecSettings
    title = "IDGenRec"
    tasks = (REC,)
    needs = frozenset({"item_text"})
    kept = ("ids",)
    settings: IdGenRecSettings
    ids: Tensor  # [I, L] int64, END behind each

    @classmethod
    def check_tokenizer(cls, tokenizer: Any, settings: Any, is_trained: bool) -> None:
        super().check_tokenizer(tokenizer, settings, is_trained)
        if settings.ids == "generator":
            check_own_tokenizer(settings.generator, tokenizer, is_trained, key="model.generator")

    def __init__(self, settings: IdGenRecSettings, world: World) -> None:
        super().__init__(settings, world)
        if settings.stage == "generator" and settings.ids != "generator":
            raise ConfigError(
                "model.stage=generator trains what writes the ids: set model.ids=generator, too"
            )
        self.backbone = language_model(settings, world)
        self.generator: Backbone | None = None
        if settings.ids == "generator":
            writer = replace(settings, backbone=settings.generator)
            self.generator = language_model(writer, world, part="generator")
            self.generator.requires_grad_(settings.stage == "generator")
            self.backbone.requires_grad_(settings.stage == "recommender")
        self.register_buffer(
            "ids", torch.zeros((world.num_items, settings.id_tokens + SUFFIX + 1), dtype=torch.int64)
        )
        self._spelling: tuple[Tensor, Tensor, Children | None] | None = None
        if world.tokenizer is not None:
            self._set_texts(world.tokenizer())

    def _set_texts(self, tokenizer: Any) -> None:
        texts = {"intro": INTRO, "between": BETWEEN, "write": WRITE}
        texts |= {f"ask_{number}": text for number, text in enumerate(WORDINGS)}
        for name, text in texts.items():
            self._constant(f"text_{name}", tokenizer(text, add_special_tokens=False)["input_ids"])
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._constant("text_stops", [PAD, *(vocabulary[stop] for stop in STOPS if stop in vocabulary)])
        marks = [number for token, number in vocabulary.items() if _is_punctuation(token)]
        self._constant("text_marks", sorted(marks))
        digits = [vocabulary.get(digit, PAD) for digit in string.digits]
        # where the tokenizer has no digits any ten words do
        self._digits = digits if PAD not in digits else list(range(2, 12))

    def _number(self, number: int) -> Tokens:
        return tuple(self._digits[int(digit)] for digit in str(number))

    def train(self, mode: bool = True) -> "IdGenRec":
        """Frozen parts run without dropout."""
        super().train(mode)
        if self.generator is not None:
            (self.backbone if self.settings.stage == "generator" else self.generator).eval()
        return self

    # ---- ids -----------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Writes the ids, with the generator as it is; items that have one keep it. Raises DataError when no
        item has text."""
        counts = term_counts(self.tables.item_tokens, self.backbone.vocab_size)
        if not counts[PAD + 1 :].any():
            raise DataError(
                f"{self.world.data.dir}: no item has text in words, and IDGenRec makes ids of it. Choose "
                "another model, such as bsr."
            )
        settings, num_items = self.settings, self.world.num_items
        rounds = self._written() if self.generator is not None else self._worded(counts)
        written = [tuple(token for token in row if token != END) for row in self.ids.tolist()]
        known = {item: tokens for item, tokens in enumerate(written) if tokens}
        ids = distinct_ids(rounds, num_items, self._number, known)
        self.ids.copy_(as_matrix(ids, settings.id_tokens + SUFFIX + 1))
        self._spelling = None

    def _worded(self, counts: Tensor) -> Iterator[Round]:
        """One round for each length: ids of different lengths never collide."""
        for size in range(self.settings.shortest_id, self.settings.id_tokens + 1):
            yield partial(self._words, counts=counts, size=size)

    def _words(self, items: list[int], counts: Tensor, size: int) -> Iterator[list[Tokens]]:
        for start in range(0, len(items), ITEM_SLICE):
            rows = torch.tensor(items[start : start + ITEM_SLICE], device=self.device)
            for tokens in rare_words(rows_of(self.tables.item_tokens, rows).cpu(), counts, size):
                yield [tokens]

    def _written(self) -> Iterator[Round]:
        """One round for each penalty."""
        for penalty in PENALTIES:
            yield partial(self._write, penalty=float(penalty))

    @torch.no_grad()
    def _write(self, items: list[int], penalty: float) -> Iterator[list[Tokens]]:
        assert self.generator is not None
        was_training = self.training
        self.eval()
        for start in range(0, len(items), ITEMS_AT_ONCE):
            rows = torch.tensor(items[start : start + ITEMS_AT_ONCE], device=self.device)
            written = diverse_greedy(
                self._generates(rows),
                len(rows),
                GROUPS,
                penalty,
                self.settings.id_tokens,
                self.get_buffer("text_stops"),
            )
            for groups in written.tolist():
                yield [tuple(token for token in group if token != PAD) for group in groups]
        self.train(was_training)

    def _generates(self, items_M: Tensor) -> Callable[[Tensor], Tensor]:
        """Beginnings [M, G, l] of ids of items → logits of the next token [M, G, V]."""
        read = self._reads_text(items_M)
        assert self.generator is not None
        logits = self.generator.token_logits
        return lambda begun: logits(read(begun)[:, :, -1])

    def _reads_text(self, items_M: Tensor) -> Callable[[Tensor], Tensor]:
        generator = self.generator
        assert generator is not None
        tokens_ML = rows_of(self.tables.item_tokens, items_M)[:, : self.world.data.item_tokens]
        write_D = generator.embed(self.get_buffer("text_write"), sparse=False)
        own = write_D.expand(len(items_M), 1, -1, -1)
        mask_ML = tokens_ML != 0
        mask_ML[:, 0] = True  # an item without text: padding, read as such
        return generator.reader(Prompt(own, generator.embed(tokens_ML, sparse=False), mask_ML))

    # ---- loss ----------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        ids_IL, nodes_IX, legal = self._ids()
        target_B = batch.clicked
        target_BL = ids_IL[target_B]
        number = int(torch.randint(len(WORDINGS), ())) if self.training else 0
        read = self.backbone.reader(self._prompt(batch, number))
        hidden_BLD = read(target_BL[:, None, :-1])[:, 0]
        logits_BLV = self.backbone.token_logits(hidden_BLD)
        log_p_BL = token_log_probs(logits_BLV, target_BL, nodes_IX[target_B], legal)
        return -(log_p_BL.sum(1) / id_lengths(target_BL)).mean(), {}

    # ---- scores --------------------------------------------------------------------------------------------

    def score(self, batch: Batch) -> Tensor:
        return self._ranked(batch, batch.candidates, self.beams())

    def score_catalogue(self, batch: Batch) -> Tensor:
        everything = torch.arange(self.world.num_items, device=batch.candidates.device)
        return self._ranked(batch, everything.expand(batch.num_events, -1), self.beams(catalogue=True))

    @classmethod
    def retrieves(cls) -> bool:
        """A language model spells the ids of the whole catalogue."""
        return False

    def beams(self, catalogue: bool = False) -> int:
        return self.settings.catalogue_beams if catalogue else self.settings.num_beams

    def _ranked(self, batch: Batch, candidates: Tensor, num_beams: int) -> Tensor:
        ids_IL, nodes_IX, legal = self._ids()
        ids_BCL, nodes_BCX = ids_IL[candidates], nodes_IX[candidates]
        read = self.backbone.reader(self._prompt(batch, 0))
        if num_beams:
            logits = self.backbone.token_logits
            log_p_BC = beam_search(
                lambda begun: logits(read(begun)[:, :, -1]), ids_BCL, nodes_BCX, num_beams, legal
            )
        else:
            log_p_BC = self._spelled(read, ids_BCL, nodes_BCX, legal)
        lengths_BC = id_lengths(ids_BCL).float() ** self.settings.length_penalty
        return torch.where(log_p_BC > UNREACHED, log_p_BC / lengths_BC, UNREACHED)

    def _spelled(
        self,
        read: Callable[[Tensor], Tensor],
        ids_BCL: Tensor,
        nodes_BCX: Tensor,
        legal: Children | None,
    ) -> Tensor:
        """log P of every candidate's id [B, C]."""
        num_events, _, length = ids_BCL.shape
        at_once = max(1, LOGITS_AT_ONCE // (num_events * length * self.backbone.vocab_size))
        parts = []
        for part_BcL, nodes_BcX in zip(ids_BCL.split(at_once, 1), nodes_BCX.split(at_once, 1), strict=True):
            logits = self.backbone.token_logits(read(part_BcL[..., :-1]))
            parts.append(token_log_probs(logits, part_BcL, nodes_BcX, legal).sum(-1))
        return torch.cat(parts, 1).clamp(min=UNREACHED + 1)

    def _ids(self) -> tuple[Tensor, Tensor, Children | None]:
        """Ids without the columns that no id uses [I, L], their trie [I, L + 1], and with legal_only its
        children: made at the first use, when the weights are there."""
        if self._spelling is None or self._spelling[0].device != self.ids.device:
            ids_IL = self.ids[:, : int(id_lengths(self.ids).max())]
            nodes_XI = trie_nodes(ids_IL)
            legal = Children.of(ids_IL, nodes_XI) if self.settings.legal_only else None
            self._spelling = ids_IL, nodes_XI.T.contiguous(), legal
        return self._spelling

    def probability(self, scores: Tensor) -> Tensor:
        """Of the id (length_penalty=0), or of a token of it on average (1)."""
        return scores.exp()

    # ---- prompt --------------------------------------------------------------------------------------------

    def _prompt(self, batch: Batch, wording: int) -> Prompt:
        """The ids of the history, a comma behind each; what the recommender is asked."""
        history_BN = history_ids(batch, self.settings.history, self.world.data.history_max)
        known_BN = history_BN != 0
        ids_BNL = self._ids()[0][(history_BN - 1).clamp(min=0)]
        if self.settings.stage == "generator" and self.training:
            vectors_BNLD, mask_BNL = self._soft_ids((history_BN - 1).clamp(min=0))
        else:
            vectors_BNLD, mask_BNL = self.backbone.embed(ids_BNL, sparse=False), ids_BNL != 0
        comma_D = self.backbone.embed(self.get_buffer("text_between"), sparse=False)
        commas = comma_D.expand(*known_BN.shape, -1, -1)
        vectors = torch.cat([vectors_BNLD, commas.to(vectors_BNLD.dtype)], 2)
        mask = torch.cat([mask_BNL, mask_BNL.new_ones(commas.shape[:3])], 2) & known_BN[..., None]
        intro = self.backbone.embed(self.get_buffer("text_intro"), sparse=False)
        intro_BSD = intro.expand(len(history_BN), -1, -1).to(vectors.dtype)
        parts = [(intro_BSD, mask.new_ones(intro_BSD.shape[:2])), (vectors.flatten(1, 2), mask.flatten(1))]
        ask = self.backbone.embed(self.get_buffer(f"text_ask_{wording}"), sparse=False)
        own = ask.to(vectors.dtype).expand(len(history_BN), 1, -1, -1)
        return Prompt(own, *packed(parts))

    def _soft_ids(self, items_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_v p_v emb_v of each token that the generator would write, with gradients to the generator:
        [B, N, L, D]; 0 for punctuation, masked from the end on [B, N, L]."""
        generator, items_M = self.generator, items_BN.flatten()
        assert generator is not None
        stops, length = self.get_buffer("text_stops"), self.settings.id_tokens
        with torch.no_grad():
            tokens_M1L = diverse_greedy(self._generates(items_M), len(items_M), 1, 0.0, length, stops)
        # read at once: the probabilities of the greedy search, but for dropout
        logits_MLV = generator.token_logits(self._reads_text(items_M)(tokens_M1L[..., :-1])[:, 0])
        table_VD = self.backbone.embedding_weight()
        soft_MLD = logits_MLV.softmax(-1)[..., : len(table_VD)] @ table_VD.float()
        is_mark_ML = torch.isin(tokens_M1L[:, 0], self.get_buffer("text_marks"))
        soft_MLD = soft_MLD * ~is_mark_ML[..., None]
        shape = items_BN.shape
        return soft_MLD.unflatten(0, shape), (tokens_M1L[:, 0] != PAD).unflatten(0, shape)

    # ---- called by the trainer, registry and service -------------------------------------------------------

    def save_extra(self, folder: Path) -> None:
        super().save_extra(folder)
        if self.generator is not None:
            self.generator.base.config.save_pretrained(folder / "generator")

    def saved_names(self) -> set[str]:
        """Each tied tensor once."""
        return {name for name, _ in self.named_parameters()} | {"ids"}


def _is_punctuation(token: str) -> bool:
    bare = token.strip("▁Ġ ")  # marks of a word's beginning
    return bool(bare) and all(sign in string.punctuation for sign in bare)


MODEL = IdGenRec
