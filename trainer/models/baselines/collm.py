"""CoLLM: collaborative vectors as tokens of a language model (Zhang et al., "CoLLM: Integrating Collaborative
Embeddings into Large Language Models for Recommendation", TKDE 2025; arXiv 2310.19488).

    prompt  titles of the user's liked items, ⟨user⟩; the candidate's title, ⟨item⟩; answer with Yes or No
    token   W₂ relu(W₁ e), K → 10 K → D, one map for the vectors of users and of items (its Eq. 3)
    s = logit of "Yes" at the answer (of it alone),   loss = binary cross-entropy of s over the candidates

Two stages, two runs: model.stage=text trains the language model (its adapters, where model.lora.rank > 0) on
prompts without the two tokens; model.stage=map, begun with run.init_from=RUN of the first, trains the map
alone, or with model.joint both. The CF model is never trained: LightGCN's table. Seq2seq backbones answer at
the first decoder step.

Differs from the published code: our backbones for Vicuna-7B; titles are cut at data.history_tokens and
data.item_tokens; training events read the CF table without their own click (cf_holdout); the user's vector is
the mean of the history's by default, which such a table has for every event (user=table: LightGCN's own,
which has seen the click that is asked for in training); the newest clicks of data.history_max are "liked", of
both tasks. Items without text are their token alone. Recommendation only. Shapes: B events, C candidates, N
history, K CF width, D backbone width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards import settings as s
from data_shards.schema import REC
from trainer.batch import Batch, rows_of
from trainer.config import CfSettings
from trainer.models.backbones.backbone import Prompt, packed
from trainer.models.backbones.cost import prompts_cost
from trainer.models.backbones.language import answer_tokens, language_model
from trainer.models.backbones.ranker import AdapterRanker
from trainer.models.backbones.settings import AdapterSettings
from trainer.models.cf_view import cf_view, held_out_cf
from trainer.models.contract import Cost, View, World
from trainer.models.layers.attention import masked_mean
from trainer.models.layers.history import HistoryKind, kept_slots

# a small tokenizer makes several tokens of a word: these texts are three quarters of the paper's prompt
WORDINGS = {
    "paper": {
        "liked": "A user has liked these items:",
        "user": ". The user's taste:",
        "candidate": ". Will the user like the item",
        "item": "with the feature",
        "question": "? Answer with Yes or No.",
    },
    "compact": {"liked": "Recommend", "user": ",", "candidate": "item", "item": ",", "question": "?"},
}
# tokens of these texts and of the soft one: what candidates share, a candidate's own (Scientific's tokenizer)
TEXT_TOKENS = {"paper": (20, 23), "compact": (3, 4)}
WIDER = 10  # the map's inner width, in widths of a CF vector


@s.settings
class CollmSettings(AdapterSettings, CfSettings):
    name: Literal["collm"] = "collm"
    """collaborative vectors as soft tokens"""
    stage: Literal["text", "map"] = "text"
    """text: train the language model on titles. map: train the map of CF vectors; begin it with
    run.init_from"""
    joint: bool = False
    """stage map trains the language model (its adapters), too: one from scratch has little to keep"""
    prompt: Literal["paper", "compact"] = "paper"
    """wording; compact has a word or a sign for a sentence"""
    user: Literal["history", "table"] = "history"
    """the user's vector: mean of the history's items, or the CF table's own"""
    history: HistoryKind = "all"
    """clicks that are read: all, or those of recommendations only"""


