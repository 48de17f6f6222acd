"""GenSR: the generative model of unified search and recommendation (paper section 4). README.md maps
equations to functions.

Letters: B events, N history, C candidates, L tokens, S prompt length, D backbone width, K CF width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from data_shards.schema import SRC
from trainer.batch import Batch, Group, ItemTables, rows_of
from trainer.models.backbones.backbone import Backbone, Prompt
from trainer.models.gensr.grouping import group_events, in_one_pass
from trainer.models.gensr.history import HistoryEncoder, SoftFilter
from trainer.models.gensr.prompt import Template
from trainer.models.losses import Gather, answer_loss, contrastive_loss, listwise_loss


@dataclass(frozen=True)
class GenSRSettings:
    """All numbers that shape a GenSR, saved with its weights (RUN/model/gensr.json)."""

    variant: str
    prompt: str
    cf_dim: int
    num_heads: int
    dropout: float
    history_max: int
    history_tokens: int
    item_tokens: int
    num_words: int
    words_dim: int
    temperature: float
    contrastive_weight: float
    listwise_weight: float
    weight_rec: float
    weight_src: float


def match_projection(view_width: int, width: int) -> nn.Linear:
    """W of a product slot W(a ⊙ b). Σ(a ⊙ b), the inner product of the two, starts out visible: as one random
    direction of the slot."""
    linear = nn.Linear(view_width, width)
    with torch.no_grad():
        linear.weight.add_(torch.randn(width, 1) / view_width**0.5)
    return linear


@dataclass(frozen=True)
class EncodedHistory:
    """What an event's history gives whatever the candidate: encoded once, then filtered by each candidate."""

    cf_BNK: Tensor
    sem_BND: Tensor
    mask_BN: Tensor

    def rows(self, start: int, stop: int) -> "EncodedHistory":
        return EncodedHistory(self.cf_BNK[start:stop], self.sem_BND[start:stop], self.mask_BN[start:stop])


