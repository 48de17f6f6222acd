"""Locks of files between processes."""

import fcntl
from typing import IO


def lock(file: IO[str], wait: bool = False) -> bool:
    """An exclusive lock until the open file is closed or the process ends. → whether it is ours, or the file
    system has no locks: then nobody is kept out. wait: until others let go of it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
