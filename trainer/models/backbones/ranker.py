"""What rankers that hold a language model share: constants of prompts, what is saved beside the weights, and
the life of adapters."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from trainer.models.backbones.adapters import merge_adapters
from trainer.models.backbones.backbone import Backbone
from trainer.models.backbones.frozen import save_frozen_identity
from trainer.models.backbones.language import adapters_only, answer_tokens, check_own_tokenizer
from trainer.models.backbones.settings import AdapterSettings, BackboneSettings
from trainer.models.contract import Ranker


class LanguageRanker(Ranker):
    """Required: `backbone`, made by language_model()."""

    settings: BackboneSettings
    backbone: Backbone

    def save_extra(self, folder: Path) -> None:
        self.backbone.base.config.save_pretrained(folder / "backbone")

    def _constant(self, name: str, numbers: Iterable[int]) -> None:
        """Numbers that lie on the device: a list in an index would be copied there, and waited for, in every
        step."""
        self.register_buffer(name, torch.tensor(list(numbers), dtype=torch.int64), persistent=False)


class AdapterRanker(LanguageRanker):
    """Answers Yes or No. With model.lora the backbone is frozen and adapters are trained."""

    settings: AdapterSettings

    @property
    def keeps_adapters_only(self) -> bool:
        """Whether RUN/model leaves the frozen backbone out."""
        return adapters_only(self.settings.backbone, self.settings.lora)

    def save_extra(self, folder: Path) -> None:
        super().save_extra(folder)
        if self.keeps_adapters_only:
            save_frozen_identity(self.settings.backbone, self.backbone, folder)

    def ready_to_serve(self) -> None:
        if self.settings.lora.rank and not self.settings.lora.four_bit:
            merge_adapters(self.backbone)

    @classmethod
    def check_tokenizer(cls, tokenizer: Any, settings: Any, is_trained: bool) -> None:
        answer_tokens(tokenizer)
        check_own_tokenizer(settings.backbone, tokenizer, is_trained)

    @classmethod
    def refusals(cls, settings: Any, zero_stage: int | None) -> list[str]:
        """Under ZeRO-3 weights are in pieces between two uses, and 4-bit weights cannot be cut."""
        return ["model.lora.four_bit=true"] if settings.lora.four_bit and zero_stage == 3 else []
