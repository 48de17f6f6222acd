"""One cluster and one user's folder for all tests here."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster
from tests.slurm.jobs import ROOT
from tests.tiny_folder import make_tiny_folder


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Slurm]:
    reason = cluster.missing()
    if reason:
        pytest.skip(f"no SLURM cluster can be started: {reason}")
    with cluster.cluster(tmp_path_factory.mktemp("slurm") / "c") as running:
        _give_compiled(running.folder)
        yield running


def _give_compiled(folder: Path) -> None:
    """To each node's own disk: DeepSpeed's CPU library, where it has been compiled on this machine before (a
    minute, else)."""
    from torch.utils.cpp_extension import get_default_build_root

    compiled = Path(
        os.environ.get("TORCH_EXTENSIONS_DIR")
        or f"{get_default_build_root()}/py{sys.version_info[0]}{sys.version_info[1]}_cpu"
    )
    for number in range(1, cluster.NODES + 1):
        own = folder / f"disk-{number}" / "cache" / "torch_extensions"
        if compiled.is_dir():
            shutil.copytree(compiled, own)
        for lock in own.glob("*/lock"):
            lock.unlink()


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: site settings, as the README has them written, and data."""
    folder = tmp_path_factory.mktemp("work")
    make_tiny_folder(folder / "data", num_train=640)
    lines = [
        f'PATH="{Path(sys.executable).parent}:$PATH"',
        f"export PYTHONPATH={ROOT} GENSR_LOCAL_CACHE=/mnt/cache GENSR_SCRATCH=/mnt/data",
        "export GENSR_CPU=1 GENSR_SIGNAL_EVERY_S=0.2 OMP_NUM_THREADS=1",
        "unset PYTEST_CURRENT_TEST TORCH_EXTENSIONS_DIR",
    ]
    (folder / "slurm").mkdir()
    (folder / "slurm" / "env.sh").write_text("\n".join(lines) + "\n")
    return folder
