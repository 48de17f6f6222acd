"""Where a long step tells how far it is."""

from collections.abc import Callable

StageProgress = Callable[[str, int, int], None]
"""(stage, done, in all); 0 in all where that is not known."""


def silent_stage(stage: str, done: int, total: int) -> None:
    """A StageProgress that shows nothing."""
