"""What a run records about the code and the machine it ran on."""

import getpass
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from data_shards.secrets import mask_secrets
from trainer.runtime.device import has_gpu
from trainer.runtime.launch import num_cores

PACKAGES = (
    "gensr",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "webdataset",
    "mlflow",
    "pyarrow",
    "duckdb",
    "numpy",
    "safetensors",
)
MAX_DIFF_BYTES = 1_000_000


def environment_facts() -> dict[str, Any]:
    """Commit, packages and hardware, for RUN/environment.json and the tracker."""
    facts: dict[str, Any] = {
        "git": git_facts(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "platform": platform.platform(),
        "cpu_cores": num_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": " ".join(mask_secrets(word) for word in sys.argv),
        "user": user_name(),
    }
    slurm = {
        key: os.environ[key]
        for key in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT")
        if key in os.environ
    }
    return {**facts, "slurm": slurm} if slurm else facts


def user_name() -> str:
    """Who runs this process; "" in a container that has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def git_facts(folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """commit, dirty and diff of the whole checkout that a folder (this code's) lies in; {} outside one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        diff = git("diff", "HEAD", "--", ":(top)*.py", ":(top)*.yaml", ":(top)*.json")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "dirty": bool(diff), "diff": diff[:MAX_DIFF_BYTES]}


def package_version(package: str) -> str:
    """Of what is installed; "" where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def git_commit() -> str | None:
    """Commit of the checkout this code lies in, with "-dirty" when files differ; None outside a checkout."""
    facts = git_facts()
    return f"{facts['commit']}{'-dirty' if facts['dirty'] else ''}" if facts else None


def hardware_line() -> str:
    """Such as "NVIDIA H200" or "x86_64, 2 cores"."""
    return torch.cuda.get_device_name() if has_gpu() else f"{platform.machine()}, {num_cores()} cores"
