"""`mlflow server` for tests: a real one, that can be killed and started again with the same database and
port."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from mlflow.tracking import MlflowClient

from trainer.demo import free_port

START_S = 240  # about 10 s on free cores


class Server:
    """Listens on loopback; everything it keeps is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.client = MlflowClient(self.uri)

    def start(self) -> None:
        store = [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
            *store,
        ]
        # its job runners cost more than all the rest
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=self.folder,
                env=environment,
            )
        wait_until_up(f"{self.uri}/health", self.process, self.folder / "server.log")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def wait_until_up(url: str, process: subprocess.Popen, log: Path) -> None:
    """Until `url` answers 200; fails with the log's end when the process ends or START_S have passed."""
    deadline_s = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()[-3000:]
        time.sleep(0.1)
