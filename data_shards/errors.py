"""Errors that a user can act on. The CLI prints them without a traceback; everything else is a bug and keeps
its traceback."""

import errno
import os

from data_shards.secrets import mask_secrets

WRITE_FIXES = {  # of an error of the system while a file is written
    errno.ENOSPC: "Free space there, or choose another folder",
    errno.EDQUOT: "Free space within your quota, or choose another folder",
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM), "Make the folder writable, or choose another one"
    ),
}


def write_fix(error: BaseException, otherwise: str) -> str:
    """What to do about a file that cannot be written, also where a library has put the system's error into
    words of its own. otherwise: for an error that is none of WRITE_FIXES."""
    said = [fix for code, fix in WRITE_FIXES.items() if os.strerror(code) in str(error)]
    return said[0] if said else otherwise


class GensrError(Exception):
    """Base of every error caused by input, configuration or environment. The message says what, where and the
    fix; secrets in it are masked."""

    def __init__(self, message: object = "") -> None:
        super().__init__(mask_secrets(str(message)))


class DataError(GensrError):
    """A log, a prepared folder or a shard that cannot be used."""


class ConfigError(GensrError):
    """A configuration with one or more problems; the message lists all of them."""
