"""Errors a user can act on (see data_shards/errors.py, where the base lives because preparation must not
import the trainer)."""

import os
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
    r"|failed to allocate|allocation failure|cannot map zero-fill pages",
    re.IGNORECASE,
)
_NOT_MAPPED = "failed to map segment from shared object"  # glibc, of a library that is imported


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
    known = isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) or _lacks_memory_to_import(error)
    if isinstance(error, GensrError) or not known:
        return None
    reason = (str(error).strip().splitlines() or [""])[0]
    return EnvironmentProblem(
        f"memory ran out{f' ({reason})' if reason else ''}. Use smaller optim.micro_batch_size and "
        "run.eval_batch_size, or a machine with more memory; gensr train … --dry-run says what a run needs"
    )


def _lacks_memory_to_import(error: BaseException) -> bool:
    """glibc says the same of a file system that forbids it (mount option noexec)."""
    if not isinstance(error, ImportError) or _NOT_MAPPED not in str(error):
        return False
    try:
        return not os.statvfs(error.path or "/").f_flag & os.ST_NOEXEC
    except OSError:
        return True
