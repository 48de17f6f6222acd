"""cf/lightgcn.safetensors of a prepared folder: what `gensr cf` writes and everything else reads."""

import hashlib
import json
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_shards.schema import Manifest
from data_shards.secrets import mask_secrets
from trainer.data.node_cache import origin_of
from trainer.errors import DataError
from trainer.runtime.files import atomic, file_sha256, write_text

CF_FORMAT = "gensr-cf-1"
DIGEST_KIND = "tensors:"  # starts what cf_digest() gives; a bare sha256 is an older record, of the file
HASHED_BYTES = 1 << 22  # read at once
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class CfTable:
    """cf/lightgcn.safetensors of a prepared folder. An item or user without training clicks is a zero row."""

    user: Tensor  # [num_users, K] float32; empty [0, K] when loaded with users=False
    item: Tensor  # [num_items, K] float32, trained on all training rec clicks
    # [F, num_items, K] float32, in the space of `item`; F = 0 when holdout=none, 1 when last
    item_folds: Tensor
    # [num_users] int64 when holdout=last: the click that item_folds[0] never saw; -1 for none
    heldout_item: Tensor | None
    split_fingerprint: str
    settings: dict[str, Any]  # CfConfig
    validation: dict[str, Any]  # what early stopping saw
    gensr_version: str

    @property
    def holdout(self) -> str:
        return str(self.settings["holdout"])

    @property
    def num_folds(self) -> int:
        """Folds to give to click_fold; 0 unless holdout=crossfit."""
        return len(self.item_folds) if self.holdout == "crossfit" else 0


def cf_path(folder: str | Path) -> Path:
    return Path(folder) / "cf" / "lightgcn.safetensors"


def save_cf(folder: str | Path, table: CfTable) -> Path:
    """Write the table atomically; returns its path."""
    tensors = {"user": table.user, "item": table.item, "item_folds": table.item_folds}
    if table.heldout_item is not None:
        tensors["heldout_item"] = table.heldout_item
    metadata = {
        "format": CF_FORMAT,
        "split_fingerprint": table.split_fingerprint,
        "holdout": table.holdout,
        "num_folds": str(table.num_folds),
        "settings": json.dumps(table.settings, sort_keys=True),
        "validation": json.dumps(table.validation, sort_keys=True),
        "gensr_version": table.gensr_version,
    }
    path = cf_path(folder)
    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(temporary), metadata)
        _sort_metadata(temporary)
    write_checksum(path)
    return path


def write_checksum(path: Path) -> None:
    """Beside the table: so that a node's cache can tell whether its copy is this table."""
    write_text(path.with_suffix(".sha256"), f"{file_sha256(path)} {path.stat().st_size} {path.name}\n")


def cf_digest(path: str | Path) -> str:
    """Identity of a CF table: sha256 of its tensors (names, types, shapes, bytes) and metadata, whatever
    order the file has them in. Raises DataError when it is not a safetensors file."""
    with open(path, "rb") as file:
        try:
            header, start = _header(file.read(8), file)
            names = sorted(set(header) - {"__metadata__"})
            facts = [[name, header[name]["dtype"], header[name]["shape"]] for name in names]
            places = [header[name]["data_offsets"] for name in names]
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise DataError(
                f"{path} cannot be read: {error}. Make it again with: gensr cf OUT overwrite=true"
            ) from error
        digest = hashlib.sha256(json.dumps([facts, header.get("__metadata__")], sort_keys=True).encode())
        for begin, end in places:
            file.seek(start + begin)
            while begin < end and (piece := file.read(min(end - begin, HASHED_BYTES))):
                digest.update(piece)
                begin += len(piece)
    return DIGEST_KIND + digest.hexdigest()


def same_cf(recorded: str, path: str | Path) -> bool:
    """Whether what a run recorded names the table at `path`: by cf_digest(), or, in a run of before there was
    one, by the sha256 of the file."""
    digest = cf_digest if recorded.startswith(DIGEST_KIND) else file_sha256
    return Path(path).is_file() and digest(path) == recorded


def _header(length: bytes, file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin."""
    (size,) = struct.unpack("<Q", length)
    if size > MAX_HEADER_BYTES:
        raise ValueError("it does not begin with the length of a header")
    header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    return header, 8 + size


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in an order that differs from process to process: the same table would be
    another file each time. The sorted header takes no more room."""
    with open(path, "rb+") as file:
        header, start = _header(file.read(8), file)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= start - 8, "a header grew"
        file.seek(8)
        file.write(text.ljust(start - 8))


def load_cf(folder: str | Path, manifest: Manifest, users: bool = True, folds: bool = True) -> CfTable:
    """Read OUT/cf. `users=False` and `folds=False` skip what is not needed (they are most of the file).

    Raises DataError when it is missing, unreadable, or was trained on another split than the manifest's.
    """
    path = cf_path(folder)
    if not path.is_file():
        if origin := origin_of(folder):
            raise DataError(
                f"{mask_secrets(origin.url)} has no collaborative-filtering table (cf/lightgcn.safetensors "
                "and .sha256). Make it where the folder was prepared, with gensr cf OUT, then copy OUT/cf "
                "there."
            )
        raise DataError(
            f"{path} is missing: the folder has no collaborative-filtering table yet. Make it with: gensr cf "
            f"{folder}"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata, manifest, folder)
            item, names = file.get_tensor("item"), file.keys()
            empty = item.new_zeros(0, item.shape[1])
            table = CfTable(
                user=file.get_tensor("user") if users else empty,
                item=item,
                item_folds=file.get_tensor("item_folds") if folds else empty.new_zeros(0, *item.shape),
                heldout_item=file.get_tensor("heldout_item") if "heldout_item" in names else None,
                split_fingerprint=metadata["split_fingerprint"],
                settings=json.loads(metadata["settings"]),
                validation=json.loads(metadata["validation"]),
                gensr_version=metadata["gensr_version"],
            )
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}. {_again(folder)}") from error
    if len(item) != manifest.num_items or (users and len(table.user) != manifest.num_users):
        raise DataError(
            f"{path} holds {len(item)} items, the manifest says {manifest.num_items}. {_again(folder)}"
        )
    return table


def _again(folder: str | Path) -> str:
    return f"Make it again with: gensr cf {shlex.quote(str(folder))} overwrite=true"


def _check_metadata(path: Path, metadata: dict[str, str], manifest: Manifest, folder: str | Path) -> None:
    again = _again(folder)
    if metadata.get("format") != CF_FORMAT:
        raise DataError(
            f"{path} has format {metadata.get('format')!r}, this gensr reads {CF_FORMAT!r}. {again}"
        )
    if metadata["split_fingerprint"] != manifest.fingerprint:
        raise DataError(
            f"{path} was trained on another split (fingerprint {metadata['split_fingerprint'][:12]}, the "
            f"manifest says {manifest.fingerprint[:12]}): "
            f"it may have seen validation or test clicks. {again}"
        )
