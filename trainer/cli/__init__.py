"""The command `gensr`: one file per group of verbs; base.py has what they share. `gensr --help` lists verbs
in the order in which the files are imported."""

# isort: off
from trainer.cli.base import app, main
from trainer.cli import data, training, experiments, analysis, serving, bench, help
# isort: on

__all__ = ["analysis", "app", "bench", "data", "experiments", "help", "main", "serving", "training"]
