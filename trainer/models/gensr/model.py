"""GenSR: the generative model of unified search and recommendation (paper section 4). README.md maps
equations to functions.

Letters: B events, N history, C candidates, L tokens, S prompt length, D backbone width, K CF width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.batch import Batch, Group, rows_of
from trainer.errors import ConfigError
from trainer.models.backbones.backbone import Prompt
from trainer.models.backbones.language import answer_tokens, is_pretrained, language_model
from trainer.models.backbones.ranker import AdapterRanker
from trainer.models.cf_view import held_out_cf
from trainer.models.contract import Cost, PreRanking, View, World, clicked_only
from trainer.models.gensr.cost import gensr_cost
from trainer.models.gensr.evidence import Evidence, EvidenceHead, Seen
from trainer.models.gensr.grouping import group_events, in_one_pass
from trainer.models.gensr.history import HistoryEncoder, MeanFilter, SoftFilter
from trainer.models.gensr.mining import Mine, log_proposal, mined, open_mine
from trainer.models.gensr.prompt import (
    NUM_EVIDENCE_SLOTS,
    NUM_EXTENDED_SLOTS,
    NUM_PAPER_SLOTS,
    build_templates,
)
from trainer.models.gensr.settings import GenSRSettings
from trainer.models.gensr.views import gensr_pre_ranking, gensr_views
from trainer.models.layers.attention import check_heads
from trainer.models.losses import answer_loss, contrastive_loss, listwise_loss

SLOT_VIEWS = ("cf", "semantic", "cf", "semantic", "cf", "semantic", "semantic")  # what each slot holds


def match_projection(view_width: int, width: int) -> nn.Linear:
    """W of a product slot W(a ⊙ b). Σ(a ⊙ b), the inner product of the two, starts out visible: as one random
    direction of the slot."""
    linear = nn.Linear(view_width, width)
    with torch.no_grad():
        linear.weight.add_(torch.randn(width, 1) / view_width**0.5)
    return linear


@dataclass(frozen=True)
class EncodedHistory:
    """What an event's history gives, whatever the candidate: encoded once, then filtered by each."""

    cf_BNK: Tensor
    sem_BND: Tensor
    mask_BN: Tensor


