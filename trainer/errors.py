"""Errors a user can act on (see data_shards/errors.py, where the base lives because preparation must not
import the trainer)."""

import re

from data_shards.errors import ConfigError, DataError, GensrError

__all__ = [
    "BenchError",
    "ConfigError",
    "DataError",
    "EnvironmentProblem",
    "GensrError",
    "RequestError",
    "RunError",
    "out_of_memory",
]

# How libraries that know no MemoryError (torch, duckdb, C++ below them) say it.
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can(no|')t allocate memory|bad_alloc|can't start new thread"
    r"|failed to allocate|allocation failure",
    re.IGNORECASE,
)


class RunError(GensrError):
    """A training run that cannot start or continue: a run folder in use, a checkpoint of other data, a loss
    that is not finite."""


class EnvironmentProblem(GensrError):
    """The machine lacks something: a package, a compiler, disk space, a reachable server."""


class RequestError(GensrError):
    """A request for scores that cannot be answered: unknown items, a search without a query, a wrong type."""


class BenchError(GensrError):
    """A program that `gensr bench` measures failed."""


def out_of_memory(error: BaseException) -> EnvironmentProblem | None:
    """What a user reads of an error that means that memory ran out; None for any other error."""
    if isinstance(error, GensrError) or not (isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))):
        return None
    reason = (str(error).strip().splitlines() or [""])[0]
    return EnvironmentProblem(
        f"memory ran out{f' ({reason})' if reason else ''}. Use smaller optim.micro_batch_size and "
        "run.eval_batch_size, or a machine with more memory; gensr train … --dry-run says what a run needs"
    )
