"""Files of a folder against the sizes and checksums that are known of them. A file is read for it
once on a node, and again only after it has changed: CACHE/verified/ remembers size and time of change."""

import contextlib
import hashlib
import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from trainer.data.node_cache import cache_of, locked
from trainer.errors import DataError, EnvironmentProblem
from trainer.runtime.files import file_sha256, write_text

Known = tuple[str, int, str]  # name inside the folder, bytes, sha256


def check_files(folder: str | Path, files: Iterable[Known], fix: str = "") -> None:
    """Raises DataError naming the first file that is missing or is not what is known of it. A cache that
    cannot be written only costs time. fix: what helps; default: what makes a file of a prepared folder."""
    folder, files = Path(folder).resolve(), list(files)
    key = hashlib.sha256(str(folder).encode()).hexdigest()[:32]
    record = cache_of(folder) / "verified" / f"{key}.json"
    if _stale(folder, files, _read(record)):
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(EnvironmentProblem):  # other processes of this node wait, then find it
                stack.enter_context(locked(record))
            known = _read(record)
            found = {name: _check(folder, name, size, sha256, fix) for name, size, sha256 in
                     _stale(folder, files, known)}  # fmt: skip
            with contextlib.suppress(EnvironmentProblem):
                _forget_folders_that_are_gone(record.parent)
                document = {"folder": str(folder), "files": {**known, **found}}
                write_text(record, json.dumps(document) + "\n")


def _stale(folder: Path, files: list[Known], known: dict[str, list[object]]) -> list[Known]:
    return [file for file in files if known.get(file[0]) != [*_state(folder / file[0]), file[2]]]


def _state(path: Path) -> tuple[int, int]:
    """(bytes, time of change); (-1, 0) for a missing file."""
    try:
        stat = path.stat()
    except OSError:
        return -1, 0
    return stat.st_size, stat.st_mtime_ns


def _check(folder: Path, name: str, num_bytes: int, sha256: str, fix: str) -> list[object]:
    path, again = folder / name, "Restore the file, or make it again"
    cf = f"gensr cf {shlex.quote(str(folder))} overwrite=true"
    fix = fix or f"{again}: {cf if name.startswith('cf/') else 'gensr prepare'}"
    state = _state(path)  # before it is read: what is written meanwhile is looked at again
    if state[0] < 0:
        raise DataError(f"{path}: missing. {fix}")
    if state[0] != num_bytes:
        raise DataError(f"{path}: {state[0]} bytes, expected {num_bytes} (truncated?). {fix}")
    if file_sha256(path) != sha256:
        raise DataError(f"{path}: checksum differs from the one noted when it was made (corrupt). {fix}")
    return [*state, sha256]


def _read(record: Path) -> dict[str, list[object]]:
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return files if isinstance(files, dict) else {}


def _forget_folders_that_are_gone(records: Path) -> None:
    for other in records.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if not Path(json.loads(other.read_text(encoding="utf-8"))["folder"]).exists():
                other.unlink()
                other.with_name(f".{other.name}.lock").unlink(missing_ok=True)
