"""Presets, one YAML file each with a header that says launch line, memory and expected time; and how a
configuration is read: the section model.* has the keys of the model that model.name names."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from data_shards import settings as s
from trainer.config import ALSO, Config
from trainer.errors import ConfigError
from trainer.models.zoo import GENSR, model_names, settings_class

MICRO_BATCH = "optim.micro_batch_size"


def preset_names() -> list[str]:
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files(__package__).iterdir()
        if p.name.endswith(".yaml")
    )


def preset_of(model: str, named: str | None = None) -> tuple[str | None, list[str]]:
    """What load_config() takes for a model: (preset, overrides). The named preset, else the one of the
    model's own name, else no preset and the override that chooses the model."""
    preset = named or (model if model in preset_names() else None)
    return preset, [] if preset else [f"model.name={model}"]


def preset_path(preset_or_file: str) -> Path | None:
    """A preset's name or a YAML file's path → the file; None for a model that has no preset: its defaults
    hold. Raises ConfigError that lists the presets."""
    as_file = Path(preset_or_file)
    if as_file.suffix in (".yaml", ".yml"):
        if not as_file.is_file():
            raise ConfigError(f"{preset_or_file}: no such file. Presets: {', '.join(preset_names())}")
        return as_file
    names = preset_names()
    if preset_or_file not in names:
        if preset_or_file in model_names():
            return None
        raise ConfigError(
            f"{preset_or_file}: no such preset.{s.did_you_mean(preset_or_file, names)} Presets: "
            f"{', '.join(names)}. A file's name must end in .yaml"
        )
    return Path(str(resources.files(__package__) / f"{preset_or_file}.yaml"))


