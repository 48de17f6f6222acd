"""Prepared folders behind URLs: http from a real server, pipe: and s3 through a command; the node's cache;
what is refused and what is tried again."""

import functools
import http.server
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from data_shards.schema import read_manifest
from tests.tiny_folder import make_tiny_folder
from trainer.config import DataConfig
from trainer.data import EvalStream, TrainStream, node_cache, read_blocks
from trainer.data.cf_table import load_cf
from trainer.data.folder import PreparedFolder
from trainer.data.node_cache import local_folder, url_of
from trainer.errors import DataError, EnvironmentProblem


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; counts requests, and fails those that the test wants to fail."""

    asked: ClassVar[list[str]] = []
    failures: ClassVar[
        dict[str, list[str]]
    ] = {}  # path → what happens to the next requests: "cut", "reset" or "flip" (a bit of byte flip_at)
    flip_at: ClassVar[int] = 0

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if not self.failures.get(self.path):
            return super().do_GET()
        what = self.failures[self.path].pop(0)
        content = bytearray(Path(self.translate_path(self.path)).read_bytes())
        sent = len(content) if what == "flip" else len(content) // 8
        content[self.flip_at] ^= what == "flip"
        self.send_response(200)
        self.send_header("Content-Length", str(sent if what == "cut" else len(content)))
        self.end_headers()
        self.wfile.write(content[:sent])
        return None

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(node_cache, "RETRY_AFTER_S", 0.0)
    monkeypatch.setattr("trainer.data.blocks.RETRY_AFTER_S", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    node_cache._cached_folder.cache_clear()
    Handler.asked, Handler.failures = [], {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny"), train_blocks=[[30, 18], [24], [24]], num_valid=8)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed (Debian's package curl): webdataset reads http with it")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def events(folder: Path, config: DataConfig, batches: int = 9) -> list[list[int]]:
    stream = iter(TrainStream(PreparedFolder.at(folder), config, 5, 24, 24))
    return [next(stream).event_id.tolist() for _ in range(batches)]


def asked_shards() -> list[str]:
    return [path for path in Handler.asked if "/shards/train" in path]


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        EnvironmentProblem,
        match=r"https://host/data/manifest\.json: is read by the program curl, which is not installed",
    ):
        local_folder(DataConfig(dir="https://host/data"))


def test_a_prepared_folder_from_elsewhere_runs_no_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written into folders of the cache can lie in any folder: missing shards come from its URL."""
    given, target = tmp_path / "given", tmp_path / "touched"
    shutil.copytree(folder, given)
    shutil.rmtree(given / "shards")
    (given / "origin.json").write_text(
        json.dumps({"url": f"pipe:touch {target}; cat {folder}/{{}}", "keep_shards": False})
    )
    config = DataConfig(dir=str(given))
    for look in (lambda: PreparedFolder.at(given), lambda: PreparedFolder.open(config)):
        with pytest.raises(
            DataError, match=r"origin\.json: its url runs the program 'touch'.*GENSR_ALLOW_PIPE=1"
        ):
            look()
    assert not target.exists()
    monkeypatch.setenv("GENSR_ALLOW_PIPE", "1")
    assert events(given, config) == events(folder, DataConfig(dir=str(folder)))
    assert target.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"url": 3, "keep_shards": true}', "[" * 100_000])
def test_an_origin_that_is_none_is_refused(folder: Path, tmp_path: Path, text: str) -> None:
    given = tmp_path / "given"
    shutil.copytree(folder, given)
    (given / "origin.json").write_text(text)
    with pytest.raises(DataError, match=r"origin\.json: is not what gensr writes there.*Remove the file"):
        PreparedFolder.at(given)


def test_a_url_ends_no_quotes_of_a_shell() -> None:
    assert url_of("https://host/it's/{}", "manifest.json") == "https://host/it%27s/manifest.json"
    assert url_of("pipe:cat '/my data/{}'", "manifest.json") == "pipe:cat '/my data/manifest.json'"


