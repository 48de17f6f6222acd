"""Before DeepSpeed compiles: ninja is found, locks of killed processes go; what is missing is said without a
traceback."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from trainer.errors import EnvironmentProblem
from trainer.runtime.compiling import explained, free_locks, get_ready, put_ninja_on_path


def test_a_compilers_lock_that_nobody_holds_is_removed(tmp_path: Path) -> None:
    """torch's FileBaton: a file made with O_EXCL and held open; a killed process leaves it, and everyone
    waits."""
    left, held = tmp_path / "py311_cpu" / "one" / "lock", tmp_path / "two" / "lock"
    for lock in (left, held):
        lock.parent.mkdir(parents=True)
        lock.touch()
    with held.open():
        free_locks(tmp_path, stale_s=0.1)
        assert held.exists() and not left.exists()


def test_ninja_beside_the_interpreter_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in .venv/bin/accelerate launch, where nobody activated .venv."""
    ninja = tmp_path / "ninja"
    ninja.write_text("#!/bin/sh\n")
    ninja.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    put_ninja_on_path()
    assert shutil.which("ninja") == str(ninja)
    before = os.environ["PATH"]
    put_ninja_on_path()
    assert os.environ["PATH"] == before


@pytest.mark.parametrize(("accelerator", "asked"), [("cpu", ["__compatible_ops__"]), ("cuda", [])])
def test_with_a_gpu_no_compiler_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerator: str, asked: list[str]
) -> None:
    """DeepSpeed tries all its operators when their table is first read: without nvcc, a warning each."""
    import deepspeed.ops

    seen: list[str] = []
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)

    def table(name: str) -> dict[str, bool]:
        seen.append(name)
        return {}

    monkeypatch.setattr(deepspeed.ops, "__getattr__", table)
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    get_ready()
    assert seen == asked


NO_HEADERS = (
    "Error building extension 'deepspeed_shm_comm': [1/3] c++ …\n"
    "x.h:1:10: fatal error: Python.h: No such file or directory\n"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(NO_HEADERS), "Python.h: No such file"),
        (
            RuntimeError("Unable to JIT load the deepspeed_shm_comm op due to ninja not being installed."),
            "ninja not being installed",
        ),
        (
            ImportError(
                "/x/deepspeed_shm_comm.so: cannot open shared object file: No such file or directory"
            ),
            "cannot open shared object",
        ),
    ],
    ids=["no headers", "no ninja", "another process did not"],
)
def test_what_cannot_be_compiled_is_said(error: Exception, said: str) -> None:
    with pytest.raises(EnvironmentProblem, match=rf"cannot compile.*{said}.*gensr doctor"), explained():
        raise error


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), explained():
        raise RuntimeError("shape mismatch")
