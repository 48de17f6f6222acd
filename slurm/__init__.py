"""Job scripts for SLURM, shipped with the package: `gensr submit` makes its jobs from them, and sbatch takes
them as they are (README.md)."""

from importlib import resources


def script(name: str) -> str:
    """Text of a job script, for example train.sbatch, wherever the package is installed."""
    return (resources.files("slurm") / name).read_text(encoding="utf-8")
