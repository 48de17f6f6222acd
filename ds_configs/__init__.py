"""DeepSpeed and accelerate configurations, one per situation; shipped with the package (README.md lists
them)."""

from importlib import resources
from pathlib import Path


def names() -> list[str]:
    """File names of all configurations here."""
    return sorted(
        entry.name
        for entry in resources.files("ds_configs").iterdir()
        if entry.name.endswith((".json", ".yaml"))
    )


def path(name: str) -> Path:
    """Full path of one of names(), wherever the package is installed. Raises FileNotFoundError that lists
    them."""
    if name not in names():
        raise FileNotFoundError(f"{name}: not in ds_configs. There are: {', '.join(names())}")
    return Path(str(resources.files("ds_configs") / name))
