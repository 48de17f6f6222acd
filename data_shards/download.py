"""Fetch the public raw logs: resumed with HTTP Range, checked by size and checksum, moved into place only
when whole.

kuaisar, kuaisar-small   Zenodo record 8181109 (CC BY-NC-SA 4.0); size and md5 come from the record's own API
amazon-kindle            Amazon product data, 2014 release, Kindle Store 5-core + metadata (no checksum is
                         published)
"""

import gzip
import hashlib
import http.client
import json
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from data_shards.checksum import pieces
from data_shards.errors import ConfigError, DataError
from data_shards.progress import StageProgress, silent_stage

ZENODO = "https://zenodo.org"
SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
KUAISAR_RECORD = 8181109
TRIES = 8  # in a row without a new byte
BACKOFF_S = 1.0  # doubles after each, up to MAX_BACKOFF_S
MAX_BACKOFF_S = 60.0
TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    name: str
    url: str
    num_bytes: int = 0  # 0 = what the server says
    md5: str = ""  # "" = none is published


def names() -> list[str]:
    return ["kuaisar", "kuaisar-small", "amazon-kindle"]


def download(
    name: str,
    folder: str | Path,
    base_url: str = "",
    progress: StageProgress = silent_stage,
    backoff_s: float = BACKOFF_S,
) -> list[Path]:
    """Fetch the data set `name` into `folder` (made when missing) and unpack zips; returns the data files.

    What is there and complete is not fetched again; a broken-off file resumes where it stopped. `base_url`
    replaces the public server (a mirror). Raises ConfigError for an unknown name, DataError when the server
    cannot be reached, answers nonsense, or a file fails its check.
    """
    if name not in names():
        raise ConfigError(f"{name}: no such data set. Known: {', '.join(names())}")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files: list[Path] = []
        for remote in _listing(name, base_url.rstrip("/"), backoff_s):
            path = fetch(remote, folder, progress, backoff_s)
            files += unzip(path, folder) if path.suffix == ".zip" else [path]
    except OSError as error:
        raise DataError(
            f"cannot write into {folder}: {error}. What was fetched stays there; run the same command again "
            "to continue."
        ) from error
    return files


def fetch(remote: RemoteFile, folder: Path, progress: StageProgress, backoff_s: float = BACKOFF_S) -> Path:
    """One file, through NAME.part. Raises DataError when it cannot be had whole and right."""
    path, part = folder / remote.name, folder / f"{remote.name}.part"
    if (
        path.exists()
        and (not remote.num_bytes or path.stat().st_size == remote.num_bytes)
        and _md5_fits(path, remote.md5)
    ):
        progress(remote.name, path.stat().st_size, path.stat().st_size)
        return path
    _fill_part(remote, part, progress, backoff_s)
    problem = _problem(remote, part)
    if problem:
        part.unlink()
        advice = (
            "The broken copy was deleted; run the same command again. If it happens twice, the file has "
            "changed upstream."
        )
        raise DataError(f"{remote.url}: {problem}. {advice}")
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    return path


