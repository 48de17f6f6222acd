"""Errors that a user can act on. The CLI prints them without a traceback; everything else is a bug and keeps
its traceback."""

from data_shards.secrets import mask_secrets


class GensrError(Exception):
    """Base of every error caused by input, configuration or environment. The message says what, where and the
    fix; secrets in it are masked."""

    def __init__(self, message: object = "") -> None:
        super().__init__(mask_secrets(str(message)))


class DataError(GensrError):
    """A log, a prepared folder or a shard that cannot be used."""


class ConfigError(GensrError):
    """A configuration with one or more problems; the message lists all of them."""
