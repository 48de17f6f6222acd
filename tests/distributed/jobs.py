"""A training of two processes, ZeRO-2, that a test starts, watches and kills: by accelerate, or forked from a
process that has the libraries."""

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import psutil

import ds_configs
from tests.distributed.launching import ROOT, forkserver, variables_of
from trainer.configs import load_config
from trainer.demo import free_port


class Launched:
    """`accelerate launch`, as a user gives it again and again: about 20 s of a core before the first step,
    most of it imports."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._launcher = start(folder, run_dir)

    def returncode(self, timeout_s: float = 0) -> int | None:
        """None while it runs, after waiting for so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._launcher.wait(timeout_s)
        return None

    def ranks(self) -> list[psutil.Process]:
        return sorted(processes_of(self._run_dir, ranks_only=True), key=lambda process: process.create_time())

    def processes(self) -> list[psutil.Process]:
        return processes_of(self._run_dir)


class Preloaded:
    """The same job forked from a process that has the libraries in memory: what `accelerate launch` does,
    without 20 s of imports."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self._launcher = forkserver.Process(target=launch_by_fork, args=(folder, run_dir, free_port()))
        self._launcher.start()

    def returncode(self, timeout_s: float = 0) -> int | None:
        self._launcher.join(timeout_s)
        return self._launcher.exitcode

    def ranks(self) -> list[psutil.Process]:
        return sorted(
            (process for process in self.processes() if process.pid != self._launcher.pid),
            key=lambda process: process.pid,
        )

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) == self._launcher.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def launch_by_fork(folder: Path, run_dir: Path, port: int) -> None:
    """Two ranks with the variables that accelerate sets; when one ends badly, the other is killed."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # as run_rank does
    log = os.open(folder / f"{run_dir.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    ranks = []
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero2.json"}
            os.environ.update({**variables_of(rank, 2, port), **deepspeed})
            os._exit(rank_main(folder, run_dir))
        ranks.append(pid)
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status != 0 and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    os._exit(int(failed))


def rank_main(folder: Path, run_dir: Path) -> int:
    from trainer.training.loop import train

    try:
        return train(load_config(str(folder / "run.yaml"), [f"run.dir={run_dir}"]), resume="auto").exit_code
    except BaseException:
        traceback.print_exc()
        return 1


def start(folder: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    """The command, as a user gives it again and again."""
    config = str(ds_configs.path("accelerate_cpu_2.yaml"))
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "--main_process_port",
        "0",
    ]
    command = [
        *launcher,
        "-m",
        "trainer",
        "train",
        str(folder / "run.yaml"),
        f"run.dir={run_dir}",
        "--resume",
        "auto",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / f"{run_dir.name}.log").open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            cwd=ROOT,
            start_new_session=True,
        )


def processes_of(run_dir: Path, ranks_only: bool = False) -> list[psutil.Process]:
    """Launcher and ranks that were started for `run_dir`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        is_rank = "accelerate.commands.launch" not in words
        if f"run.dir={run_dir}" in words and (is_rank or not ranks_only):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found
