"""What a model reads of a prepared folder, by its checksums: noted in model.json, compared when the model is
loaded. A folder of the same split but another tokenizer or text preparation would be read without an error,
and the scores would mean nothing."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_shards.checksum import file_sha256
from trainer.data.folder import PreparedFolder
from trainer.errors import DataError

TEXT_SETTINGS = ("mode", "num_words", "vocab_size", "item_tokens", "query_tokens")
_TERMS = ("tokenizer/", "catalog/words.npy", "catalog/query_tokens", "catalog/query_words")
# What each of a model's `needs` reads, by the beginning of the file's name. Parquet files are not listed: the
# same table has other bytes with another version of Arrow, and the split's fingerprint stands for its rows.
FILES_OF: dict[str, tuple[str, ...]] = {
    "item_text": (*_TERMS, "catalog/item_tokens", "catalog/item_words"),
    "texts": (*_TERMS, "catalog/item_words"),
    "history_queries": _TERMS,
    "item_category": ("catalog/item_category",),
}


def what_is_read(needs: Iterable[str], folder: PreparedFolder) -> dict[str, Any]:
    """{"text": settings, "files": {name: sha256}} of what a model with these needs reads; no "text" where it
    reads none."""
    begins = tuple(sorted({begin for need in needs for begin in FILES_OF.get(need, ())}))
    files = {name: sha256 for name, _, sha256 in folder.catalogue_files() if name.startswith(begins)}
    text = {key: folder.manifest.raw["text"].get(key) for key in TEXT_SETTINGS}
    return {**({"text": text} if "tokenizer/" in begins else {}), "files": files}


def check_data(
    document: dict[str, Any],
    needs: Iterable[str],
    folder: PreparedFolder,
    model_dir: Path,
    run: str,
    may_read: Iterable[str] = (),
) -> None:
    """Raises DataError when a folder is not what a model was trained on: another split, text, tokenizer,
    categories or CF table. document: its model.json. may_read: compared where it was noted."""
    manifest, noted = folder.manifest, document.get("reads", {}).get("files", {})
    had = {need for need in may_read if any(name.startswith(FILES_OF[need]) for name in noted)}
    needs = frozenset(needs) | had
    if document["split_fingerprint"] != manifest.fingerprint:
        raise DataError(
            f"{folder.name} has another split (fingerprint {manifest.fingerprint[:12]}) than {run} was "
            f"trained on ({document['split_fingerprint'][:12]}). Prepare the data as it was, or train again."
        )
    now = what_is_read(needs, folder)
    if "reads" in document:
        _refuse(_differences(document["reads"], now), folder, run)
    else:
        _check_older(document, now, folder, model_dir, run)
    recorded = document.get("cf_sha256", "")
    if recorded and folder.cf_digest_as(recorded) != recorded:
        raise DataError(
            f"{folder.name}: its CF table is not the one {run} was trained on: the model would read "
            "other vectors. Restore it, or train again."
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words: settings first, which say why files differ."""
    old_text, new_text = before.get("text", {}), now.get("text", {})
    found = [
        f"{key}={new_text.get(key)} (was {old_text.get(key)})"
        for key in TEXT_SETTINGS
        if old_text.get(key) != new_text.get(key)
    ]
    old, new = before["files"], now["files"]
    # the tokenizer and the vocabulary, then what was made with them
    names = sorted(
        set(old) | set(new), key=lambda name: (not name.startswith(("tok", "catalog/words")), name)
    )
    return found + [name for name in names if old.get(name) != new.get(name)]


def _check_older(
    document: dict[str, Any], now: dict[str, Any], folder: PreparedFolder, model_dir: Path, run: str
) -> None:
    """Of a model that was saved before it noted what it reads: the tokenizer was copied into it, the rest is
    known by the manifest alone, which also differs where nothing that is read does."""
    copied = model_dir / "tokenizer" / "tokenizer.json"
    if "text" in now and copied.is_file():
        files = {"tokenizer/tokenizer.json": file_sha256(copied)}
        here = {name: sha256 for name, sha256 in now["files"].items() if name in files}
        _refuse(_differences({"files": files}, {"files": here}), folder, run)
    if document["manifest_hash"] != folder.manifest.hash:
        warnings.warn(
            f"{folder.name} is not the folder {run} was trained on, though its split is the same. What the "
            "model reads was not noted when it was saved, so it cannot be compared.",
            stacklevel=3,
        )


def _refuse(differences: list[str], folder: PreparedFolder, run: str) -> None:
    if differences:
        raise DataError(
            f"{folder.name} was prepared in another way than the folder {run} was trained on: "
            f"{', '.join(differences[:4])}. The model would read other words. Prepare it with the same "
            "tokenizer and settings of text, name that folder by data.dir, or train again."
        )
