"""A prepared folder that lies elsewhere (a URL, or a slow disk) as files of this node.

    CACHE/blobs/SHA256     content of files, fetched once whatever the number of processes and jobs, checked,
                           never changed
    CACHE/folders/KEY/     a prepared folder made of links to them, and origin.json: where the rest of it is
    CACHE/joined/          matrices of several parts as one (data/item_tables.py)

Catalogue, tokenizer and CF table are there from the start; shards come when they are first read, or are
streamed from the URL (without data.cache_dir). Nothing is ever evicted: what is no longer wanted is to be
deleted by hand, while no job runs.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_shards.checksum import pieces
from data_shards.locks import lock
from data_shards.schema import SPLITS, Manifest, Shard, parse_manifest
from data_shards.secrets import mask_secrets
from trainer.config import DataConfig
from trainer.errors import DataError, EnvironmentProblem
from trainer.runtime.files import SECRET_MODE, atomic, write_text, writing
from trainer.runtime.progress import in_bytes

READ_ATTEMPTS, RETRY_AFTER_S = 3, 1.0  # a read error of a disk or network is tried again after 1 s, then 2 s
SPARE_BYTES = 64 << 20  # left free on the cache's disk
ORIGIN, CF_TABLE, CF_DIGEST = "origin.json", "cf/lightgcn.safetensors", "cf/lightgcn.sha256"
_SAFE_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_./-]*")  # names become paths and parts of commands
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST_LINE = re.compile(rf"({_SHA256.pattern}) +([0-9]{{1,18}}) +\S+\s*\Z")
_S3 = "pipe:aws s3 cp --only-show-errors "
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")
T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """Where a folder of the cache comes from."""

    url: str
    keep_shards: bool


# ---- names and bytes ---------------------------------------------------------------------------------------


def is_url(folder: str | Path) -> bool:
    """Whether text is for webdataset's gopen. Everything else is a path, whatever characters it has."""
    return _URL.match(str(folder)) is not None


def refuse_command(url: str, where: Path, named: str) -> None:
    """Run folders and prepared folders may come from somebody else, and a pipe: in them would run a command:
    raises DataError unless GENSR_ALLOW_PIPE=1 says that the folder is trusted. A command line is not asked.
    named: what in the file `where` holds the URL."""
    if url.startswith("pipe:") and os.environ.get("GENSR_ALLOW_PIPE") != "1":
        program = (url.removeprefix("pipe:").split() or [""])[0]
        raise DataError(
            f"{where}: its {named} runs the program {program!r}, which is not done for a folder that may "
            "come from elsewhere. Look at it; GENSR_ALLOW_PIPE=1 before the command allows it."
        )


def url_of(origin: str, name: str) -> str:
    """File `name` of a folder: a path, or what webdataset's gopen opens. Raises DataError for a name that
    could leave the folder or its command."""
    if not _SAFE_NAME.fullmatch(name):
        raise DataError(
            f"{mask_secrets(origin)}: its manifest lists {name!r}, which does not name a file inside a "
            "prepared folder. Prepare the folder again."
        )
    if not is_url(origin):
        return str(Path(origin) / name)
    url = origin.replace("{}", name) if "{}" in origin else f"{origin.rstrip('/')}/{name}"
    if not url.startswith("pipe:"):
        url = url.replace("'", "%27")  # the same URL; webdataset before 1.0 puts it between quotes in a shell
    return f"{_S3}{shlex.quote(url)} -" if url.startswith("s3://") else url


def shown(url: str | Path, name: str) -> str:
    """What messages call file `name` of a folder: its path or masked URL. Of a command only the program and
    the file's name are shown."""
    text = str(url)
    if text.startswith(_S3):
        return mask_secrets(text.removeprefix(_S3).removesuffix(" -").strip("'"))
    return f"{mask_secrets(text)} {name}" if text.startswith("pipe:") else mask_secrets(text)


def reason(error: BaseException) -> str:
    """Why a URL cannot be read. webdataset's message repeats the whole command, with what is secret in it."""
    ended = re.match(r"\(\(.*\}\): (exit -?\d+)", str(error), flags=re.DOTALL)
    return f"its program ends with {ended[1]}" if ended else mask_secrets(str(error))


