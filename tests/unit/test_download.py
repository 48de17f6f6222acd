"""Downloads from a local server that cuts connections, ignores Range, lies about sizes, or is gone."""

import gzip
import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_shards.download import download, unzip
from data_shards.errors import ConfigError, DataError

CSV = {
    f"{name}.csv": (f"{name}\n" + "1,2,3\n" * 20_000).encode()
    for name in ("rec_inter", "src_inter", "item_features")
}
RECORD = "/api/records/8181109"
FILE = "/records/8181109/files/KuaiSAR.zip"


class Server(ThreadingHTTPServer):
    """Serves `files`; `cut_after` bytes of a response the connection closes, `cuts` times; remembers the
    Range of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cuts, self.cut_after = 0, 0
        self.errors: list[int] = []  # status codes of the next requests of files
        self.with_range = True
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        wanted = self.headers.get("Range", "")
        self.server.requests.append((path, wanted))
        if self.server.errors and path != RECORD:
            self.send_error(self.server.errors.pop(0))
            return
        if path not in self.server.files:
            self.send_error(404)
            return
        body = self.server.files[path]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.with_range else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        if self.server.cuts and path != RECORD:
            self.server.cuts -= 1
            rest = rest[: self.server.cut_after]
        self.wfile.write(rest)

    def log_message(self, format: str, *args: object) -> None:
        pass


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as bundle:
        for name, body in files.items():
            bundle.writestr(name, body)
    return buffer.getvalue()


def describe(server: Server, body: bytes, **changes: object) -> None:
    entry = {
        "key": "KuaiSAR.zip",
        "size": len(body),
        "checksum": "md5:" + hashlib.md5(body).hexdigest(),
    } | changes
    server.files[RECORD] = json.dumps({"files": [entry]}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    body = zipped({f"KuaiSAR_final/{name}": text for name, text in CSV.items()})
    running.files[FILE] = body
    describe(running, body)
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def fetch(server: Server, folder: Path, name: str = "kuaisar-small", **options: object) -> list[Path]:
    return download(name, folder, base_url=server.url, backoff_s=0.001, **options)  # type: ignore[arg-type]


def test_whole_archive_is_checked_and_unpacked(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    files = fetch(server, tmp_path / "raw", progress=lambda *step: seen.append(step))
    assert {path.name: path.read_bytes() for path in files} == CSV
    assert seen[-1] == ("KuaiSAR.zip", len(server.files[FILE]), len(server.files[FILE]))
    assert not list(tmp_path.rglob("*.part"))


def test_cut_connections_are_resumed_where_they_stopped(server: Server, tmp_path: Path) -> None:
    server.cuts, server.cut_after = 3, 70_000
    fetch(server, tmp_path)
    ranges = [wanted for path, wanted in server.requests if path == FILE]
    assert ranges == ["", "bytes=70000-", "bytes=140000-", "bytes=210000-"]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")} == CSV


def test_a_part_left_by_a_killed_download_is_continued(server: Server, tmp_path: Path) -> None:
    (tmp_path / "KuaiSAR.zip.part").write_bytes(server.files[FILE][:123_456])
    fetch(server, tmp_path)
    assert (FILE, "bytes=123456-") in server.requests


def test_a_server_without_range_starts_over(server: Server, tmp_path: Path) -> None:
    server.with_range = False
    server.cuts, server.cut_after = 1, 70_000
    fetch(server, tmp_path)
    assert (tmp_path / "KuaiSAR.zip").read_bytes() == server.files[FILE]


def test_passing_server_errors_are_tried_again(server: Server, tmp_path: Path) -> None:
    server.errors = [503, 429, 500]
    assert len(fetch(server, tmp_path)) == 3


def test_complete_files_are_not_fetched_again(server: Server, tmp_path: Path) -> None:
    fetch(server, tmp_path)
    (tmp_path / "rec_inter.csv").write_bytes(b"broken")  # only this one is unpacked again
    untouched = (tmp_path / "src_inter.csv").stat().st_mtime_ns
    server.requests.clear()
    fetch(server, tmp_path)
    assert server.requests == [(RECORD, "")]
    assert (tmp_path / "rec_inter.csv").read_bytes() == CSV["rec_inter.csv"]
    assert (tmp_path / "src_inter.csv").stat().st_mtime_ns == untouched


@pytest.mark.parametrize("change", [{"checksum": "md5:" + "0" * 32}, {"size": 1000}])
def test_a_wrong_file_is_refused_and_removed(
    server: Server, tmp_path: Path, change: dict[str, object]
) -> None:
    describe(server, server.files[FILE], **change)
    with pytest.raises(DataError, match=r"md5 is not|were announced"):
        fetch(server, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named_at_once(server: Server, tmp_path: Path) -> None:
    del server.files[FILE]
    with pytest.raises(DataError, match=r"KuaiSAR\.zip.*404"):
        fetch(server, tmp_path)
    assert len([path for path, _ in server.requests if path == FILE]) == 1


@pytest.mark.parametrize("answer", [b"<html>", b'{"files": []}', b'{"files": [{"key": "KuaiSAR.zip"}]}'])
def test_a_record_that_does_not_describe_the_file(server: Server, tmp_path: Path, answer: bytes) -> None:
    server.files[RECORD] = answer
    with pytest.raises(DataError, match=r"does not describe KuaiSAR\.zip"):
        fetch(server, tmp_path)


def test_no_network_says_what_to_do(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"8 tries.*run the same command again"):
        download("kuaisar", tmp_path, base_url="http://127.0.0.1:9", backoff_s=0.001)


def test_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kuaisar, kuaisar-small, amazon-kindle"):
        download("kuaisr", tmp_path)


def test_amazon_is_two_gzip_files_checked_by_their_own_crc(server: Server, tmp_path: Path) -> None:
    texts = {
        "reviews_Kindle_Store_5.json.gz": b'{"asin": "A"}\n' * 5000,
        "meta_Kindle_Store.json.gz": b"{'asin': 'A'}\n",
    }
    bodies = {name: gzip.compress(text) for name, text in texts.items()}
    server.files |= {f"/{name}": body for name, body in bodies.items()}
    files = fetch(server, tmp_path, "amazon-kindle")
    assert {path.name: path.read_bytes() for path in files} == bodies
    server.files["/meta_Kindle_Store.json.gz"] = bodies["meta_Kindle_Store.json.gz"][:-6]
    with pytest.raises(DataError, match="not a whole gzip"):
        fetch(server, tmp_path / "again", "amazon-kindle")
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["reviews_Kindle_Store_5.json.gz"]


@pytest.mark.parametrize(
    "name", ["../evil.csv", "/etc/evil.csv", "a/../../evil.csv", "..\\evil.csv", "C:/evil.csv"]
)
def test_paths_out_of_the_folder_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "bad.zip"
    archive.write_bytes(zipped({"good.csv": b"1", name: b"2"}))
    with pytest.raises(DataError, match="unsafe path"):
        unzip(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.zip"]


def test_links_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "link.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        link = zipfile.ZipInfo("rec_inter.csv")
        link.external_attr = 0o120777 << 16
        bundle.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="unsafe path"):
        unzip(archive, tmp_path)


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "twice.zip"
    archive.write_bytes(zipped({"a/rec_inter.csv": b"1", "b/rec_inter.csv": b"2"}))
    with pytest.raises(DataError, match="several files of one name"):
        unzip(archive, tmp_path)


def test_a_damaged_member_leaves_no_file(tmp_path: Path) -> None:
    archive, body = tmp_path / "bad.zip", bytearray(zipped({"rec_inter.csv": b"abcdefgh" * 100}))
    body[200] ^= 0xFF  # inside the stored data: the CRC no longer fits
    archive.write_bytes(bytes(body))
    with pytest.raises(DataError, match="not a whole zip"):
        unzip(archive, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.zip"]


def test_mac_clutter_is_left_out(tmp_path: Path) -> None:
    archive = tmp_path / "mac.zip"
    archive.write_bytes(
        zipped({"k/rec_inter.csv": b"1", "__MACOSX/k/._rec_inter.csv": b"2", "k/.DS_Store": b"3"})
    )
    assert unzip(archive, tmp_path) == [tmp_path / "rec_inter.csv"]
