"""Whether duckdb fits in what a process may take (ulimit -v, as batch systems set it).

Where an address space ends, duckdb and the C library below it often end by a signal, in the middle of
anything, rather than say so: what does not fit is refused before it begins.
"""

import re
import resource
from pathlib import Path

from data_shards.errors import DataError

REST_BYTES = 400_000_000  # of the program around duckdb (options.py: memory_limit)
MEMORY_LIMIT = r"^([0-9]+(?:\.[0-9]+)?) ?([KMGT])(i?)B$"  # duckdb's way to write it


def bytes_of(memory_limit: str) -> int:
    """1500MB → 1,500,000,000; 1GiB → 1,073,741,824."""
    number, letter, binary = re.fullmatch(MEMORY_LIMIT, memory_limit).groups()  # type: ignore[union-attr]
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(letter) + 1))


def free_address_space() -> int | None:
    """Bytes that this process may still take; None where there is no limit, or it cannot be known."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):  # not Linux
        return None
    return allowed - pages * resource.getpagesize()


def check_address_space(memory_limit: str) -> None:
    """Raises DataError where duckdb's memory_limit and the rest of the program do not fit."""
    free, needed = free_address_space(), bytes_of(memory_limit) + REST_BYTES
    if free is not None and free < needed:
        fits = (free - REST_BYTES) // 1_000_000
        smaller = f"set memory_limit={fits}MB, or " if fits >= 50 else ""
        raise DataError(
            f"memory_limit={memory_limit} needs {needed / 1e6:,.0f} MB with the rest of the program, and "
            f"this process may take {max(free, 0) / 1e6:,.0f} MB more (ulimit -v). The fix: {smaller}raise "
            "that limit"
        )