class GenSR(nn.Module):
    """score(batch) → log-odds of "Yes" for every candidate; forward(batch) → (loss, report).

    `tables` are frozen and live outside the module tree: never trained, sharded or saved with the weights.
    """

    def __init__(
        self,
        settings: GenSRSettings,
        backbone: Backbone,
        templates: dict[int, Template],
        answers: tuple[int, int],
        tables: ItemTables,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = backbone
        self.answers = answers  # token ids of ("Yes", "No")
        self._tables = [tables]  # a list hides it from nn.Module
        self.gather: Gather | None = None  # set by the trainer for contrastive negatives across ranks
        # set by the trainer for several processes: under ZeRO-3 all must call the backbone equally often
        self.same_calls_every_step = False
        width, cf_width = backbone.width, settings.cf_dim
        extended = settings.variant == "extended"
        self.cf_encoder = HistoryEncoder(
            cf_width, settings.num_heads, settings.dropout, settings.history_max, ordered=extended
        )
        self.sem_encoder = HistoryEncoder(
            width, settings.num_heads, settings.dropout, settings.history_max, ordered=extended
        )
        self.cf_filter = SoftFilter(cf_width, settings.num_heads)
        self.sem_filter = SoftFilter(width, settings.num_heads)
        self.cf_projection = nn.Linear(cf_width, width)  # d_c → d_m, for both CF slots
        if settings.num_words:
            self.words = nn.EmbeddingBag(
                settings.num_words + 1, settings.words_dim, mode="mean", padding_idx=0
            )
            self.words_projection = nn.Linear(settings.words_dim, width, bias=False)
            nn.init.normal_(self.words.weight, std=settings.words_dim**-0.5)
        if extended:
            self.match_cf = match_projection(cf_width, width)
            self.match_sem = match_projection(width, width)
            self.match_query = match_projection(width, width)
            self.no_query = nn.Parameter(torch.zeros(width))
        # of encoders, without query
        self.template_length = max((len(template.token_ids) for template in templates.values()), default=0)
        self._constant("answer_tokens", answers)
        for task, template in templates.items():
            self._constant(f"template_{task}", template.token_ids)
            self._constant(f"shared_{task}", template.shared_ids)
            self._constant(f"slots_{task}", template.slot_positions)

    def _constant(self, name: str, numbers: Iterable[int]) -> None:
        """Numbers that lie on the device: a list in an index would be copied there, and waited for, in every
        step."""
        self.register_buffer(name, torch.tensor(list(numbers), dtype=torch.int64), persistent=False)

    @property
    def tables(self) -> ItemTables:
        return self._tables[0]

    def set_tables(self, tables: ItemTables) -> None:
        self._tables[0] = tables

    # ---- public --------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, mode: str = "loss") -> Any:
        """mode "loss": (loss, report of detached scalars), Eq. 8. mode "score": scores_BC. One entry, because
        wrappers (DDP, ZeRO) hook forward only."""
        if mode == "score":
            return self.score(batch)
        history = self.encode_history(batch)
        scores_BC, cf_BCD, sem_BCD = self._score_encoded(batch, history)
        settings = self.settings
        weights_B = torch.where(batch.task == SRC, settings.weight_src, settings.weight_rec).float()
        answer = answer_loss(scores_BC, batch.labels, weights_B)
        loss = answer
        report = {"answer_loss": answer.detach()}
        if settings.listwise_weight:
            listwise = listwise_loss(scores_BC, batch.labels, weights_B)
            loss = loss + settings.listwise_weight * listwise
            report["listwise_loss"] = listwise.detach()
        if settings.contrastive_weight:
            positive = batch.labels.argmax(1)[:, None, None].expand(-1, 1, cf_BCD.shape[2])
            contrast = contrastive_loss(
                cf_BCD.gather(1, positive)[:, 0],
                sem_BCD.gather(1, positive)[:, 0],
                batch.user,
                settings.temperature,
                self.gather,
            )
            loss = loss + settings.contrastive_weight * contrast
            report["contrastive_loss"] = contrast.detach()
        report["loss"] = loss.detach()
        return loss, report

    def score(self, batch: Batch) -> Tensor:
        """Log-odds of "Yes", [B, C] float32. Independent of the other candidates and of the other rows of the
        batch."""
        return self._score_encoded(batch, self.encode_history(batch))[0]

    def grouped(self, batch: Batch) -> Batch:
        """The batch with its groups. To be asked while the batch is on the CPU: later, the device is waited
        for."""
        if batch.groups is not None:
            return batch
        query = batch.query.cpu()
        lengths = torch.where(query >= 0, self.tables.query_lengths[query.clamp(min=0)], 0)
        groups = group_events(
            batch.task.cpu(), lengths, batch.candidates.shape[1], self._on_cpu, self.same_calls_every_step
        )
        return replace(
            batch, groups=tuple(replace(group, rows=group.rows.to(batch.query.device)) for group in groups)
        )

    @property
    def _on_cpu(self) -> bool:
        """Where the model computes; a batch may still be on its way there."""
        return self.tables.cf.device.type == "cpu"

    def encode_history(self, batch: Batch) -> EncodedHistory:
        """Eqs. 3 and 4, once per event."""
        cf_BNK = self.cf_vectors(batch.history_items, batch.fold)
        sem_BND = self.semantic_vectors(batch.history_items, self.settings.history_tokens)
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

    # ---- item and query vectors ----------------------------------------------------------------------------

    def cf_vectors(self, items: Tensor, fold_B: Tensor) -> Tensor:
        """E_c of items [B, X] → [B, X, K], each event from the table that did not see its own click (fold −1:
        the full table)."""
        tables = self.tables
        if tables.cf_folds.shape[0] == 0 or not self.training:
            vectors = tables.cf[items]
        else:
            held_out = tables.cf_folds[fold_B.clamp(min=0)[:, None], items]
            vectors = torch.where((fold_B >= 0)[:, None, None], held_out, tables.cf[items])
        return vectors.to(self.cf_projection.weight.dtype)

    def semantic_vectors(self, items: Tensor, num_tokens: int) -> Tensor:
        """E_s of items (any shape) → [..., D]: mean of the backbone's token embeddings over the item's text,
        padding excluded, plus its words."""
        tables = self.tables
        vectors = self.backbone.embed_mean(rows_of(tables.item_tokens, items)[..., :num_tokens])
        if self.settings.num_words:
            vectors = vectors + self._mean_words(rows_of(tables.item_words, items))
        return vectors

    def query_parts(self, query_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query vectors as they stand in the prompt [B, Q, D], their mask [B, Q], and the query as one vector
        [B, D] (mean; 0 without query)."""
        tables = self.tables
        rows = query_B.clamp(min=0)
        has_query = (query_B >= 0)[:, None]
        if self.settings.num_words:
            words_BQ = tables.query_words[rows]
            mask_BQ = (words_BQ != 0) & has_query
            vectors_BQD = self.words_projection(nn.functional.embedding(words_BQ.long(), self.words.weight))
        else:
            tokens_BQ = tables.query_tokens[rows]
            mask_BQ = (tokens_BQ != 0) & has_query
            vectors_BQD = self.backbone.embed(tokens_BQ)
        masked_BQD = vectors_BQD * mask_BQ[..., None]
        return masked_BQD, mask_BQ, masked_BQD.sum(1) / mask_BQ.sum(1, keepdim=True).clamp(min=1)

    def _mean_words(self, words: Tensor) -> Tensor:
        return self.words_projection(self.words(words.reshape(-1, words.shape[-1]).long())).view(
            *words.shape[:-1], -1
        )

    # ---- prompt --------------------------------------------------------------------------------------------

    def _score_encoded(self, batch: Batch, history: EncodedHistory) -> tuple[Tensor, Tensor, Tensor]:
        """→ scores_BC, and the two filtered views in the backbone's space, [B, C, D] each (for Eq. 10)."""
        cand_cf_BCK = self.cf_vectors(batch.candidates, batch.fold)
        cand_sem_BCD = self.semantic_vectors(batch.candidates, self.settings.item_tokens)
        f_c_BCK, f_s_BCD = self.soft_filter(history, cand_cf_BCK, cand_sem_BCD)
        f_c_BCD = self.cf_projection(f_c_BCK)
        slots = [f_c_BCD, f_s_BCD, self.cf_projection(cand_cf_BCK), cand_sem_BCD]
        query_BQD, query_mask_BQ, query_BD = self.query_parts(batch.query)
        if self.settings.variant == "extended":
            match_query = self.match_query(query_BD[:, None] * cand_sem_BCD)
            match_query = torch.where(
                (batch.query >= 0)[:, None, None], match_query, self.no_query.to(match_query.dtype)
            )
            slots += [
                self.match_cf(f_c_BCK * cand_cf_BCK),
                self.match_sem(f_s_BCD * cand_sem_BCD),
                match_query,
            ]
        slots_BCXD = torch.stack(slots, 2)
        scores_BC = slots_BCXD.new_zeros(slots_BCXD.shape[:2], dtype=torch.float32)
        groups = self.grouped(batch).groups or ()
        parts = (slots_BCXD, query_BQD, query_mask_BQ)
        prompts = (
            self.fill_prompt(group, *(part_B.index_select(0, group.rows) for part_B in parts))
            for group in groups
        )
        one_pass = in_one_pass(batch.candidates.numel(), self.template_length, self._on_cpu)
        answered = self.backbone.answer_groups(prompts, self.get_buffer("answer_tokens"), one_pass)
        for group, logits_GCA in zip(groups, answered, strict=True):
            scores_BC = scores_BC.index_add(
                0, group.rows, (logits_GCA[..., 0] - logits_GCA[..., 1]) * group.counts
            )
        return scores_BC, f_c_BCD, f_s_BCD

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
