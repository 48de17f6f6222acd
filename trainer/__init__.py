"""gensr: unified search and recommendation with a generative model. README.md in this folder shows how the
parts fit."""

__version__ = "0.1.0"