@pytest.mark.parametrize("keep", [False, True], ids=["streamed", "kept"])
@pytest.mark.parametrize("kind", ["http", "pipe", "pipe with {}", "s3", "local"])
def test_a_folder_elsewhere_gives_the_same_data(
    folder: Path, url: str, tmp_path: Path, kind: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "aws").write_text(
        f'#!/bin/sh\n[ "$1 $2" = "s3 cp" ] && cat "{folder}/${{4#s3://bucket/data/}}"\n'
    )
    (tmp_path / "bin" / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    places = {
        "http": url,
        "pipe": f"pipe:cat {folder}",
        "pipe with {}": f"pipe:cat {folder}/{{}} | cat",
        "s3": "s3://bucket/data",
        "local": str(folder),
    }
    config = DataConfig(dir=places[kind], history_max=6, cache_dir=str(tmp_path / "cache") if keep else "")
    here = local_folder(config)
    manifest = read_manifest(here)
    assert manifest.hash == read_manifest(folder).hash and load_cf(here, manifest).holdout == "crossfit"
    assert events(here, config) == events(folder, config)
    assert len(list(EvalStream(PreparedFolder.at(here), "valid", config, 4))) == 2
    if kind != "local":
        assert (here != folder) and sorted(p.name for p in here.glob("shards/*.tar")) == (
            ["train-000000.tar", "train-000001.tar", "train-000002.tar", "valid-000000.tar"] if keep else []
        )


def test_each_shard_is_fetched_once_for_all_processes_of_a_node(
    folder: Path, url: str, tmp_path: Path
) -> None:
    config = DataConfig(dir=url, history_max=6, cache_dir=str(tmp_path / "cache"))
    results: Any = multiprocessing.get_context("fork").Queue()

    def job() -> None:
        results.put(events(local_folder(config), config))

    jobs = [multiprocessing.get_context("fork").Process(target=job) for _ in range(4)]
    for process in jobs:
        process.start()
    sequences = [results.get(timeout=120) for _ in jobs]
    for process in jobs:
        process.join()
    assert all(sequence == events(folder, config) for sequence in sequences)
    assert sorted(asked_shards()) == sorted(set(asked_shards())) and len(asked_shards()) == 3
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize("keep", [False, True], ids=["streamed", "kept"])
@pytest.mark.parametrize("what", ["cut", "reset"])
def test_a_connection_that_breaks_is_tried_again(
    folder: Path, url: str, tmp_path: Path, what: str, keep: bool
) -> None:
    config = DataConfig(dir=url, history_max=6, cache_dir=str(tmp_path / "cache") if keep else "")
    Handler.failures = {"/shards/train-000001.tar": [what, what], "/catalog/items.parquet": [what]}
    with pytest.warns(UserWarning, match="trying again"):
        assert events(local_folder(config), config) == events(folder, config)


@pytest.mark.parametrize("keep", [False, True], ids=["streamed", "kept"])
def test_a_shard_that_stays_bad_is_named_or_skipped_as_asked(
    folder: Path, url: str, tmp_path: Path, keep: bool
) -> None:
    bad = "/shards/train-000001.tar"
    config = DataConfig(dir=url, history_max=6, cache_dir=str(tmp_path / "cache") if keep else "")
    Handler.failures = {bad: ["cut"] * 99}
    with (
        pytest.warns(UserWarning, match="trying again"),
        pytest.raises(DataError, match=r"train-000001\.tar: cannot be read"),
    ):
        events(local_folder(config), config)
    skipping = DataConfig(dir=url, history_max=6, cache_dir=config.cache_dir, on_bad_shard="skip")
    with pytest.warns(UserWarning, match="skipped 24 training events"):
        assert TrainStream(PreparedFolder.at(local_folder(skipping)), skipping, 5, 24, 24).num_events == 72


def test_a_streamed_shard_with_another_bit_is_named(folder: Path, url: str) -> None:
    """In the middle of a column, where Arrow sees nothing wrong."""
    shard = read_manifest(folder).shards("train")[0]
    here = local_folder(DataConfig(dir=url))
    Handler.failures = {f"/{shard.name}": ["flip"]}
    ids = np.arange(shard.blocks[0]).tobytes()  # the column event_id of the first block
    Handler.flip_at = (folder / shard.name).read_bytes().index(ids) + len(ids) // 2
    blocks = read_blocks(here, shard)
    sizes = [next(blocks).num_rows for _ in shard.blocks]
    assert sizes == list(shard.blocks)
    with pytest.raises(DataError, match=r"train-000000\.tar: checksum differs"):
        next(blocks)


def test_another_cf_table_is_another_folder(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    config = DataConfig(dir=f"pipe:cat {source}", cache_dir=str(tmp_path / "cache"))
    first = local_folder(config)
    table = (source / "cf" / "lightgcn.safetensors").read_bytes()
    make_tiny_folder(tmp_path / "other", train_blocks=[[30, 18], [24], [24]], num_valid=8, seed=1)
    shutil.copytree(tmp_path / "other" / "cf", source / "cf", dirs_exist_ok=True)
    node_cache._cached_folder.cache_clear()
    second = local_folder(config)
    # a run that still reads it is not disturbed
    assert first != second and (first / "cf" / "lightgcn.safetensors").read_bytes() == table
    manifest = read_manifest(second)
    assert manifest.hash == read_manifest(first).hash
    with pytest.raises(DataError, match="another split"):  # the fingerprint check stays
        load_cf(second, manifest)


def test_what_cannot_be_used_is_said(
    folder: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.warns(UserWarning, match="trying again"),
        pytest.raises(DataError, match=r"nothing-here/manifest\.json: cannot be read"),
    ):
        local_folder(DataConfig(dir=f"{url}/nothing-here"))
    with pytest.raises(DataError, match="this needs a folder"):
        read_manifest(url)
    for name in ("../../etc/passwd", "/etc/passwd", "shards/a b.tar", "shards/$(rm -rf x).tar", "a;b"):
        with pytest.raises(DataError, match="does not name a file"):
            url_of("pipe:cat /data", name)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(EnvironmentProblem, match=r"data\.cache_dir"):
        local_folder(DataConfig(dir=url, cache_dir=str(tmp_path / "cache")))


def test_a_folder_without_a_cf_table_says_where_to_make_it(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source, ignore=shutil.ignore_patterns("cf"))
    with pytest.warns(UserWarning, match="no CF table"):
        here = local_folder(DataConfig(dir=f"pipe:cat {source}"))
    assert len(PreparedFolder.at(here).columns("train", ["item"])["item"]) == 96
    with pytest.raises(DataError, match="gensr cf OUT"):
        load_cf(here, read_manifest(here))


def test_a_file_that_changed_under_its_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    content = bytearray((source / "shards" / "train-000000.tar").read_bytes())
    content[len(content) // 2] ^= 1
    (source / "shards" / "train-000000.tar").write_bytes(content)
    here = local_folder(DataConfig(dir=f"pipe:cat {source}", cache_dir=str(tmp_path / "cache")))
    with pytest.warns(UserWarning, match="trying again"), pytest.raises(DataError, match="checksum"):
        list(read_blocks(here, read_manifest(here).shards("train")[0]))
    assert json.loads((here / "origin.json").read_text())["keep_shards"] and not list(
        (tmp_path / "cache" / "blobs").glob("*.tmp")
    )


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../../../victim/precious"}, r"manifest\.json: catalog\.\d+\.name: .*victim/precious"),
        ({"name": "/victim/precious"}, r"catalog\.\d+\.name: "),
        ({"sha256": "../../../victim/precious"}, r"catalog\.\d+\.sha256: "),
        ({"num_bytes": -1}, r"catalog\.\d+\.num_bytes: "),
    ],
)
def test_a_manifest_names_nothing_outside_the_folder(
    folder: Path, url: str, tmp_path: Path, change: dict[str, Any], message: str, cached: bool
) -> None:
    """Its catalogue lists a good file twice: once as it is, once with `change`, so that the content is there
    already."""
    evil = tmp_path / "evil"
    shutil.copytree(folder, evil)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("mine")
    raw = json.loads((evil / "manifest.json").read_text())
    raw["catalog"].append({**raw["catalog"][0], **change})
    (evil / "manifest.json").write_text(json.dumps(raw))
    dir_, cache = (str(evil), str(tmp_path / "cache")) if cached else (f"pipe:cat {evil}", "")
    with pytest.raises(DataError, match=message):
        local_folder(DataConfig(dir=dir_, cache_dir=cache))
    assert (tmp_path / "victim" / "precious").read_text() == "mine"
    assert not (tmp_path / "victim" / "precious").is_symlink()
    assert not list(tmp_path.glob("*/blobs/*")), "refused before anything is fetched"


@pytest.mark.parametrize("line", ["../../victim 5 name", "nothing", f"{'0' * 64} many name", "\xff"])
def test_the_digest_of_the_cf_table_is_a_digest(folder: Path, tmp_path: Path, line: str) -> None:
    evil = tmp_path / "evil"
    shutil.copytree(folder, evil)
    (evil / "cf" / "lightgcn.sha256").write_bytes(line.encode("latin-1"))
    with pytest.raises(DataError, match=r"lightgcn\.sha256: must be a sha256, a number of bytes and a name"):
        local_folder(DataConfig(dir=str(evil), cache_dir=str(tmp_path / "cache")))
