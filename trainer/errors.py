"""Errors a user can act on (see data_shards/errors.py, where the base lives because preparation must not
import the trainer)."""

from data_shards.errors import ConfigError, DataError, GensrError

__all__ = [
    "BenchError",
    "ConfigError",
    "DataError",
    "EnvironmentProblem",
    "GensrError",
    "RequestError",
    "RunError",
]


class RunError(GensrError):
    """A training run that cannot start or continue: a run folder in use, a checkpoint of other data, a loss
    that is not finite."""


class EnvironmentProblem(GensrError):
    """The machine lacks something: a package, a compiler, disk space, a reachable server."""


class RequestError(GensrError):
    """A request for scores that cannot be answered: unknown items, a search without a query, a wrong type."""


class BenchError(GensrError):
    """A program that `gensr bench` measures failed."""