def retried(what: str, read: Callable[[], T]) -> T:
    """read(), again after a moment when it raises EOFError or ValueError. Raises DataError naming `what`
    after READ_ATTEMPTS attempts."""
    for attempt in itertools.count(1):
        try:
            return read()
        except (EOFError, ValueError) as error:
            if attempt == READ_ATTEMPTS:
                raise DataError(
                    f"{what}: cannot be read: {error}. Check data.dir, or restore the file."
                ) from error
            warnings.warn(f"{what}: reading failed ({error}), trying again", stacklevel=2)
            time.sleep(RETRY_AFTER_S * attempt)
    raise AssertionError


def read_pieces(url: str) -> Iterator[bytes]:
    """The content of a URL or path. Raises EOFError when it cannot be opened or its command fails, also at
    the end; EnvironmentProblem without its command."""
    import webdataset as wds

    try:
        with wds.gopen(url, "rb") if is_url(url) else open(url, "rb") as stream:
            yield from pieces(stream)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and is_url(url):
            raise EnvironmentProblem(
                f"{shown(url, '')}: is read by the program {error.filename}, which is not installed here."
            ) from error
        raise EOFError(reason(error)) from error


def check_stream(url: str, num_bytes: int, sha256: str, write: Callable[[bytes], Any] = len) -> None:
    """Read a URL to its end, giving each piece to `write`. Raises EOFError or ValueError when size or
    checksum are not as given."""
    digest, size = hashlib.sha256(), 0
    for piece in read_pieces(url):
        digest.update(piece)
        size += len(piece)
        write(piece)
    if size != num_bytes:
        raise EOFError(f"{size} bytes, expected {num_bytes} (truncated?)")
    if digest.hexdigest() != sha256:
        raise ValueError("checksum differs from the manifest's (corrupt)")


# ---- blobs -------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process of the node at a time for this path. On a file system without locks all proceed: what they
    write is renamed, and the same."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(f".{path.name}.lock").open("a")
    with file:
        lock(file, wait=True)
        yield


def check_free_space(path: Path, num_bytes: int) -> None:
    """Raises EnvironmentProblem when the disk of `path` has no room for so many bytes."""
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes + SPARE_BYTES:
        raise EnvironmentProblem(
            f"{path.parent}: {in_bytes(num_bytes)} are needed, {in_bytes(free)} are free. Delete what is no "
            f"longer wanted there, choose another data.cache_dir, or leave it empty to stream a URL's shards."
        )


def blob(cache: Path, origin: str, name: str, num_bytes: int, sha256: str) -> Path:
    """File `name` of a folder as CACHE/blobs/SHA256, fetched by the first process that asks while the others
    wait."""
    if not _SHA256.fullmatch(sha256):  # it becomes a path
        raise DataError(f"{origin}: {sha256!r:.80} is no sha256 of {name}. Prepare the folder again.")
    path = cache / "blobs" / sha256
    if path.is_file() and path.stat().st_size == num_bytes:
        return path
    with locked(path):
        if not path.is_file() or path.stat().st_size != num_bytes:
            check_free_space(path, num_bytes)
            url = url_of(origin, name)

            def fetch() -> None:
                with atomic(path) as temporary, open(temporary, "wb") as file:
                    check_stream(url, num_bytes, sha256, file.write)

            retried(shown(url, name), fetch)
    return path


