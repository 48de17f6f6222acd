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
    """Raises ConfigError that lists the names."""
    _check(name)
    module = "trainer.models.gensr.model" if name == GENSR else f"trainer.models.baselines.{name}"
    found: type[Ranker] = importlib.import_module(module).MODEL
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
