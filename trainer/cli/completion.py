"""What a shell completes in addition to verbs and options: presets, sources, keys of settings
(`gensr --install-completion`). Nothing heavy is imported, because a person is waiting."""

import os
from collections.abc import Iterable
from typing import Any

import typer


def presets(incomplete: str) -> list[str]:
    from trainer.configs import preset_names

    return _that_begin(incomplete, preset_names())


def sources(incomplete: str) -> list[str]:
    from data_shards.options import SOURCE_DEFAULTS

    return _that_begin(incomplete, SOURCE_DEFAULTS)


def keys(ctx: typer.Context, incomplete: str) -> list[str]:
    """The verb's keys, such as `optim.lr=`. After the = only files can follow, which the shell itself
    completes."""
    from data_shards.settings import leaf_fields

    before = os.environ.get("COMP_WORDS", "").removesuffix(incomplete).rstrip()  # bash splits words at =
    if "=" in incomplete or before.endswith("="):
        return []
    return _that_begin(incomplete, (f"{key}=" for key, _ in leaf_fields(_tree_of(ctx.info_name))))


def presets_and_keys(ctx: typer.Context, incomplete: str) -> list[str]:
    """For verbs whose preset may be left out."""
    return [*presets(incomplete), *keys(ctx, incomplete)]


def splits(incomplete: str) -> list[str]:
    return _that_begin(incomplete, ("valid", "test"))


def candidates(incomplete: str) -> list[str]:
    return _that_begin(incomplete, ("sampled", "hard", "full"))


def _tree_of(verb: str | None) -> Any:
    if verb == "prepare":
        from data_shards.options import PrepareSettings

        return PrepareSettings
    if verb == "cf":
        from trainer.config import CfRoot

        return CfRoot
    from trainer.configs import config_type

    return config_type()


def _that_begin(incomplete: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