def _link(path: Path, target: Path) -> None:
    """path becomes a relative symbolic link to target; whoever comes second finds the same."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(target, path.parent))
        os.replace(temporary, path)


# ---- folders -----------------------------------------------------------------------------------------------


def local_folder(data: DataConfig) -> Path:
    """The prepared folder of data.dir as a folder of this node: itself, or, of a URL or with data.cache_dir,
    the cache's. Asks once a process.

    Raises DataError for what cannot be read or is not what the manifest says, EnvironmentProblem when the
    cache has no room.
    """
    if not is_url(data.dir) and not data.cache_dir:
        # absolute, because Arrow reads a relative "a:b" as a URL
        return Path(data.dir).absolute() if ":" in data.dir else Path(data.dir)
    origin = data.dir if is_url(data.dir) else str(Path(data.dir).resolve())
    return _cached_folder(origin, data.cache_dir)


@functools.cache
def _cached_folder(origin: str, cache_dir: str) -> Path:
    cache = Path(cache_dir).expanduser().resolve() if cache_dir else default_cache()
    content = _read_small(origin, "manifest.json")
    manifest = parse_manifest(content, shown(url_of(origin, "manifest.json"), "manifest.json"))
    files = [(file["name"], file["num_bytes"], file["sha256"]) for file in manifest.raw["catalog"]]
    files += _cf_table(origin)
    key = hashlib.sha256(json.dumps([origin, bool(cache_dir), manifest.hash, files]).encode()).hexdigest()[
        :16
    ]
    folder = cache / "folders" / key
    with locked(folder):
        missing = {
            sha256: num_bytes
            for _, num_bytes, sha256 in files + (_shard_files(manifest) if cache_dir else [])
        }
        check_free_space(
            folder, sum(size for sha256, size in missing.items() if not (cache / "blobs" / sha256).is_file())
        )
        for name, num_bytes, sha256 in files:
            _link(folder / name, blob(cache, origin, name, num_bytes, sha256))
        noted = {"url": origin, "keep_shards": bool(cache_dir)}
        write_text(folder / ORIGIN, json.dumps(noted) + "\n", SECRET_MODE)  # the URL may hold a password
        with atomic(folder / "manifest.json") as temporary:
            temporary.write_bytes(content)
    _fetched.add(folder.resolve())
    return folder


_fetched: set[Path] = set()  # folders of the cache that this process was asked for by their URL


def check_origin(folder: Path) -> None:
    """A folder that was given by its path names no command as its origin, unless the user allows it (see
    refuse_command): a prepared folder from elsewhere can hold an origin.json, too."""
    if folder.resolve() not in _fetched and (origin := origin_of(folder)):
        refuse_command(origin.url, folder / ORIGIN, "url")


def _read_small(origin: str, name: str) -> bytes:
    url = url_of(origin, name)
    return retried(shown(url, name), lambda: b"".join(read_pieces(url)))


def _shard_files(manifest: Manifest) -> list[tuple[str, int, str]]:
    return [
        (shard.name, shard.num_bytes, shard.sha256) for split in SPLITS for shard in manifest.shards(split)
    ]


def _cf_table(origin: str) -> list[tuple[str, int, str]]:
    """The CF table, as cf/lightgcn.sha256 describes it: it is made later than the manifest. None is no error
    yet: evaluation of baselines needs none."""
    try:
        content = _read_small(origin, CF_DIGEST)
    except DataError as error:
        warnings.warn(f"no CF table: {error}", stacklevel=2)
        return []
    return [parse_cf_digest(content, url_of(origin, CF_DIGEST))]


def parse_cf_digest(content: bytes, where: str) -> tuple[str, int, str]:
    """cf/lightgcn.sha256 → name, bytes and sha256 of the table's file. Raises DataError naming `where`."""
    found = _DIGEST_LINE.match(content.decode(errors="replace"))
    if found is None:
        raise DataError(
            f"{where}: must be a sha256, a number of bytes and a name, got {content[:80]!r}. Make the table "
            "again with: gensr cf"
        )
    return CF_TABLE, int(found[2]), found[1]


def default_cache() -> Path:
    """Where a URL's catalogue is kept without data.cache_dir: $XDG_CACHE_HOME/gensr or ~/.cache/gensr."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gensr"


def origin_of(folder: str | Path) -> Origin | None:
    """What a folder of the cache is a copy of; None for any other folder."""
    path = Path(folder) / ORIGIN
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        url, keep_shards = document["url"], document["keep_shards"]
    except (ValueError, KeyError, TypeError, RecursionError):
        url, keep_shards = None, None
    if not isinstance(url, str) or not isinstance(keep_shards, bool):
        raise DataError(
            f"{path}: is not what gensr writes there, a url and keep_shards. Remove the file, or the folder "
            "if it is one of the cache"
        )
    return Origin(url, keep_shards)


def cache_of(folder: str | Path) -> Path:
    """The cache that a folder belongs to, or the default one."""
    return Path(folder).parent.parent if origin_of(folder) else default_cache()


def shard_place(folder: str | Path, shard: Shard) -> Path | str:
    """The shard as a file of this node (fetched now if the cache keeps shards), or the URL to stream."""
    path, origin = Path(folder) / shard.name, origin_of(folder)
    if origin is None:
        return path
    if not origin.keep_shards:
        return url_of(origin.url, shard.name)
    if not path.is_file():
        _link(path, blob(cache_of(folder), origin.url, shard.name, shard.num_bytes, shard.sha256))
    return path