def documented_sizes(preset: str) -> dict[str, int]:
    """Counts of a data set that a preset is meant for, from its `# sizes:` line; {} where it has none."""
    path = preset_path(preset)
    line = path and re.search(r"^# sizes: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {key: int(value) for key, value in (part.split("=") for part in line[1].split())} if line else {}


def load_config(preset_or_file: str | None, overrides: Sequence[str] = (), world_size: int = 1) -> Config:
    """Preset, file or a model without a preset, then `section.key=value` overrides → Config, checked as a
    whole.

    A micro-batch that comes from a preset or the defaults is lowered until it divides what each of
    `world_size` processes has of a step; one that the user gave stays. Raises ConfigError with every problem
    at once.
    """
    path = preset_path(preset_or_file) if preset_or_file else None
    if preset_or_file and path is None:
        overrides = [*preset_of(preset_or_file)[1], *overrides]
    given = s.read_yaml(path) if path is not None else {}
    _refuse_another_model(given, overrides, preset_or_file)
    config: Config = s.load(config_type(_model_name(given, overrides)), path, overrides)
    if not gives_micro_batch(preset_or_file, overrides):
        config = with_micro_batch(config, config.optim.micro_batch_size, world_size)
    problems = cross_field_problems(config)
    if problems:
        raise ConfigError(s.format_problems(problems, s.where_of(problems, path, overrides)))
    return with_absolute_places(config)


def gives_micro_batch(preset_or_file: str | None, overrides: Sequence[str] = ()) -> bool:
    """Whether the user says optim.micro_batch_size, in overrides or in a file that is no preset."""
    if any(override.partition("=")[0] == MICRO_BATCH for override in overrides):
        return True
    path = preset_path(preset_or_file) if preset_or_file and preset_or_file not in preset_names() else None
    return path is not None and MICRO_BATCH in s.flatten(s.read_yaml(path))


def with_micro_batch(config: Config, largest: int, world_size: int) -> Config:
    """The configuration with the largest micro-batch, at most `largest`, that divides what each of
    `world_size` processes has of a step. A global batch that these processes cannot share stays as it is: the
    schedule refuses it."""
    optim = config.optim
    share, rest = divmod(optim.global_batch_size, world_size)
    if rest:
        return config
    size = next(size for size in range(min(largest, share), 0, -1) if share % size == 0)
    if size == optim.micro_batch_size:
        return config
    of_preset = optim.preset_micro_batch_size or optim.micro_batch_size
    lowered = replace(optim, micro_batch_size=size, preset_micro_batch_size=of_preset)
    return replace(config, optim=lowered)


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """A Config from what RUN/config.yaml or a registered model holds."""
    return s.load(config_type(_model_name(tree)), base=tree)


def with_absolute_places(config: Config) -> Config:
    """Backbones that are folders and a database of tracking.uri are named absolutely, so that the run, whose
    frozen weights or versions may lie there, can be used from another folder."""
    names = {
        field: name
        for field in ("backbone", "generator")
        if (name := getattr(config.model, field, "")) and Path(name).is_dir()
    }
    named = {field: os.path.abspath(name) for field, name in names.items()}
    if named:
        config = replace(config, model=replace(config.model, **named))
    scheme, _, database = config.tracking.uri.partition("sqlite:///")
    if not scheme and database and not database.startswith(("/", ":memory:")):
        uri = f"{database_uri(os.getcwd())}/{database}"
        config = replace(config, tracking=replace(config.tracking, uri=uri))
    return config


def database_uri(path: str) -> str:
    """The URI of an sqlite file. Only what must be is quoted, because MLflow also makes a folder that is
    named as the URI spells it (tracking/store.py)."""
    return "sqlite:///" + re.sub("[?%]", lambda match: f"%{ord(match[0]):02X}", path)


@cache
def config_type(name: str = GENSR) -> type[Config]:
    """Config whose section `model` has the settings of one model. Raises ConfigError for an unknown model."""
    section = settings_class(name)
    body = {"__module__": __name__, "__annotations__": {"model": section}, "model": section()}
    made: type[Config] = s.settings(type("Config", (Config,), body))
    return made


def _model_name(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> str:
    """model.name of a file's content or of an override (the last one counts); missing = gensr."""
    section = tree.get("model")
    name = section.get("name", GENSR) if isinstance(section, Mapping) else GENSR
    for override in overrides:
        key, _, text = override.partition("=")
        name = text if key == "model.name" else name
    return str(name)


def _refuse_another_model(given: Mapping[str, Any], overrides: Sequence[str], source: str | None) -> None:
    """Raises ConfigError where model.name of an override is not the file's model and does not know its keys:
    a list of unknown keys would not say that the name is what is wrong."""
    of_file, wanted = _model_name(given), _model_name(given, overrides)
    section = given.get("model")
    if wanted == of_file or not isinstance(section, Mapping):
        return
    if section.keys() - {field.name for field in fields(settings_class(wanted))}:
        kind = "preset " if source in preset_names() else ""
        raise ConfigError(
            f"{kind}{source} is for {of_file}; model.name={wanted} has other settings. Put {wanted} in place "
            f"of {source}"
        )


def cross_field_problems(config: Config) -> list[tuple[str, str]]:
    """Checks that need more than one field; (dotted key, message) each."""
    problems: list[tuple[str, str]] = []
    optim, data = config.optim, config.data
    if optim.global_batch_size % optim.micro_batch_size:
        problems.append(
            (
                "optim.micro_batch_size",
                f"must divide optim.global_batch_size={optim.global_batch_size}, got "
                f"{optim.micro_batch_size}",
            )
        )
    if unknown := [name for name in config.tracking.also.split(",") if name and name not in ALSO]:
        known = ", ".join(ALSO)
        problems.append(("tracking.also", f"must be of {known}, with commas between, got {unknown[0]!r}"))
    if data.weight_rec == 0 and data.weight_src == 0:
        problems.append(
            ("data.weight_rec", "data.weight_rec and data.weight_src are both 0: nothing to train on")
        )
    if data.mixture_popularity + data.mixture_impressions > 1:
        both = f"{data.mixture_popularity} + {data.mixture_impressions}"
        problems.append(
            (
                "data.mixture_popularity",
                f"data.mixture_popularity + data.mixture_impressions must be at most 1, got {both}",
            )
        )
    if data.history_tokens > data.item_tokens:
        problems.append(
            (
                "data.history_tokens",
                f"must be at most data.item_tokens={data.item_tokens}, got {data.history_tokens}",
            )
        )
    return problems
