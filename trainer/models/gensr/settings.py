"""The section model.* of a configuration whose model is GenSR."""

from typing import Literal

from data_shards import settings as s
from trainer.config import CfSettings, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from trainer.models.backbones.settings import AdapterSettings


@s.settings
class GenSRSettings(AdapterSettings, CfSettings):
    name: Literal["gensr"] = "gensr"
    """the published method and its extension"""
    variant: Literal["paper", "extended"] = "extended"
    """paper: the published equations. extended: adds position and task embeddings and three product slots
    (trainer/models/gensr/README.md)"""
    prompt: Literal["paper", "compact"] = "compact"
    """wording of the task prompts; compact has about 40 tokens"""
    views: Literal["both", "cf", "semantic"] = "both"
    """for ablations: cf or semantic leaves the other view's slots at 0, and the contrastive term out"""
    soft_filter: bool = True
    """for ablations: false reads the mean of the encoded history whatever the candidate, instead of Eqs. 5
    and 6"""
    num_heads: Positive = 2
    """heads of the history encoders and of the soft filter (Eqs. 3–5)"""
    dropout: Fraction = 0.0
    """dropout of the history encoders and of a backbone from scratch; a pretrained backbone has its own. The
    small backbones from scratch learn better without (docs/RESULTS.md)"""
    words_dim: Positive = 64
    """width of the learned table of anonymised words"""
    temperature: PositiveFloat = 0.07
    """τ of the contrastive term (Eq. 10)"""
    contrastive_weight: NonNegativeFloat = 0.01
    """λ of Eq. 8"""
    gather_negatives: bool = False
    """contrastive negatives from the micro-batches of all ranks instead of this rank's; accumulation adds
    none"""
    listwise_weight: NonNegativeFloat = 0.0
    """weight of a softmax cross-entropy over the candidates of an event, beside Eq. 9 (0 in the paper)"""
    evidence: bool = False
    """what counting knows of history, query and candidate (neighbours, followers, popularity, words,
    category) as an eighth slot and beside the answer; only with variant=extended (evidence.py)"""
    evidence_categories: bool = False
    """with evidence: also how much of the history lies in the candidate's category, now and usually, and how
    popular both are"""
    evidence_queries: bool = False
    """with evidence: also which words the texts hold that were clicked after queries with the query's words
    (query_words.py)"""
    num_neighbours: Positive = 100
    """neighbours and followers that each item keeps for it, and words that each word of a query keeps"""
    mined_negatives: NonNegative = 0
    """how many of data.num_negatives are neighbours of the history, or items of the query's category; scores
    are corrected for it (mining.py)"""
    compile: bool = False
    """torch.compile the backbone's layers, a minute at the start; gains nothing on a CPU; not under ZeRO-3"""

    def describe(self) -> str:
        adapters = f", LoRA rank {self.lora.rank}" if self.lora.rank else ""
        return f"{self.name}: {self.backbone}, {self.variant}, {self.prompt} prompt{adapters}"
