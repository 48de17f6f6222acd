"""Signals while the main thread hangs where Python's handlers cannot run: in a lock of C, as in a collective.
And what a killed process leaves."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from trainer.runtime.stopping import EXIT_FORCED, StopSignal

ROOT = Path(__file__).parents[2]

HANGS = """
import ctypes, signal, sys, types
from trainer.runtime import stopping
stopping.GRACE_S = 0.5
stopping.FORCE_AFTER_S = {signal.SIGTERM: 0.2, signal.SIGINT: 0.2}
one_process = types.SimpleNamespace(num_processes=1)
stop = stopping.StopSignal(one_process, last_words=lambda reason: print("last words:", reason, flush=True))
stop._limit_s = float(sys.argv[1])
with stop:
    print("hangs", flush=True)
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # for ever; no signal interrupts it
"""


def hanging(limit_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HANGS, str(limit_s)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "hangs\n"
    time.sleep(0.2)
    return process


def test_the_ranks_agreement_waits_as_long_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """run.timeout_s of two hours: a validation may take one."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch.distributed, "new_group", lambda **settings: seen.update(settings))
    two: Any = SimpleNamespace(num_processes=2)
    StopSignal(two, timeout_s=7200)
    assert seen == {"backend": "gloo", "timeout": timedelta(hours=2)}


@pytest.mark.timeout(120)
def test_a_second_sigterm_ends_what_hangs() -> None:
    process = hanging(1000)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None, "the first one asks"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_FORCED
    assert "last words: a second SIGTERM" in out
    assert "pthread" in err or "File" in err, "where each thread hangs"


@pytest.mark.timeout(120)
def test_no_sign_of_life_ends_what_hangs() -> None:
    process = hanging(1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_FORCED and "last words: no step for" in out


LAUNCHER = """
import subprocess, sys, time
rank = "from trainer.runtime.stopping import end_with_launcher as e; e(); print('waits', flush=True); "
rank += "import time; time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_process_ends_with_its_killed_launcher() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    word, pid = launcher.stdout.readline().split()
    assert word == "waits"
    rank = psutil.Process(int(pid))
    launcher.kill()
    launcher.wait()
    psutil.wait_procs([rank], timeout=20)
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE
