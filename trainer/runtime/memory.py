"""A process and its memory: what it has taken at the most, and what it keeps."""

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import torch

from trainer.runtime.device import has_gpu


def peak_memory_bytes() -> int:
    """Peak of this process so far: device memory on a GPU, resident memory on a CPU."""
    if has_gpu():
        return torch.cuda.max_memory_allocated()
    # getrusage would count what the process that started this one had, too
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free, for the next tensors: given back and taken anew, every page is zeroed
    again, by a fault that costs more."""
    m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, -1)  # never


def give_back_freed_memory() -> None:
    """What is kept, to the system. Tensors of other sizes than those before them (of a validation, say) leave
    holes that nothing fits into."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
