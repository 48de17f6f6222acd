"""GenSR in Python: data frames in, data frames out.

    import gensr

    gensr.prepare((events, items), "data/mine")                   # data frames, or a folder of raw logs
    gensr.cf("data/mine")
    gensr.train("demo", data="data/mine", run="runs/mine")
    gensr.evaluate("runs/mine").metrics
    model = gensr.load("runs/mine")                               # or models:/NAME@champion
    model.recommend(user="u3", k=10)

The command `gensr` does the same and more; both read the same settings (`gensr config keys`). A user's
mistake raises a gensr.GensrError that says what, where and the fix.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_shards.errors import GensrError
    from gensr.model import Model, load
    from gensr.steps import Evaluation, cf, evaluate, prepare, register, train
    from trainer import __version__
    from trainer.training.callbacks import Callback

__all__ = [
    "Callback",
    "Evaluation",
    "GensrError",
    "Model",
    "__version__",
    "cf",
    "evaluate",
    "load",
    "prepare",
    "register",
    "train",
]

# Where each name lives. Imported on first use, so that `import gensr` is instant.
HOMES = {
    "Callback": "trainer.training.callbacks",
    "Evaluation": "gensr.steps",
    "GensrError": "data_shards.errors",
    "Model": "gensr.model",
    "__version__": "trainer",
    "cf": "gensr.steps",
    "evaluate": "gensr.steps",
    "load": "gensr.model",
    "prepare": "gensr.steps",
    "register": "gensr.steps",
    "train": "gensr.steps",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'gensr' has no attribute {name!r}")
    from gensr.own import check

    check()
    value = globals()[name] = getattr(import_module(HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
