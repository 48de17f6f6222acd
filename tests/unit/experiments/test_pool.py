"""--jobs: tasks and children at once, with processes that take no time; what signals do; cores and GPUs."""

import atexit
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from trainer.cli import app
from trainer.errors import ConfigError
from trainer.experiments import forked
from trainer.experiments import pool as pools
from trainer.experiments.forked import run_verb
from trainer.experiments.pool import Pool, Steps, environments, interruptible, run_child

ROOT = Path(__file__).parents[3]


def waits(saved: str, ready: str, grandchild: str) -> None:
    """Main of a child: touches the file READY and waits; a SIGTERM is told in the file SAVED, a bit later."""

    def save(number: int, frame: object) -> None:
        if Path(saved).name != "never":
            time.sleep(0.2)
            Path(saved).touch()
            sys.exit(75)

    signal.signal(signal.SIGTERM, save)
    loader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(grandchild).write_text(str(loader.pid))
    Path(ready).write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "num_cores", lambda: 8)
    monkeypatch.setattr(pools, "cuda_devices", list)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def wait_until(what: object, seconds: float = 60.0) -> None:
    assert callable(what)
    end_s = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end_s, "waited too long"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- tasks -------------------------------------------------------------------------------------------------


def test_results_are_those_of_their_tasks_and_the_order_is_that_of_places() -> None:
    begun: list[str] = []

    def task(name: str, pool: Pool, then: str = "") -> str:
        begun.append(name)
        if then:
            pool.submit(partial(task, then, pool), place=0)
        return name.upper()

    with Pool() as pool:
        pool.submit(partial(time.sleep, 0.05))
        found = [pool.submit(partial(task, name, pool, (name == "b" and "b's") or ""), place)
                 for name, place in (("c", 2), ("a", 0), ("b", 0), ("d", 2))]  # fmt: skip
        pool.wait()
        assert [future.result() for future in found] == ["C", "A", "B", "D"]
    assert begun == ["a", "b", "b's", "c", "d"], "what a task submits for its place goes before later places"


def test_as_many_run_at_once_as_there_are_jobs() -> None:
    together = threading.Barrier(3, timeout=20)
    with Pool(3) as pool:
        for _ in range(6):
            pool.submit(together.wait)
        pool.wait()
    running: list[int] = []
    most: list[int] = []

    def task() -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()

    with Pool(2) as pool:
        for _ in range(10):
            pool.submit(task)
        pool.wait()
    assert max(most) <= 2 and len(most) == 10