class Collm(AdapterRanker):
    Settings = CollmSettings
    title = "CoLLM"
    tasks = (REC,)
    needs = frozenset({"cf", "cf_users", "item_text"})
    settings: CollmSettings

    def __init__(self, settings: CollmSettings, world: World) -> None:
        super().__init__(settings, world)
        self.backbone = language_model(settings, world, settings.lora)
        cf_width = world.tables.cf.shape[1]
        self.map = nn.Sequential(
            nn.Linear(cf_width, WIDER * cf_width),
            nn.ReLU(),
            nn.Linear(WIDER * cf_width, self.backbone.width),
        )
        # a frozen backbone that can be loaded by name stays out of RUN/model; its adapters do not
        out = self.keeps_adapters_only
        self._saved = {name for name, p in self.named_parameters() if p.requires_grad or not out}
        if settings.stage == "text":
            self.map.requires_grad_(False)
        elif not settings.joint:
            self.backbone.requires_grad_(False)
        if world.tokenizer is not None:
            tokenizer = world.tokenizer()
            for name, text in WORDINGS[settings.prompt].items():
                self._constant(f"text_{name}", tokenizer(text, add_special_tokens=False)["input_ids"])
            self._constant("text_yes", answer_tokens(tokenizer)[:1])

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses_BC = F.binary_cross_entropy_with_logits(self.score(batch), batch.labels, reduction="none")
        return losses_BC.mean(), {}

    def score(self, batch: Batch) -> Tensor:
        self.check_history(batch, reads_users=self.settings.user == "table" and self._reads_cf)
        logits_BC1 = self.backbone.answer_logits(self._prompt(batch), self.get_buffer("text_yes"))
        return logits_BC1[..., 0]

    def views(self) -> dict[str, View]:
        """One prompt an item costs too much for a whole catalogue: LightGCN's vectors choose the items."""
        return {"cf": cf_view(self, {REC: 1.0})}

    @classmethod
    def stages(cls) -> tuple[tuple[str, ...], ...]:
        return (("model.stage=text",), ("model.stage=map",))

    @classmethod
    def retrieves(cls) -> bool:
        """LightGCN's vectors are not its answer: take a run of lightgcn."""
        return False

    @property
    def _reads_cf(self) -> bool:
        return self.settings.stage == "map"

    # ---- prompt --------------------------------------------------------------------------------------------

    def _prompt(self, batch: Batch) -> Prompt:
        """What candidates share: the history's titles and the user's token. A candidate's own: its title and
        token, the question."""
        kept_BN = kept_slots(batch, self.settings.history)
        num_events, num_candidates = batch.candidates.shape
        tokens_BNL = rows_of(self.tables.item_tokens, batch.history_items)
        tokens_BNL = tokens_BNL[..., : self.world.data.history_tokens] * kept_BN[..., None]
        titles_BS = tokens_BNL.flatten(1)
        shared = [self._text("liked", num_events), (self._embed(titles_BS), titles_BS != 0)]
        own_BCL = rows_of(self.tables.item_tokens, batch.candidates)[..., : self.world.data.item_tokens]
        own_ML = own_BCL.flatten(0, 1)
        num_prompts = len(own_ML)
        own = [self._text("candidate", num_prompts), (self._embed(own_ML), own_ML != 0)]
        if self._reads_cf:
            item_BCD = self.map(held_out_cf(self, batch.candidates, batch.fold))
            shared += [self._text("user", num_events), _soft(self.map(self._user(batch, kept_BN)))]
            own += [self._text("item", num_prompts), _soft(item_BCD.flatten(0, 1))]
        shared_BPD, shared_mask_BP = packed(shared)
        # its padding stands before the question: the answer is read behind a real token
        own_MSD, own_mask_MS = packed(own)
        question_MSD, question_mask_MS = self._text("question", num_prompts)
        own_MSD = torch.cat([own_MSD, question_MSD.to(own_MSD.dtype)], 1)
        own_mask_MS = torch.cat([own_mask_MS, question_mask_MS], 1)
        shape = (num_events, num_candidates)
        return Prompt(
            own_MSD.unflatten(0, shape), shared_BPD, shared_mask_BP, own_mask_MS.unflatten(0, shape)
        )

    def _text(self, name: str, rows: int) -> tuple[Tensor, Tensor]:
        tokens = self.get_buffer(f"text_{name}").expand(rows, -1)
        return self._embed(tokens), torch.ones_like(tokens, dtype=torch.bool)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.backbone.embed(tokens, sparse=False)

    def _user(self, batch: Batch, kept_BN: Tensor) -> Tensor:
        """[B, K]; 0 without a history."""
        if self.settings.user == "table":
            return self.tables.cf_users[batch.user]
        return masked_mean(held_out_cf(self, batch.history_items, batch.fold), kept_BN)

    # ---- called by the trainer, registry and service -------------------------------------------------------

    def cost(self) -> Cost:
        """Of full histories and titles: most are as long as they may be."""
        data, (shared, own) = self.world.data, TEXT_TOKENS[self.settings.prompt]
        shared += data.history_max * data.history_tokens
        own += data.item_tokens
        num_prompts = 1 + data.num_negatives
        times_shared = 1 if self.backbone.shared_first else num_prompts
        return prompts_cost(self, own * num_prompts + shared * times_shared)

    def saved_names(self) -> set[str]:
        return self._saved


def _soft(vectors_MD: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row."""
    return vectors_MD[:, None], vectors_MD.new_ones((len(vectors_MD), 1), dtype=torch.bool)


MODEL = Collm
