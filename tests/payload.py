"""What a pickle from elsewhere may hold: an object whose unpickling leaves a trace."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Payload:
    """Its unpickling makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)
