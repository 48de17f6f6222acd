"""Models by name: gensr, and each file of baselines/. Nothing is imported before it is asked for."""

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards.settings import did_you_mean
from trainer.config import ModelSettings
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.models.contract import Ranker

GENSR = "gensr"
BASELINES = Path(__file__).with_name("baselines")


def model_names() -> list[str]:
    return [GENSR, *_baselines()]


@cache
def _baselines() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules([str(BASELINES)]))


def model_class(name: str) -> "type[Ranker]":
    """Raises ConfigError that lists the names, or says what a model's file lacks."""
    _check(name)
    module = importlib.import_module(
        "trainer.models.gensr.model" if name == GENSR else f"trainer.models.baselines.{name}"
    )
    if not hasattr(module, "MODEL"):
        raise ConfigError(f"{module.__file__}: must end with MODEL = YourClass")
    found: type[Ranker] = module.MODEL
    if found.Settings().name != name:
        raise ConfigError(
            f"{module.__file__}: name of {found.Settings.__name__} is {found.Settings().name!r}, and must be "
            f"the file's, {name!r}"
        )
    return found


def settings_class(name: str) -> type[ModelSettings]:
    """The section model.* of a configuration. GenSR's is read without importing torch."""
    if name == GENSR:
        from trainer.models.gensr.settings import GenSRSettings

        return GenSRSettings
    return model_class(name).Settings


def _check(name: str) -> None:
    names = model_names()
    if name not in names:
        hint = did_you_mean(str(name), names) or f" There are: {', '.join(names)}"
        raise ConfigError(f"model.name={name}: no such model.{hint}")
