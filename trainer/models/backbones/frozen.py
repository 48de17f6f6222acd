"""Which frozen weights belong to a model that saves only its adapters."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from data_shards.checksum import file_sha256
from trainer.errors import DataError
from trainer.models.backbones.backbone import Backbone

FILE = "weights.json"  # in RUN/model/PART


def save_frozen_identity(name: str, backbone: Backbone, folder: Path, part: str = "backbone") -> None:
    """Which frozen weights belong to the adapters of a model in `folder`: PART/weights.json."""
    text = json.dumps(_frozen_identity(name, backbone), indent=2) + "\n"
    (folder / part / FILE).write_text(text, encoding="utf-8")


def _frozen_identity(name: str, backbone: Backbone) -> dict[str, Any]:
    """{"revision": of the hub, or None, "files": {name: sha256} of a local folder's weights}."""
    paths = sorted(path for suffix in ("safetensors", "bin") for path in Path(name).glob(f"*.{suffix}"))
    return {
        "revision": getattr(backbone.base.config, "_commit_hash", None),
        "files": {path.name: _sha256(path, *_state(path)) for path in paths},
    }


def _state(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


@cache
def _sha256(path: Path, num_bytes: int, changed_ns: int) -> str:
    """Once a process: RUN/model is written at every validation that gains."""
    return file_sha256(path)


def check_frozen(name: str, backbone: Backbone, saved: Path, part: str = "backbone") -> None:
    """Raises DataError when the backbone is not the one that the adapters were trained on. Models saved
    before this was noted are taken as they are."""
    noted = saved / part / FILE
    if not noted.is_file():
        return
    before, now = json.loads(noted.read_text(encoding="utf-8")), _frozen_identity(name, backbone)
    old, new = before["files"], now["files"]
    differing = [file for file in sorted(set(old) | set(new)) if old.get(file) != new.get(file)]
    if before["revision"] and now["revision"] and before["revision"] != now["revision"]:
        differing.append(f"revision {now['revision'][:12]} (was {before['revision'][:12]})")
    if differing:
        raise DataError(
            f"the backbone {name} is not the one that {saved} was trained on: {', '.join(differing[:4])}. "
            "Only the adapters are saved with a LoRA run, so its frozen weights must be the same. Restore "
            "them, or train again."
        )
