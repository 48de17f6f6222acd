"""A rank that is killed, or stopped for ever, ends the whole job within run.timeout_s; what is left can be
continued. And a short torture."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from data_shards.settings import to_yaml
from tests.distributed import torture
from tests.distributed.jobs import Preloaded, processes_of, start
from tests.tiny_folder import make_tiny_folder
from trainer.configs import load_config
from trainer.runtime.stopping import end_with_children

TIMEOUT_S = 15
LAUNCHER_S = 30  # torch's agent gives a process that does not heed SIGTERM so long
SLACK_S = 240  # for a busy machine

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1500)]


def running(folder: Path) -> tuple[subprocess.Popen[bytes], Path, list[psutil.Process]]:
    """A run of two processes that has saved a checkpoint, and its ranks."""
    make_tiny_folder(folder / "data")
    settings = [
        f"data.dir={folder / 'data'}",
        *torture.SETTINGS,
        "run.max_steps=100000",
        f"run.timeout_s={TIMEOUT_S}",
    ]
    (folder / "run.yaml").write_text(to_yaml(load_config(None, settings)))
    launcher, run_dir = start(folder, folder / "run"), folder / "run"
    deadline_s = time.monotonic() + 600
    while not (run_dir / "checkpoints" / "latest").exists():
        assert launcher.poll() is None and time.monotonic() < deadline_s, (folder / "run.log").read_text()[
            -3000:
        ]
        time.sleep(0.2)
    return (
        launcher,
        run_dir,
        sorted(processes_of(run_dir, ranks_only=True), key=lambda process: process.create_time()),
    )


@pytest.mark.parametrize("blow", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_a_lost_or_hung_peer_ends_the_job(tmp_path: Path, blow: signal.Signals) -> None:
    launcher, run_dir, ranks = running(tmp_path)
    try:
        assert len(ranks) == 2
        os.kill(ranks[1].pid, blow)
        struck_s = time.monotonic()
        assert launcher.wait(TIMEOUT_S + LAUNCHER_S + SLACK_S) != 0
        log = (tmp_path / "run.log").read_text()
        print(f"{blow.name}: the job ended after {time.monotonic() - struck_s:.0f} s")
        assert not processes_of(run_dir), log[-3000:]
        status = json.loads((run_dir / "status.json").read_text())["status"]
        assert status in ("crashed", "running"), "worth another attempt"
        assert list((run_dir / "checkpoints").glob("step-*")), "with something to go on from"
    finally:
        end_with_children(launcher.pid)
        for rank in ranks:
            end_with_children(rank.pid)


@pytest.mark.long
def test_a_short_torture(tmp_path: Path) -> None:
    """Forked ranks: what a launcher does when one is lost is tested above."""
    history = torture.torture(tmp_path, kills=3, num_steps=40, launcher=Preloaded)
    assert {kill.victim for kill in history} > {"all"}
