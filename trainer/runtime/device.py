"""Which device a process computes on, for programs that no launcher tells."""

import os

import torch


def forced_cpu() -> bool:
    """True where the user asked for CPU on a machine that may have GPUs."""
    by_name = "cpu" in (os.environ.get("DS_ACCELERATOR"), os.environ.get("ACCELERATE_TORCH_DEVICE"))
    return by_name or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def has_gpu() -> bool:
    """A CUDA device is there and may be used. CUDA_VISIBLE_DEVICES= hides them."""
    return torch.cuda.is_available() and not forced_cpu()


def wait_for(device: torch.device | str) -> None:
    """Until a GPU has done what it was given; clocks are read before and after."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """The context of a forward pass in run.precision: "bf16" or "fp32"."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16")


def default_device() -> str:
    """ "cuda" (the first of the visible ones) or "cpu"."""
    return "cuda" if has_gpu() else "cpu"
