"""ZAM, the zero attention model (Ai, Hill, Vishwanathan & Croft, "A Zero Attention Model for Personalized
Product Search", CIKM 2019): AEM (aem.py) with a zero vector before the history, so that a query may find
nothing of use in it.

    a_j = exp f_j / (1 + Σ exp f)

form=multihead is what the public code of TEM calls ZAM.
"""

from typing import Literal

from data_shards import settings as s
from trainer.models.baselines.aem import Aem, AemCore, AemSettings


@s.settings
class ZamSettings(AemSettings):
    name: Literal["zam"] = "zam"  # type: ignore[assignment]
    """attention of the query over the history, or over nothing"""


class ZamCore(AemCore):
    zero = True


class Zam(Aem):
    """Search only."""

    Settings = ZamSettings
    Core = ZamCore
    title = "ZAM"


MODEL = Zam
