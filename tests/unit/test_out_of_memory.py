"""Memory that runs out is said in one line, whichever library notices."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

import trainer.cli.base
from trainer.errors import DataError, out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        ImportError("/x/_row_cy.so: failed to map segment from shared object", path=__file__),
    ],
)
def test_it_is_one_line_with_the_fix(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(**_: object) -> None:
        raise error

    monkeypatch.setattr(trainer.cli.base, "app", run)
    monkeypatch.setattr(sys, "argv", ["gensr", "train"])
    with pytest.raises(SystemExit) as stop:
        trainer.cli.base.main()
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.startswith("gensr: memory ran out") and said.count("\n") == 1
    assert "micro_batch_size" in said


def test_a_library_that_may_not_be_loaded_is_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is mounted noexec: glibc says the same."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    error = ImportError("/x/_row_cy.so: failed to map segment from shared object", path="/x/_row_cy.so")
    assert out_of_memory(error) is None


def test_other_errors_stay_what_they_are() -> None:
    assert out_of_memory(RuntimeError("shape mismatch")) is None
    assert out_of_memory(DataError("a file says: out of memory")) is None
