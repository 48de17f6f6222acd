"""Memory of a process."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from trainer.runtime.memory import keep_freed_memory, peak_memory_bytes
keep_freed_memory()
device = "cuda" if torch.cuda.is_available() else "cpu"
before = peak_memory_bytes()
torch.ones(2**26, device=device)  # 0.27 GB
print((peak_memory_bytes() - before) / 1e9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted in pages as Linux does")
def test_the_peak_grows_by_what_is_taken_at_once() -> None:
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert 0.25 < float(answer.stdout) < 0.5
