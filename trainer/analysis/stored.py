"""Results as files: figures are drawn from what was stored, so they can be drawn again without the model.

A dataclass with arrays goes into one .npz: each array under its name, the other fields as JSON under `facts`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from trainer.errors import DataError
from trainer.runtime.files import atomic

FACTS = "facts"
Stored = TypeVar("Stored")


def save_arrays(path: str | Path, result: Any) -> Path:
    """Write a dataclass of arrays, numbers, words and tuples to path (.npz), atomically."""
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    facts = {name: value for name, value in values.items() if name not in arrays}
    assert not any(array.dtype.hasobject for array in arrays.values()), "objects would be pickled"
    arrays[FACTS] = np.array(json.dumps(facts, allow_nan=False))
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # none is called allow_pickle
    return Path(path)


def load_arrays(path: str | Path, kind: type[Stored]) -> Stored:
    """What save_arrays() wrote of that dataclass. Raises DataError for any other file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            values: dict[str, Any] = {name: file[name] for name in file.files}
        facts = json.loads(str(values.pop(FACTS)))
        # JSON has no tuples: lists come back as such
        facts = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
        return kind(**values, **facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} does not hold a stored {kind.__name__}: {error}. Run its analysis again"
        ) from error
