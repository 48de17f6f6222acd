"""The packages that belong to gensr, and what to do if a file of the user has the name of one."""

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("trainer", "data_shards", "ds_configs", "slurm")
HOME = Path(__file__).resolve().parents[1]  # they are installed side by side


def check() -> None:
    """Raises ImportError if Python would find something else under the name of one of the packages, for
    example a trainer.py next to the user's script."""
    for name in PACKAGES:
        spec = find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found is not None and found.parent != HOME / name:
            raise ImportError(
                f"{found} hides the package {name!r} of gensr, which is {HOME / name}. Rename that file, or "
                "start Python in another folder. The commands `gensr` and `python -m gensr` are not affected."
            )


def prefer() -> None:
    """For a program, not for a library: the current folder, which `python -m` puts first, becomes the last
    place to look for modules."""
    if sys.path and sys.path[0] in ("", str(Path.cwd())):
        sys.path.append(sys.path.pop(0))
