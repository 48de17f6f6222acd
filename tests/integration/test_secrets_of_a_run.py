"""A run with secrets in every URL: none of them in any file of the run, in MLflow, or on the console."""

import base64
import functools
import http.server
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.test_train import BASE
from tests.integration.test_urls import Quiet
from tests.mlflow_server import Server
from tests.tiny_folder import make_tiny_folder
from trainer.cli import main
from trainer.data import node_cache
from trainer.demo import free_port
from trainer.evaluation.compare import compare, compare_lines
from trainer.runs.weights import load_run_config
from trainer.tracking import tracker
from trainer.training.plan import dry_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE_S = 15.0
SECRETS = ("PwOfData", "SigOfData", "AuthOfData", "PwOfMlflow", "TokenOfMlflow")
KEEP_ALL = {"config.yaml", "origin.json"}  # what runs again, for its owner only


class Protected(Quiet):
    """Answers who gives the password and both parameters."""

    def do_GET(self) -> None:
        password = base64.b64encode(b"me:PwOfData").decode()
        if (
            self.headers["Authorization"] != f"Basic {password}"
            or "sig=SigOfData&auth=AuthOfData" not in self.path
        ):
            self.send_error(403)
            return
        super().do_GET()


@pytest.fixture(scope="module")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_tiny_folder(tmp_path_factory.mktemp("data"), num_valid=12)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Protected, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://me:PwOfData@127.0.0.1:{server.server_port}/{{}}?sig=SigOfData&auth=AuthOfData"
    server.shutdown()


class Said:
    """How a command ended, and everything that it wrote to the console."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.returncode, self.stdout, self.stderr = code, stdout, stderr


@pytest.fixture
def gensr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """The command in this process: its libraries take seconds to import, and it is given seven times."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    node_cache._cached_folder.cache_clear()
    for wait in ("OPEN_WAIT_S", "FINISH_WAIT_S"):  # for a server that never answers
        monkeypatch.setattr(tracker, wait, min(getattr(tracker, wait), PATIENCE_S))

    def run(*words: str) -> Said:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["gensr", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Said(code, *capfd.readouterr())

    return run


def nothing_leaks(folder: Path, *outputs: str) -> None:
    for output in outputs:
        assert not [secret for secret in SECRETS if secret in output], output
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if path.name in KEEP_ALL and "mlartifacts" not in path.parts and "artifacts" not in path.parts:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
            continue
        content = path.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], path


def test_a_run_with_secrets_in_both_urls(data_url: str, tmp_path: Path, gensr: Callable[..., Said]) -> None:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    uri = server.uri.replace("//", "//boss:PwOfMlflow@")
    settings = [
        *BASE,
        "tracking.enabled=true",
        f"tracking.uri={uri}",
        f"data.dir={data_url}",
        "run.max_steps=2",
    ]
    run_dir = tmp_path / "runs" / "one"
    try:
        done = gensr("train", "demo", *settings, f"run.dir={run_dir}")
        assert done.returncode == 0, done.stderr
        assert (run_dir / "tracking.json").is_file() and not (run_dir / "tracking-spool.jsonl").exists()
        verbs = (
            gensr("evaluate", str(run_dir)),
            gensr("register", str(run_dir), "secretive"),
        )
        assert [verb.returncode for verb in verbs] == [0] * 2, [verb.stderr for verb in verbs]
        comparison = compare([run_dir, run_dir])
    finally:
        server.kill()
    shown = [*compare_lines(comparison), *dry_run(load_run_config(run_dir), "demo").lines]
    nothing_leaks(tmp_path, *(text for verb in (done, *verbs) for text in (verb.stdout, verb.stderr)), *shown)


def test_errors_of_urls_with_secrets(
    data_url: str, tmp_path: Path, gensr: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is not there, and a tracking server that is not."""
    for wait in ("OPEN_WAIT_S", "FINISH_WAIT_S"):
        monkeypatch.setattr(tracker, wait, 2.0)
    run_dir = tmp_path / "runs" / "two"
    wrong = gensr("train", "demo", f"data.dir={data_url.replace('{}', 'nothing/{}')}", f"run.dir={run_dir}")
    assert wrong.returncode == 1 and "manifest.json" in wrong.stderr and "exit 22" in wrong.stderr
    pipe = f"pipe:curl -sf -u me:PwOfData 'http://127.0.0.1:{free_port()}/{{}}?sig=SigOfData'"
    refused = gensr("train", "demo", f"data.dir={pipe}", f"run.dir={run_dir}")
    assert refused.returncode == 1 and "manifest.json" in refused.stderr
    down = f"tracking.uri=http://boss:PwOfMlflow@127.0.0.1:{free_port()}/?token=TokenOfMlflow"
    settings = [*BASE, "tracking.enabled=true", down, f"data.dir={data_url}", "run.max_steps=1"]
    trained = gensr("train", "demo", *settings, f"run.dir={run_dir}", "run.timeout_s=60")
    assert trained.returncode == 0 and (run_dir / "tracking-spool.jsonl").is_file(), trained.stderr
    imported = gensr("runs", "import", str(run_dir))
    assert imported.returncode == 1
    nothing_leaks(
        tmp_path,
        *(text for verb in (wrong, refused, trained, imported) for text in (verb.stdout, verb.stderr)),
    )
