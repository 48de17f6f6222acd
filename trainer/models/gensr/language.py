"""The language model of a GenSR: a new one by name, or the one whose weights a saved model holds."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from data_shards.checksum import file_sha256
from trainer.errors import DataError
from trainer.models.backbones.adapters import keep_frozen_in_bf16
from trainer.models.backbones.backbone import Backbone
from trainer.models.backbones.families import build_backbone
from trainer.models.backbones.known import architecture, is_tied
from trainer.models.contract import World
from trainer.models.gensr.settings import GenSRSettings

FROZEN = "backbone/weights.json"  # in RUN/model of a model that keeps adapters only


def backbone_of(settings: GenSRSettings, world: World) -> Backbone:
    """A new model: weights and tokenizer belong together, or DataError. World.saved: its architecture alone,
    the weights are loaded afterwards (with LoRA on a pretrained backbone, its frozen weights by name)."""
    lora = settings.lora if settings.lora.rank else None
    if world.tokenizer is None:  # sizes only: no weights, no network
        with architecture(settings.backbone) as config_only:
            return build_backbone(
                settings.backbone,
                vocab_size=world.vocab_size,
                dropout=0.0,
                lora=lora,
                config_only=config_only,
                own_head=not is_tied(settings.backbone),
            )
    if world.saved is not None:
        adapters_only = keeps_adapters_only(settings)
        backbone = build_backbone(
            settings.backbone,
            vocab_size=world.vocab_size,
            dropout=settings.dropout,
            lora=lora,
            config_only=None if adapters_only else world.saved / "backbone",
            own_head=_has_own_head(world.saved),
        )
        if adapters_only:
            _check_frozen(settings.backbone, backbone, world.saved)
        return backbone
    backbone = build_backbone(
        settings.backbone,
        vocab_size=world.vocab_size,
        dropout=settings.dropout,
        lora=lora,
        activation_checkpointing=settings.activation_checkpointing,
    )
    if world.vocab_size > backbone.vocab_size:
        raise DataError(
            f"{world.data.dir}: its tokenizer has {world.vocab_size} tokens, backbone {settings.backbone} "
            "embeds "
            f"{backbone.vocab_size}. "
            f"Prepare the folder with the backbone's own tokenizer: tokenizer={settings.backbone}"
        )
    if lora is not None and world.precision == "bf16" and not lora.four_bit:
        keep_frozen_in_bf16(backbone)
    if settings.compile:
        backbone.compile_layers()
    return backbone


def keeps_adapters_only(settings: GenSRSettings) -> bool:
    """Whether RUN/model leaves the frozen backbone out: with LoRA, unless the backbone was made from scratch
    and exists nowhere else."""
    return settings.lora.rank > 0 and not settings.backbone.startswith("scratch:")


def save_frozen_identity(name: str, backbone: Backbone, folder: Path) -> None:
    """Which frozen weights belong to the adapters of a model in `folder`: backbone/weights.json."""
    text = json.dumps(_frozen_identity(name, backbone), indent=2) + "\n"
    (folder / FROZEN).write_text(text, encoding="utf-8")


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


def _check_frozen(name: str, backbone: Backbone, saved: Path) -> None:
    """Raises DataError when the backbone is not the one that the adapters were trained on. Models of before
    it was noted are taken as they are."""
    if not (saved / FROZEN).is_file():
        return
    before, now = json.loads((saved / FROZEN).read_text(encoding="utf-8")), _frozen_identity(name, backbone)
    old, new = before["files"], now["files"]
    differing = [file for file in sorted(set(old) | set(new)) if old.get(file) != new.get(file)]
    if before["revision"] and now["revision"] and before["revision"] != now["revision"]:
        differing.append(f"revision {now['revision'][:12]} (was {before['revision'][:12]})")
    if differing:
        raise DataError(
            f"model.backbone={name} is not the one that {saved} was trained on: {', '.join(differing[:4])}. "
            "Only the adapters are saved with a LoRA run, so its frozen weights must be the same. Restore "
            "them, or train again."
        )


def _has_own_head(saved: Path) -> bool:
    """Whether the output table is one of its own, as in flan-t5: transformers forgets it when it builds a T5
    from a configuration."""
    from safetensors import safe_open

    with safe_open(str(saved / "model.safetensors"), framework="pt") as file:
        return any(name.endswith("lm_head.weight") for name in file.keys())  # noqa: SIM118 (no mapping)
