"""The command `gensr`: one file a group of verbs, base.py what they share. `gensr --help` lists verbs in
the order in which the files are imported."""

# isort: off
from trainer.cli.base import app, main
from trainer.cli import data, training, analysis, serving, bench, help
# isort: on

__all__ = ["analysis", "app", "bench", "data", "help", "main", "serving", "training"]
