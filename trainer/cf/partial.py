"""OUT/cf/partial/: what an interrupted `gensr cf` has finished, and where its table in training stood.
Removed when the table is written.

One safetensors file a slot, written aside and renamed. A slot of another split, other settings or another
version is as if it were not there.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.runtime.files import atomic


class CfWork:
    """identity: text that must be equal for a slot to be used again. save_every_s: seconds between two states
    of a table in training."""

    def __init__(self, folder: Path, identity: str, save_every_s: float) -> None:
        self.folder, self.identity, self.save_every_s = folder, identity, save_every_s

    def slot(self, name: str) -> "Slot":
        return Slot(self, name)

    def of_others(self) -> list[str]:
        """File names of slots that another identity left: they are not used, and replaced as this training
        saves its own."""
        return sorted(
            path.name
            for path in self.folder.glob("*.safetensors")
            if self.slot(path.stem).metadata().get("identity") != self.identity
        )

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Slot:
    """One file of the work folder: the state of a table in training, or a finished one."""

    def __init__(self, work: CfWork, name: str) -> None:
        self.work, self.name = work, name
        self._saved_s = time.monotonic()

    @property
    def path(self) -> Path:
        return self.work.folder / f"{self.name}.safetensors"

    def is_due(self) -> bool:
        """Whether a state should be saved now."""
        return time.monotonic() - self._saved_s >= self.work.save_every_s

    def save(self, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        """Replace the slot by these. Raises EnvironmentProblem when it cannot be written."""
        metadata = {"identity": self.work.identity, "document": json.dumps(document)}
        with atomic(self.path) as temporary:
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
                str(temporary),
                metadata,
            )
        self._saved_s = time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, document) as saved; None when there is nothing that fits."""
        found = self.metadata()
        if found.get("identity") != self.work.identity:
            return None
        with safe_open(str(self.path), framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, json.loads(found["document"])

    def metadata(self) -> dict[str, str]:
        """Empty when there is no such file or something else in it."""
        try:
            with safe_open(str(self.path), framework="pt") as file:
                return dict(file.metadata() or {})
        except (OSError, SafetensorError):
            return {}

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