def test_an_error_nobody_expects_ends_the_pool_and_its_queue() -> None:
    begun: list[int] = []

    def task(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise ZeroDivisionError
        time.sleep(0.1)

    def run(pool: Pool) -> None:
        with pool:
            futures.extend(pool.submit(partial(task, number)) for number in range(20))
            pool.wait()

    futures: list[Future[None]] = []
    with pytest.raises(ZeroDivisionError):
        run(Pool(2))
    assert len(begun) < 20
    with pytest.raises(KeyboardInterrupt):
        futures[-1].result(timeout=1)


def test_a_child_that_somebody_stopped_stops_all(tmp_path: Path) -> None:
    def stopped() -> None:
        wait_until((tmp_path / "ready").exists)
        raise KeyboardInterrupt

    def run(pool: Pool) -> None:
        with pool:
            pool.submit(partial(waiting_child, tmp_path))
            pool.submit(stopped)
            later.append(pool.submit(lambda: 1))
            pool.wait()

    later: list[Future[int]] = []
    with pytest.raises(KeyboardInterrupt):
        run(Pool(2))
    assert (tmp_path / "saved").exists()
    with pytest.raises(KeyboardInterrupt):
        later[0].result(timeout=1)


def waiting_child(folder: Path, saved: str = "saved") -> None:
    (folder / "log").touch()
    run_child(folder / "log", waits, *(str(folder / name) for name in (saved, "ready", "grandchild")))


# ---- children ----------------------------------------------------------------------------------------------


def prints(variable: str, code: int) -> None:
    print(os.environ.get(variable), Path.cwd(), os.getsid(0) == os.getpid(), flush=True)
    os.system("echo also what it starts")
    atexit.register(print, "at its end")
    raise SystemExit(code)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_child_is_a_process_of_its_own(gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "has_gpu", lambda: gpu)  # with one it is not forked
    log = tmp_path / "log"
    log.write_text("before\n")
    monkeypatch.setenv("OWN", "later than the process that forks")
    monkeypatch.chdir(tmp_path)
    assert run_child(log, prints, "OWN", 4) == 4, "without a pool it has one for itself"
    assert log.read_text().splitlines() == [
        "before",
        f"later than the process that forks {tmp_path} True",
        "also what it starts",
        "at its end",
    ]


def fails() -> None:
    raise ZeroDivisionError("in the child")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_end_of_a_child_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    assert run_child(log, fails) == 1
    assert "ZeroDivisionError: in the child" in log.read_text()
    assert run_child(log, dies) == -signal.SIGKILL


def threads(file: str) -> None:
    import torch

    Path(file).write_text(f"{os.environ['OMP_NUM_THREADS']} {torch.get_num_threads()}")


def test_verbs_run_in_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    assert run_child(log, run_verb, "evaluate", str(tmp_path / "none")) == 1
    assert log.read_text().startswith("gensr: ")
    assert run_child(log, run_verb, "--version") == 0


# ---- signals -----------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from functools import partial
from pathlib import Path
from trainer.experiments import pool as pools
from tests.unit.experiments.test_pool import waiting_child
pools.num_cores, pools.cuda_devices = lambda: 8, list
pools.FORCE_AFTER_S = dict.fromkeys(pools.FORCE_AFTER_S, 0.5)
try:
    with pools.interruptible(), pools.Pool(2) as pool:
        for folder in sys.argv[2:]:
            pool.submit(partial(waiting_child, Path(folder), sys.argv[1]))
        pool.wait()
except KeyboardInterrupt:
    sys.exit(75)
"""


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[list[Path]]:
    made = [tmp_path / name for name in "abc"]
    for folder in made:
        folder.mkdir()
    yield made
    for pid in pids_of(made):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def pids_of(folders: list[Path]) -> list[int]:
    files = [folder / name for folder in folders for name in ("ready", "grandchild")]
    return [int(file.read_text()) for file in files if file.exists()]


def start(saved: str, folders: list[Path]) -> "subprocess.Popen[bytes]":
    """Two jobs and three tasks: the third never begins."""
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), saved, *map(str, folders)], cwd=ROOT
    )
    wait_until(lambda: all((folder / "ready").exists() for folder in folders[:2]), 60)
    return program


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_every_child_save(folders: list[Path], number: int) -> None:
    program = start("saved", folders)
    program.send_signal(number)
    time.sleep(0.05)
    program.send_signal(number)  # as `timeout` and shells repeat it
    assert program.wait(30) == 75
    assert [(folder / "saved").exists() for folder in folders] == [True, True, False]
    assert not (folders[2] / "ready").exists()


def test_a_scheduler_may_tell_every_process(folders: list[Path]) -> None:
    """Also the one that the children are forked from."""
    program = start("saved", folders)
    for process in [*psutil.Process(program.pid).children(recursive=True), psutil.Process(program.pid)]:
        process.terminate()
    assert program.wait(30) == 75
    assert [(folder / "saved").exists() for folder in folders] == [True, True, False]


def test_a_second_signal_leaves_no_orphans(folders: list[Path]) -> None:
    program = start("never", folders)
    program.send_signal(signal.SIGINT)
    time.sleep(1.0)
    pids = pids_of(folders)
    assert program.poll() is None and len(pids) == 4 and all(map(is_alive, pids)), "it waits for them"
    program.send_signal(signal.SIGINT)
    assert program.wait(30) == 75
    wait_until(lambda: not any(map(is_alive, pids)))


def test_children_stop_when_the_program_is_killed(folders: list[Path]) -> None:
    program = start("saved", folders)
    pids = pids_of(folders)
    program.kill()
    program.wait()
    wait_until(lambda: all((folder / "saved").exists() for folder in folders[:2]))
    wait_until(lambda: not is_alive(pids[0]) and not is_alive(pids[2]))


def test_children_that_never_end_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "STOP_WAIT_S", 0.3)

    def run(pool: Pool) -> None:
        with pool:
            pool.submit(partial(waiting_child, tmp_path, "never"))
            wait_until((tmp_path / "ready").exists)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Pool(2))
    wait_until(lambda: not any(map(is_alive, pids_of([tmp_path]))))


def test_signals_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def run() -> None:
        with interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ---- cores and GPUs ----------------------------------------------------------------------------------------


def test_jobs_share_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert environments(1) == [{}], "alone, a run has what it had without a pool"
    assert environments(3) == [{"OMP_NUM_THREADS": "2"}] * 3
    seen, log = tmp_path / "seen", tmp_path / "log"
    log.touch()
    for jobs, expected in ((4, "2 2"), (2, "4 4")):  # both are forked from one process
        with Pool(jobs) as pool:
            assert pool.submit(lambda: run_child(log, threads, str(seen))).result() == 0
        assert seen.read_text() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environments(3) == [{}] * 3, "what the user says stays"
    with pytest.raises(ConfigError, match=r"--jobs 9: .* this machine has 8\. Give --jobs 8"):
        environments(9)
    with pytest.raises(ConfigError, match="at least 1"):
        environments(0)


def test_no_gpu_has_two_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "cuda_devices", lambda: ["2", "5", "7"])
    assert [found["CUDA_VISIBLE_DEVICES"] for found in environments(3)] == ["2", "5", "7"]
    with pytest.raises(ConfigError, match=r"--jobs 4: .* CUDA device .* has 3\. Give --jobs 3"):
        environments(4)
    monkeypatch.setattr(pools, "num_cores", lambda: 2)
    assert environments(3)[0]["OMP_NUM_THREADS"] == "1"
    held = {device: threading.Lock() for device in ("2", "5", "7")}

    def task() -> None:
        lock = held[pools._here.environment["CUDA_VISIBLE_DEVICES"]]
        assert lock.acquire(blocking=False), "a device has two jobs"
        time.sleep(0.01)
        lock.release()

    with Pool(3) as pool:
        for _ in range(12):
            pool.submit(task)
        pool.wait()


def test_devices_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("trainer.runtime.device.has_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pools.cuda_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3f, 6")
    assert pools.cuda_devices() == ["GPU-3f", "6"]
    monkeypatch.setattr("trainer.runtime.device.has_gpu", lambda: False)
    assert pools.cuda_devices() == []


# ---- what is printed ---------------------------------------------------------------------------------------


def test_the_time_left_counts_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(pools.time, "monotonic", lambda: now_s[0])
    lines: list[str] = []
    for jobs, left in (
        (1, "0:05:00"),
        (2, "0:02:30"),
        (4, "0:01:40"),
    ):  # 3 are left, of 100 s
        steps = Steps(4, lines.append, jobs)
        with steps.step("one"):
            now_s[0] += 100
        with steps.step("two"):
            assert lines[-2:] == ["[1/4] one", f"[2/4] two   {left} left"]
    steps = Steps(4, lines.append, 2)
    with steps.step("one"):
        now_s[0] += 100
    with steps.step("two"):
        now_s[0] += 60
        with steps.step("three"):  # two of 100 s, and 40 s of the one that runs
            assert lines[-1] == "[3/4] three   0:02:00 left"


def test_arrays_have_no_jobs(tmp_path: Path) -> None:
    for command in (
        ["table", "data/x", str(tmp_path / "out"), "--submit", "--jobs", "2"],
        ["paper", "demo", "--out", str(tmp_path / "out"), "--submit", "--jobs", "2"],
    ):
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 1 and not (tmp_path / "out").exists()
        assert "--submit SLURM decides how many run at once" in str(found.exception or "") + found.output
