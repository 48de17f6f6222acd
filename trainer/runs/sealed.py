"""A folder that says what is in it: files.json holds the size and sha256 of each of its files. RUN/model and
the folders of a registered version are read as they were written, or not at all."""

import json
from pathlib import Path

from data_shards.checksum import file_sha256
from trainer.data.verified import Known, check_files
from trainer.errors import DataError

SEAL = "files.json"
FIX = "Restore the folder from where it was copied, or train (register) again"


def seal(folder: Path) -> None:
    """Write FOLDER/files.json; nothing is written into the folder afterwards."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    content = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, file_sha256(path)] for path in files
    }
    (folder / SEAL).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_sealed(folder: Path) -> None:
    """Raises DataError naming the first file that is missing or not the one that was written. A folder of
    before there was a files.json passes. Files are read once, and again only after a change."""
    path = folder / SEAL
    if path.is_file():
        check_files(folder, _known(path), FIX)


def _known(path: Path) -> list[Known]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [(str(name), int(num_bytes), str(sha256)) for name, (num_bytes, sha256) in content.items()]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error}). {FIX}") from error
