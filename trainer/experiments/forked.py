"""Children of a Pool. On a CPU each is forked from a process that has the libraries in memory: to import them
takes 8 s of a core, more than training where a system only counts. With a GPU each begins anew (CUDA does not
survive a fork, and an import may touch it), and where the system is not Linux, whose libraries do not mind.

Each child behaves like a separate process: own session, environment and log file, and the usual SIGTERM
handling. It is told to stop (SIGTERM) when the process that started it ends, for whatever reason.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from trainer.runtime.device import has_gpu

WARM = "gensr.warm"
# start() looks after all children, exit_code() after one: of two who read an exit code at once one gets 255
_lock = threading.Lock()


def start(
    main: Callable[..., None], arguments: Sequence[object], environment: Mapping[str, str], log: Path
) -> BaseProcess:
    """main(*arguments) in a child: a function of a module. environment: beside this process's. What it prints
    is added to the log, a file that is there."""
    given = (main, arguments, {**os.environ, **environment}, str(log))
    child: BaseProcess
    if has_gpu() or sys.platform != "linux":
        child = multiprocessing.get_context("spawn").Process(target=_child, args=given)
    else:
        warm = multiprocessing.get_context("forkserver")
        warm.set_forkserver_preload([WARM])
        child = warm.Process(target=_child, args=given)
    with _lock:
        child.start()
    return child


def exit_code(child: BaseProcess) -> int:
    """When it has ended; −N for signal N."""
    wait([child.sentinel])
    with _lock:
        child.join()  # its files are closed, which the sentinel tells, a moment before it has an exit code
        code = child.exitcode
    assert code is not None
    return code


def _child(
    main: Callable[..., None], arguments: Sequence[object], environment: Mapping[str, str], log: str
) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()
    if threads := environment.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))  # a forked one has it from the process that forks
    try:
        main(*arguments)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def run_verb(*arguments: str) -> None:
    """`python -m gensr arguments`: by its name, since nothing imports the front door."""
    sys.argv = ["gensr", *arguments]
    runpy.run_module("gensr", run_name="__main__")


def run_program(*words: str) -> None:
    """Another program as the child: a SIGTERM goes on to it."""
    program = subprocess.Popen(words)
    signal.signal(signal.SIGTERM, lambda number, frame: program.terminate())
    code = program.wait()
    sys.exit(code if code >= 0 else 128 - code)
