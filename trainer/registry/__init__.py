"""Versions of a model in the MLflow registry: made, described, fetched, promoted."""
