"""How long GenSR's prompts are, and hence what a training event costs (backbones/cost.py)."""

from typing import TYPE_CHECKING

from trainer.models.backbones.cost import BackboneSize, backbone_size, prompts_cost
from trainer.models.contract import Cost

if TYPE_CHECKING:
    from trainer.models.gensr.model import GenSR
    from trainer.models.gensr.settings import GenSRSettings

# An encoder's prompt: mean of Scientific's training batches, half searches, padding included (flan-t5's
# tokenizer). With a long query 110 and 40.
PROMPT_TOKENS = {"paper": 85, "compact": 20}
# A decoder's: read for every candidate, and once an event (task and query).
OWN_TOKENS, SHARED_TOKENS = {"paper": 54, "compact": 19}, {"paper": 56, "compact": 21}


def gensr_cost(model: "GenSR") -> Cost:
    size, num_candidates = backbone_size(model.backbone), 1 + model.world.data.num_negatives
    return prompts_cost(model, tokens_per_event(model.settings, size, num_candidates))


def tokens_per_event(settings: "GenSRSettings", size: BackboneSize, num_candidates: int) -> int:
    """Prompt tokens that the backbone reads for one training event, its candidates together."""
    if not size.shared_first:
        return PROMPT_TOKENS[settings.prompt] * num_candidates
    return OWN_TOKENS[settings.prompt] * num_candidates + SHARED_TOKENS[settings.prompt]