@dataclass(frozen=True)
class PromptParts:
    """What goes into the prompts of all candidates."""

    slots_BCXD: Tensor  # both filtered views and both views of the item first
    cf_BCD: Tensor  # f_c and f_s in the backbone's space, for Eq. 10
    sem_BCD: Tensor
    query_BQD: Tensor  # query_parts()
    query_mask_BQ: Tensor
    query_BD: Tensor
    beside_BC: Tensor | float = 0.0  # what evidence adds to the scores

    def of(self, rows_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What fill_prompt() takes of the events of a group."""
        parts = (self.slots_BCXD, self.query_BQD, self.query_mask_BQ)
        slots, query, mask = (part_B.index_select(0, rows_G) for part_B in parts)
        return slots, query, mask


class GenSR(AdapterRanker):
    """score(batch) → log-odds of "Yes" for every candidate; loss(batch) → Eq. 8."""

    Settings = GenSRSettings
    title = "GenSR"
    needs = frozenset({"cf", "item_text"})
    in_batch = True  # Eq. 10; among ranks with model.gather_negatives
    settings: GenSRSettings

    def __init__(self, settings: GenSRSettings, world: World) -> None:
        super().__init__(settings, world)
        data, cf_width = world.data, world.tables.cf.shape[1]
        self.backbone = language_model(settings, world, settings.lora)
        if settings.compile and world.is_new:
            self.backbone.compile_layers()
        width, extended = self.backbone.width, settings.variant == "extended"
        self.scaled = is_pretrained(settings.backbone)
        if self.scaled:
            self.register_buffer("token_scale", self._token_scale())
        check_heads(f"the CF table's width {cf_width} (cf.dim)", cf_width, settings.num_heads)
        check_heads(f"the width {width} of model.backbone={settings.backbone}", width, settings.num_heads)
        encoder = (settings.num_heads, settings.dropout, data.history_max)
        self.cf_encoder = HistoryEncoder(cf_width, *encoder, ordered=extended)
        self.sem_encoder = HistoryEncoder(width, *encoder, ordered=extended)
        self.cf_filter, self.sem_filter = (
            SoftFilter(size, settings.num_heads) if settings.soft_filter else MeanFilter(size)
            for size in (cf_width, width)
        )
        self.cf_projection = nn.Linear(cf_width, width)  # d_c → d_m, for both CF slots
        if world.num_words:
            self.words = nn.EmbeddingBag(world.num_words + 1, settings.words_dim, mode="mean", padding_idx=0)
            self.words_projection = nn.Linear(settings.words_dim, width, bias=False)
            # a pretrained backbone reads words beside its own tokens: of like size, in units of token_scale
            nn.init.normal_(self.words.weight, std=1.0 if self.scaled else settings.words_dim**-0.5)
        if extended:
            self.match_cf = match_projection(cf_width, width)
            self.match_sem = match_projection(width, width)
            self.match_query = match_projection(width, width)
            self.no_query = nn.Parameter(torch.zeros(width))
        self.reads_evidence = extended and settings.evidence
        self.evidence: Evidence | None = None
        if settings.mined_negatives >= data.num_negatives:
            raise ConfigError(
                f"model.mined_negatives={settings.mined_negatives} must be less than data.num_negatives="
                f"{data.num_negatives}: the others are uniform. Raise data.num_negatives"
            )
        if self.reads_evidence or settings.mined_negatives:
            counted = (settings.evidence_categories, settings.evidence_queries)
            self.evidence = Evidence(settings.num_neighbours, world, *counted)
        if self.reads_evidence:
            self.evidence_head = EvidenceHead(width, *counted)
        self._mine: list[Mine] = []  # opened by the first training step; a list hides tensors from nn.Module
        self.answers: tuple[int, int] = (-1, -1)
        self._set_prompts()

    def _token_scale(self) -> Tensor:
        """RMS of the backbone's token vectors as pretrained (flan-t5-base's is about 12, SmolLM2's 0.1).

        GenSR computes in units of it, and multiplies its slots by it: each backbone reads vectors of its own
        size. From scratch the unit is 1. Saved with the weights."""
        if not self.world.is_new:
            return torch.ones(())
        return self.backbone.embedding_weight().detach().float().square().mean().sqrt()

    def _set_prompts(self) -> None:
        """Templates of both tasks and the answers as constants; none where only sizes are asked for."""
        templates = {}
        if self.world.tokenizer is not None:
            tokenizer = self.world.tokenizer()
            num_slots = NUM_EXTENDED_SLOTS if self.settings.variant == "extended" else NUM_PAPER_SLOTS
            num_slots = NUM_EVIDENCE_SLOTS if self.reads_evidence else num_slots
            templates = build_templates(
                lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
                self.settings.prompt,
                num_slots,
                self.backbone.shared_first,
            )
            self.answers = answer_tokens(tokenizer)  # token ids of ("Yes", "No")
            self._constant("answer_tokens", self.answers)
        # tokens of the longest, of encoders without the query
        self.template_length = max((len(template.token_ids) for template in templates.values()), default=0)
        for task, template in templates.items():
            self._constant(f"template_{task}", template.token_ids)
            self._constant(f"shared_{task}", template.shared_ids)
            self._constant(f"slots_{task}", template.slot_positions)

    # ---- public --------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 8 and its terms."""
        batch = self._with_mined(batch)
        seen = self.seen(batch, own=True)
        scores_BC, cf_BCD, sem_BCD = self._scored(batch, seen)
        scores_BC = scores_BC - self._drawn_more_often(batch, seen)
        settings, weights_B = self.settings, self.event_weights(batch)
        answer = answer_loss(scores_BC, batch.labels, weights_B)
        loss = answer
        report = {"answer_loss": answer.detach()}
        if settings.listwise_weight:
            listwise = listwise_loss(scores_BC, batch.labels, weights_B)
            loss = loss + settings.listwise_weight * listwise
            report["listwise_loss"] = listwise.detach()
        if settings.contrastive_weight and settings.views == "both":
            positive = batch.labels.argmax(1)[:, None, None].expand(-1, 1, cf_BCD.shape[2])
            contrast = contrastive_loss(
                cf_BCD.gather(1, positive)[:, 0],
                sem_BCD.gather(1, positive)[:, 0],
                batch.user,
                settings.temperature,
                self.world.ranks.gather if settings.gather_negatives else None,
                batch.history_mask.any(1),
            )
            loss = loss + settings.contrastive_weight * contrast
            report["contrastive_loss"] = contrast.detach()
        return loss, report

    def score(self, batch: Batch) -> Tensor:
        """Log-odds of "Yes", [B, C] float32. Independent of the other candidates and of the other rows of the
        batch."""
        return self._scored(batch, self.seen(batch))[0]

    def prepare(self, batch: Batch) -> Batch:
        """The batch with its groups. Call it while the batch is on the CPU: later, it would wait for the
        device."""
        if batch.groups is not None:
            return batch
        query = batch.query.cpu()
        lengths = torch.where(query >= 0, self.tables.query_lengths[query.clamp(min=0)], 0)
        # under ZeRO-3 all ranks must call the backbone equally often
        same_calls = self.world.ranks.size > 1
        groups = group_events(batch.task.cpu(), lengths, batch.candidates.shape[1], self._on_cpu, same_calls)
        return replace(
            batch, groups=tuple(replace(group, rows=group.rows.to(batch.query.device)) for group in groups)
        )

    @property
    def _on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def encode_history(self, batch: Batch) -> EncodedHistory:
        """Eqs. 3 and 4, once per event."""
        cf_BNK = self.cf_vectors(batch.history_items, batch.fold)
        sem_BND = self.semantic_vectors(batch.history_items, self.world.data.history_tokens)
        mask = batch.history_mask
        return EncodedHistory(
            self.cf_encoder(cf_BNK, batch.history_tasks, mask),
            self.sem_encoder(sem_BND, batch.history_tasks, mask),
            mask,
        )

    def soft_filter(
        self, history: EncodedHistory, cand_cf_BCK: Tensor, cand_sem_BCD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Eqs. 5 and 6 on both sides → f_c [B, C, K] and f_s [B, C, D]."""
        return self.cf_filter(cand_cf_BCK, history.cf_BNK, history.mask_BN), self.sem_filter(
            cand_sem_BCD, history.sem_BND, history.mask_BN
        )

    # ---- evidence and mined negatives ----------------------------------------------------------------------

    def fit(self) -> None:
        if self.evidence is not None:
            self.evidence.fit(self.world)

    def seen(self, batch: Batch, own: bool = False) -> Seen | None:
        """What counting knows; None for a model that does not read it. own: the batch is of training events,
        whose clicks have been counted."""
        if self.evidence is None or not self.reads_evidence:
            return None
        cf_BNK, cf_BCK = (
            self.cf_vectors(items, batch.fold) for items in (batch.history_items, batch.candidates)
        )
        seen: Seen = self.evidence(batch, self.tables, cf_BNK, cf_BCK, own)
        return seen

    def _with_mined(self, batch: Batch) -> Batch:
        """Groups stay: they do not depend on the candidates."""
        count = self.settings.mined_negatives
        if not count or self.evidence is None:
            return batch
        if not self._mine:
            self._mine.append(open_mine(self.world, self.evidence))
        return mined(batch, count, self.evidence, self._mine[0], self.tables)

    def _drawn_more_often(self, batch: Batch, seen: Seen | None) -> Tensor | float:
        """What to subtract from the scores of candidates that mining draws more often than chance, [B, C]."""
        if not self._mine or self.evidence is None:
            return 0.0
        drawn = seen or self.evidence.drawn(batch, self.tables, own=True)
        share = self.settings.mined_negatives / max(batch.candidates.shape[1] - 1, 1)
        return log_proposal(batch, drawn, share, self.evidence, self._mine[0], self.tables)

    # ---- item and query vectors ----------------------------------------------------------------------------

    def cf_vectors(self, items: Tensor, fold_B: Tensor) -> Tensor:
        """E_c of items [B, X] → [B, X, K]."""
        return held_out_cf(self, items, fold_B).to(self.cf_projection.weight.dtype)

    def semantic_vectors(self, items: Tensor, num_tokens: int) -> Tensor:
        """E_s of items (any shape) → [..., D], in units of the backbone's token vectors: mean of its token
        embeddings over the item's text, padding excluded, plus the item's words."""
        tables = self.tables
        vectors = self._in_units(
            self.backbone.embed_mean(rows_of(tables.item_tokens, items)[..., :num_tokens])
        )
        if self.world.num_words:
            vectors = vectors + self._mean_words(rows_of(tables.item_words, items))
        return vectors

    def query_parts(self, query_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of the query [B, Q, D], in units of the backbone's token vectors, their mask [B, Q], and
        the query as one vector [B, D] (mean; 0 without query)."""
        tables = self.tables
        rows = query_B.clamp(min=0)
        has_query = (query_B >= 0)[:, None]
        if self.world.num_words:
            words_BQ = tables.query_words[rows]
            mask_BQ = (words_BQ != 0) & has_query
            vectors_BQD = self.words_projection(nn.functional.embedding(words_BQ.long(), self.words.weight))
        else:
            tokens_BQ = tables.query_tokens[rows]
            mask_BQ = (tokens_BQ != 0) & has_query
            vectors_BQD = self._in_units(self.backbone.embed(tokens_BQ))
        masked_BQD = vectors_BQD * mask_BQ[..., None]
        return masked_BQD, mask_BQ, masked_BQD.sum(1) / mask_BQ.sum(1, keepdim=True).clamp(min=1)

    def _in_units(self, token_vectors: Tensor) -> Tensor:
        return token_vectors / self.get_buffer("token_scale") if self.scaled else token_vectors

    def _to_read(self, vectors: Tensor) -> Tensor:
        """In the size of the backbone's token vectors."""
        return vectors * self.get_buffer("token_scale") if self.scaled else vectors

    def _mean_words(self, words: Tensor) -> Tensor:
        return self.words_projection(self.words(words.reshape(-1, words.shape[-1]).long())).view(
            *words.shape[:-1], -1
        )

    # ---- prompt --------------------------------------------------------------------------------------------

    def _scored(self, batch: Batch, seen: Seen | None) -> tuple[Tensor, Tensor, Tensor]:
        """→ scores_BC, and the two filtered views in the backbone's space, [B, C, D] each (for Eq. 10)."""
        parts = self._prompt_parts(batch, seen)
        scores_BC = parts.slots_BCXD.new_zeros(parts.slots_BCXD.shape[:2], dtype=torch.float32)
        groups = self.prepare(batch).groups or ()
        prompts: Iterable[Prompt] = (self.fill_prompt(group, *parts.of(group.rows)) for group in groups)
        if torch.is_grad_enabled():  # kept anyway; gradients add up in the order in which they are made
            prompts = list(prompts)
        one_pass = in_one_pass(batch.candidates.numel(), self.template_length, self._on_cpu)
        answered = self.backbone.answer_groups(prompts, self.get_buffer("answer_tokens"), one_pass)
        for group, logits_GCA in zip(groups, answered, strict=True):
            scores_BC = scores_BC.index_add(
                0, group.rows, (logits_GCA[..., 0] - logits_GCA[..., 1]) * group.counts
            )
        return scores_BC + parts.beside_BC, parts.cf_BCD, parts.sem_BCD

    def _prompt_parts(self, batch: Batch, seen: Seen | None) -> PromptParts:
        settings = self.settings
        history = self.encode_history(batch)
        cand_cf_BCK = self.cf_vectors(batch.candidates, batch.fold)
        cand_sem_BCD = self.semantic_vectors(batch.candidates, self.world.data.item_tokens)
        f_c_BCK, f_s_BCD = self.soft_filter(history, cand_cf_BCK, cand_sem_BCD)
        f_c_BCD = self.cf_projection(f_c_BCK)
        slots = [f_c_BCD, f_s_BCD, self.cf_projection(cand_cf_BCK), cand_sem_BCD]
        query_BQD, query_mask_BQ, query_BD = self.query_parts(batch.query)
        if settings.variant == "extended":
            match_query = self.match_query(query_BD[:, None] * cand_sem_BCD)
            match_query = torch.where(
                (batch.query >= 0)[:, None, None], match_query, self.no_query.to(match_query.dtype)
            )
            slots += [
                self.match_cf(f_c_BCK * cand_cf_BCK),
                self.match_sem(f_s_BCD * cand_sem_BCD),
                match_query,
            ]
        if settings.views != "both":  # times 0: every weight keeps a gradient
            slots = [slot * (view == settings.views) for slot, view in zip(slots, SLOT_VIEWS, strict=False)]
        beside_BC: Tensor | float = 0.0
        if seen is not None:
            evidence_BCD, beside_BC = self.evidence_head(seen.features_BCF, batch.task)
            slots.append(evidence_BCD.to(cand_sem_BCD.dtype))
        return PromptParts(
            self._to_read(torch.stack(slots, 2)),
            f_c_BCD,
            f_s_BCD,
            self._to_read(query_BQD),
            query_mask_BQ,
            query_BD,
            beside_BC,
        )

    def fill_prompt(
        self, group: Group, slots_BCXD: Tensor, query_BQD: Tensor, query_mask_BQ: Tensor
    ) -> Prompt:
        """Eq. 7 for the events of one group: text segments around slot vectors, and what the candidates
        share: (decoders) the task text, (search) the query.

        Padding stands behind the query only.
        """
        batch, num_candidates = slots_BCXD.shape[:2]
        dtype = slots_BCXD.dtype
        text_SD, shared_PD = (
            self.backbone.embed(self.get_buffer(f"{part}_{group.task}")).to(dtype)
            for part in ("template", "shared")
        )
        own_BCSD = text_SD.expand(batch, num_candidates, -1, -1).index_copy(
            2, self.get_buffer(f"slots_{group.task}"), slots_BCXD
        )
        shared_BPD = shared_PD.expand(batch, -1, -1)
        if not group.longest:
            return Prompt(own_BCSD, shared_BPD, None)
        mask_BP = query_mask_BQ.new_ones(shared_BPD.shape[:2])
        return Prompt(
            own_BCSD,
            torch.cat([shared_BPD, query_BQD[:, : group.longest].to(dtype)], 1),
            torch.cat([mask_BP, query_mask_BQ[:, : group.longest]], 1),
        )

    # ---- called by the trainer, registry and service -------------------------------------------------------

    def views(self) -> dict[str, View]:
        return gensr_views(self)

    @classmethod
    def retrieves(cls) -> bool:
        """Its views choose what the language model then ranks; they are not its answer."""
        return False

    def pre_ranking(self) -> PreRanking | None:
        return gensr_pre_ranking(self)

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 5's weights: what the two soft filters read of the history for each candidate; 0 without
        one."""
        history = self.encode_history(batch)
        real_B1N = batch.history_mask[:, None]
        cf_BCK = self.cf_vectors(batch.candidates, batch.fold)
        sem_BCD = self.semantic_vectors(batch.candidates, self.world.data.item_tokens)
        return {
            "cf": self.cf_filter.weights(cf_BCK, history.cf_BNK, history.mask_BN) * real_B1N,
            "semantic": self.sem_filter.weights(sem_BCD, history.sem_BND, history.mask_BN) * real_B1N,
        }

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        """history: the filtered views [f_c; f_s]. input: those, both views of the item, and the query.
        hidden: the backbone's output at the position that answers."""
        batch = clicked_only(batch)
        parts = self._prompt_parts(batch, self.seen(batch))
        hidden_BD = torch.zeros((batch.num_events, self.backbone.width), device=parts.slots_BCXD.device)
        for group in self.prepare(batch).groups or ():
            read = self.backbone.reader(self.fill_prompt(group, *parts.of(group.rows)))
            no_tokens = torch.zeros((len(group.rows), 1, 0), dtype=torch.int64, device=hidden_BD.device)
            hidden_BD = hidden_BD.index_add(0, group.rows, read(no_tokens)[:, 0, 0] * group.counts)
        paper_BXD = parts.slots_BCXD[:, 0, :NUM_PAPER_SLOTS]
        return {
            "history": paper_BXD[:, :2].flatten(1),
            "input": torch.cat([paper_BXD.flatten(1), parts.query_BD], 1),
            "hidden": hidden_BD,
        }

    def cost(self) -> Cost:
        return gensr_cost(self)

    def saved_names(self) -> set[str]:
        """Each tied tensor once; with LoRA no frozen weights, if they can be had again by name."""
        adapters = self.keeps_adapters_only
        counted = {
            name for name, _ in self.named_buffers() if name.startswith("evidence.") and "refused" not in name
        }
        names = {name for name, p in self.named_parameters() if p.requires_grad or not adapters}
        return names | counted | ({"token_scale"} if self.scaled else set())

    @classmethod
    def refusals(cls, settings: Any, zero_stage: int | None) -> list[str]:
        compiled = ["model.compile=true"] if settings.compile and zero_stage == 3 else []
        return compiled + super().refusals(settings, zero_stage)


MODEL = GenSR