def unzip(archive: Path, folder: Path) -> list[Path]:
    """Unpack the files of `archive` into `folder`, without the archive's own folders; each through a
    temporary name.

    Members with an absolute path, "..", or a link are refused before anything is written; so are two members
    of one name. Finished files of the right size and CRC are kept.
    """
    try:
        with zipfile.ZipFile(archive) as bundle:
            members = [m for m in bundle.infolist() if not m.is_dir() and not _is_clutter(m.filename)]
            for member in members:
                _refuse_unsafe(member, archive)
            targets = [folder / PurePosixPath(member.filename).name for member in members]
            if len(set(targets)) < len(targets):
                raise DataError(f"{archive} holds several files of one name. Unpack it by hand.")
            _check_space(
                folder, sum(m.file_size for m, t in zip(members, targets, strict=True) if not _is_same(t, m))
            )
            for member, target in zip(members, targets, strict=True):
                if not _is_same(target, member):
                    _extract(bundle, member, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(
            f"{archive} is not a whole zip file ({error}). Delete it and run the same command again."
        ) from error
    return targets


def _listing(name: str, base_url: str, backoff_s: float) -> list[RemoteFile]:
    if name == "amazon-kindle":
        base = base_url or SNAP
        return [
            RemoteFile(file, f"{base}/{file}")
            for file in ("reviews_Kindle_Store_5.json.gz", "meta_Kindle_Store.json.gz")
        ]
    base, wanted = base_url or ZENODO, "KuaiSAR_v2.zip" if name == "kuaisar" else "KuaiSAR.zip"
    api = f"{base}/api/records/{KUAISAR_RECORD}"
    try:
        entries = {entry["key"]: entry for entry in json.loads(_read_small(api, backoff_s))["files"]}
        entry = entries[wanted]
        kind, _, digest = entry["checksum"].partition(":")
        size = int(entry["size"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{api}: the answer does not describe {wanted} ({error!r}). Fetch it by hand from "
            f"{base}/records/{KUAISAR_RECORD}"
        ) from error
    return [
        RemoteFile(
            wanted,
            f"{base}/records/{KUAISAR_RECORD}/files/{quote(wanted)}?download=1",
            size,
            digest if kind == "md5" else "",
        )
    ]


def _read_small(url: str, backoff_s: float) -> bytes:
    failures = 0
    while True:
        try:
            with _open(url) as response:
                return response.read()
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            failures = _wait_or_give_up(url, error, failures, backoff_s)


def _fill_part(remote: RemoteFile, part: Path, progress: StageProgress, backoff_s: float) -> None:
    """Append to `part` until the server has no more; tries again as long as bytes keep coming."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        if remote.num_bytes and before >= remote.num_bytes:
            return
        try:
            if _append(remote, part, before, progress):
                return
            error: Exception = DataError("the connection ended early")
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            ConnectionError,
            TimeoutError,
            ssl.SSLError,
        ) as caught:
            error = caught
        gained = part.exists() and part.stat().st_size > before
        failures = _wait_or_give_up(remote.url, error, 0 if gained else failures, backoff_s)


def _append(remote: RemoteFile, part: Path, start: int, progress: StageProgress) -> bool:
    """One request from byte `start` on. True when the file is complete, False when the connection ended
    early."""
    try:
        response = _open(remote.url, {"Range": f"bytes={start}-"} if start else {})
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            # nothing after `start`: complete, or a part of another file; the check will tell
            complete = _content_range_total(error.headers.get("Content-Range", "")) in (
                start,
                remote.num_bytes,
            )
            if not complete:
                part.unlink()
            return complete
        raise
    with response:
        resumed = response.status == 206
        if resumed and not (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            raise http.client.HTTPException(
                f"asked for bytes from {start}, got {response.headers.get('Content-Range')}"
            )
        done = start if resumed else 0  # a server without Range sends all of it again
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else remote.num_bytes
        with open(part, "ab" if resumed else "wb") as file:
            _check_space(part.parent, max(0, (remote.num_bytes or total) - done))
            while block := response.read(CHUNK_BYTES):
                file.write(block)
                done += len(block)
                progress(remote.name, done, remote.num_bytes or total)
    return done >= total if total else True


def _open(url: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    if not url.startswith(("https://", "http://")):
        raise ConfigError(f"{url}: only http and https addresses can be fetched")
    request = urllib.request.Request(
        url, headers={"User-Agent": "gensr-download", "Accept-Encoding": "identity", **(headers or {})}
    )
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def _wait_or_give_up(url: str, error: Exception, failures: int, backoff_s: float) -> int:
    """Sleep before the next try; returns the number of failures in a row. Raises DataError when trying again
    is no use."""
    code = error.code if isinstance(error, urllib.error.HTTPError) else 0
    hopeless = 400 <= code < 500 and code not in (408, 416, 425, 429)
    if hopeless or failures + 1 >= TRIES:
        tried = "" if hopeless else f" ({failures + 1} tries)"
        advice = (
            "Check the network or proxy (https_proxy), then run the same command again: it resumes where it "
            "stopped."
        )
        raise DataError(f"{url}: {error}{tried}. {advice}") from error
    time.sleep(min(MAX_BACKOFF_S, backoff_s * 2**failures))
    return failures + 1


def _problem(remote: RemoteFile, path: Path) -> str:
    size = path.stat().st_size
    if remote.num_bytes and size != remote.num_bytes:
        return f"has {size:,} bytes, {remote.num_bytes:,} were announced"
    if not _md5_fits(path, remote.md5):
        return f"its md5 is not {remote.md5}"
    if not remote.md5 and path.name.removesuffix(".part").endswith(".gz"):
        return _gzip_problem(path)
    return ""


def _gzip_problem(path: Path) -> str:
    """gzip carries a CRC of its own: the check where no checksum is published."""
    try:
        with gzip.open(path) as file:
            for _ in pieces(file):
                pass
    except (OSError, EOFError, zlib.error) as error:
        return f"is not a whole gzip file ({error})"
    return ""


def _md5_fits(path: Path, md5: str) -> bool:
    if not md5:
        return True
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        for piece in pieces(file):
            digest.update(piece)
    return digest.hexdigest() == md5.lower()


def _content_range_total(header: str) -> int:
    total = header.rpartition("/")[2]
    return int(total) if total.isdigit() else -1


def _is_clutter(name: str) -> bool:
    return name.startswith("__MACOSX/") or PurePosixPath(name).name in (".DS_Store", "Thumbs.db")


def _refuse_unsafe(member: zipfile.ZipInfo, archive: Path) -> None:
    path = PurePosixPath(member.filename.replace("\\", "/"))
    is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or is_link:
        raise DataError(f"{archive} holds an unsafe path, {member.filename!r}. Nothing was unpacked.")


def _is_same(target: Path, member: zipfile.ZipInfo) -> bool:
    if not target.is_file() or target.stat().st_size != member.file_size:
        return False
    crc = 0
    with open(target, "rb") as file:
        for piece in pieces(file):
            crc = zlib.crc32(piece, crc)
    return crc == member.CRC


def _extract(bundle: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    temporary = target.with_name(f"{target.name}.part")
    try:
        with bundle.open(member) as source, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, CHUNK_BYTES)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free. Make room or choose "
            "another folder."
        )
