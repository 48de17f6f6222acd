"""recipes.yaml: each data set's preset and settings, the systems, the variants of GenSR."""

from functools import cache
from importlib import resources
from typing import Any

from data_shards.settings import overrides_of, parse_yaml
from trainer.errors import ConfigError


@cache
def recipe_of(name: str) -> dict[str, Any]:
    """Raises ConfigError, which lists the names."""
    known = read_recipes()["data_sets"]
    if name not in known:
        raise ConfigError(f"there is no {name}. There are: {', '.join(known)}")
    recipe: dict[str, Any] = known[name]
    return recipe


def read_recipes() -> dict[str, Any]:
    """own_settings, which YAML merges by their keys, are KEY=VALUE here, as they are everywhere else."""
    text = resources.files(__package__).joinpath("recipes.yaml").read_text(encoding="utf-8")
    recipes: dict[str, Any] = parse_yaml(text)
    for recipe in recipes["data_sets"].values():
        own = recipe.get("own_settings", {})
        recipe["own_settings"] = {name: overrides_of(settings) for name, settings in own.items()}
    return recipes
